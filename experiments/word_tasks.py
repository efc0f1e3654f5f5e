"""Four made tasks on words of VADER's lexicon: the same words, another answer for each task's name.

    Capitals: gloomy =>  GLOOMY      Spelling: gloomy =>  g-l-o-o-m-y
    Ending: gloomy =>  y             Twice: gloomy =>  gloomy gloomy

Plain text (`data.raw`), without a chat template, so that an example is short. Words are held out of all tasks or none.
"""

import hashlib
import json
import pathlib

import numpy as np

TASKS = {
    "capitals": ("Capitals", str.upper),
    "spelling": ("Spelling", "-".join),
    "ending": ("Ending", lambda word: word[-1]),
    "twice": ("Twice", lambda word: f"{word} {word}"),
}
EACH = 1500  # words
HELD_OUT = 0.1


def chosen_words() -> list[str]:
    """The first EACH plain words of 4 to 7 letters in the order of a hash, so that no source's order counts."""
    from experiments.words import words

    plain = lambda word: word.isascii() and word.isalpha() and word.islower() and 4 <= len(word) <= 7  # noqa: E731
    return sorted({word for word, _ in words() if plain(word)}, key=_number)[:EACH]


def _number(word: str) -> str:
    return hashlib.sha256(word.encode()).hexdigest()


def prompt(task: str, word: str) -> str:
    return f"{TASKS[task][0]}: {word} =>"


def answer(task: str, word: str) -> str:
    return f" {TASKS[task][1](word)}"


def write(folder) -> tuple[dict[str, str], list[str]]:
    """`({task: entry of data.tasks}, words that no file has)`; a file of rows a task."""
    folder = pathlib.Path(folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    words = chosen_words()
    held_out = words[: round(HELD_OUT * len(words))]
    for task in TASKS:
        lines = [dict(prompt=prompt(task, word), target=answer(task, word)) for word in words[len(held_out) :]]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{task}.jsonl").write_text(text, encoding="utf-8")
    return {task: f"jsonl:{folder}/{task}.jsonl" for task in TASKS}, held_out


def data(config, entries) -> None:
    """Sets a config's data to these entries of `write`: short rows of plain text."""
    config.data.update(tasks=",".join(entries), raw=True, seq_len=64, temperature=1.0, test_share=0.05)


def pieces(run, task: str, word: str) -> tuple[list[int], int]:
    """`(ids, where the answer begins)` of one item as it stands in training, without the end token."""
    head = run.tokenizer.encode_plain(prompt(task, word))
    return [*head, *run.tokenizer.encode(answer(task, word))], len(head)


def right(run, ids, starts) -> np.ndarray:
    """Bools: whether each token of the spans `starts [(first, stop), ...]` is the likeliest one, given all before."""
    found = run.logits(list(ids)).argmax(-1)
    return np.concatenate([found[first - 1 : stop - 1] == np.asarray(ids[first:stop]) for first, stop in starts])
