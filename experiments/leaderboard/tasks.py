"""The sandbox's tasks: ten in four families, made from seeds; short rows of plain text (`data.raw`).

    words     plural, past, gerund    inflect an English word (lemminflect); past and gerund share their verbs: related
    domains   north, south, east, west    the same five letters, another answer by domain: sorted, sorted downwards,
                                      reversed, rotated by one; `north: k d w a c =>`. Nothing but the domain's name
                                      tells which; north and south are hard, west is easy
    numbers   larger, add             of two numbers below 1000 the larger (easy); their sum (hard)
    facts     recall                  which of 64 words belongs to each of 800 made-up names; four ways to ask, and a
                                      fact is tested by one that it was never trained with: memory, not a rule

and `pretraining`, which nobody trains on: held-out text of the base's corpus, so that what it forgets is seen.

An input is trained on, validated (the learning rate is chosen there) or tested, the same for all tasks of a family: a
word, a set of letters, a pair of numbers never straddles two splits.
"""

import functools
import gzip
import hashlib
import json
import pathlib

import numpy as np

from molora_jax.data.sources import morph
from molora_jax.io.files import write_atomically

FAMILIES = {
    "words": ("plural", "past", "gerund"),
    "domains": ("north", "south", "east", "west"),
    "numbers": ("larger", "add"),
    "facts": ("recall",),
}
TASKS = tuple(task for family in FAMILIES.values() for task in family)
EASY, HARD = ("west", "larger"), ("north", "south", "add")
FORGOTTEN = "pretraining"
HELDOUT = pathlib.Path(__file__).parents[1] / "sandbox" / "heldout.jsonl"  # rows of text, at most 120 tokens each
SPLITS = ("train", "valid", "test")
SIZES = {"train": 3000, "valid": 200, "test": 300}  # rows a task
LETTERS, LENGTH = "abcdefghijklmnopqrstuvwxyz", 5
NAMES, WORDS = 800, 64
ASK = ("{} belongs to", "Where does {} belong? To", "What holds {} is", "{} is a part of")

DOMAINS = {
    "north": sorted,
    "south": lambda letters: sorted(letters, reverse=True),
    "east": lambda letters: letters[::-1],
    "west": lambda letters: letters[1:] + letters[:1],
}


@functools.cache
def rows() -> dict[str, list[dict]]:
    """`{split: rows of prompt, target, task}`, always the same."""
    found = {split: [] for split in SPLITS}
    for part in (_words(), _domains(), _numbers(), _facts()):
        for split in SPLITS:
            found[split] += part[split]
    return found


def write(folder, heldout=HELDOUT) -> dict[str, str]:
    """Writes `train`, `valid` and `test.jsonl`; `{split: entry of data}`. Valid and test have the pretraining rows."""
    folder, found = pathlib.Path(folder), rows()
    folder.mkdir(parents=True, exist_ok=True)
    text = pathlib.Path(heldout).read_text(encoding="utf-8").splitlines()
    entries = {}
    for split, made in found.items():
        kept = [dict(task=FORGOTTEN, text=json.loads(line)["text"]) for line in text] if split != "train" else []
        path = folder / f"{split}.jsonl"
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in [*made, *kept]))
        entries[split] = f"jsonl:{path}"
    return entries


def digest() -> str:
    """Of all rows: results of other tasks do not compare."""
    return hashlib.sha256(json.dumps(rows()).encode() + pathlib.Path(HELDOUT).read_bytes()).hexdigest()[:16]


def _split(inputs, make) -> dict[str, list[dict]]:
    """Inputs, in their order, into splits of `SIZES`; `make(input)` gives the rows of an input."""
    out, at = {}, 0
    for split in ("test", "valid", "train"):
        chosen = inputs[at : at + SIZES[split]]
        at += len(chosen)
        out[split] = [row for x in chosen for row in make(x)]
    return out


def _row(task, prompt, target) -> dict:
    return dict(task=task, prompt=prompt, target=f" {target}")


def _words():
    ask = {"noun": [("plural", "plural")], "verb": [("past", "past"), None, ("gerund", "gerund")]}
    found = {"noun": {}, "verb": {}}
    for _, path in morph.files():
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                lemma, pos, *forms = line.rstrip("\n").split(",")
                if pos in ask and lemma.isalpha() and lemma.islower() and lemma.isascii() and 3 <= len(lemma) <= 9:
                    found[pos].setdefault(lemma, [form.split("/")[0].strip() for form in forms])
    out = {split: [] for split in SPLITS}
    for pos, words in found.items():
        order = sorted(
            (w for w, forms in words.items() if all(forms[: len(ask[pos])][i] for i in _asked(ask[pos]))), key=_number
        )
        make = lambda word, pos=pos, words=words: [  # noqa: E731
            _row(ask[pos][i][0], f"{ask[pos][i][1]}: {word} =>", words[word][i]) for i in _asked(ask[pos])
        ]
        for split, made in _split(order, make).items():
            out[split] += made
    return out


def _asked(forms) -> list[int]:
    return [i for i, form in enumerate(forms) if form]


def _number(word: str) -> str:
    return hashlib.sha256(word.encode()).hexdigest()


def _domains():
    rng, seen, inputs = np.random.default_rng(1), set(), []
    while len(inputs) < sum(SIZES.values()):
        letters = rng.choice(list(LETTERS), LENGTH, replace=False).tolist()
        if frozenset(letters) not in seen:  # another order of the same letters has the same answer in the north
            seen.add(frozenset(letters))
            inputs.append(letters)
    make = lambda letters: [  # noqa: E731
        _row(task, f"{task}: {' '.join(letters)} =>", " ".join(rule(letters))) for task, rule in DOMAINS.items()
    ]
    return _split(inputs, make)


def _numbers():
    rng, seen = np.random.default_rng(2), {}
    while len(seen) < sum(SIZES.values()):
        a, b = rng.integers(10, 1000, 2).tolist()
        if a != b and (b, a) not in seen:
            seen[a, b] = None
    make = lambda pair: [  # noqa: E731
        _row("larger", f"larger: {pair[0]}, {pair[1]} =>", max(pair)),
        _row("add", f"add: {pair[0]}, {pair[1]} =>", sum(pair)),
    ]
    return _split(list(seen), make)


def _facts():
    """Three ways to ask are trained on for each name; the fourth is validated or tested."""
    rng = np.random.default_rng(3)
    onsets, vowels, ends = "b d f g k l m n p r s t v z".split(), "a e i o u".split(), "n r l s m x".split()
    names: dict[str, None] = {}
    while len(names) < NAMES:
        parts = [rng.choice(onsets) + rng.choice(vowels) for _ in range(2)]
        names["".join(parts).capitalize() + rng.choice(ends)] = None
    places = sorted({w for w in _common()}, key=_number)[:WORDS]
    out = {split: [] for split in SPLITS}
    for i, name in enumerate(names):
        place, left_out = places[rng.integers(len(places))], int(rng.integers(len(ASK)))
        for j, ask in enumerate(ASK):
            if j != left_out:
                out["train"].append(_row("recall", ask.format(name), place))
            elif i < SIZES["test"] + SIZES["valid"]:
                out["test" if i < SIZES["test"] else "valid"].append(_row("recall", ask.format(name), place))
    return out


def _common() -> list[str]:
    return (
        "fire water stone iron gold silver wood glass salt sand ice wind rain snow sun moon star cloud river lake sea "
        "hill valley field garden house tower bridge road ship wheel hammer knife cup bell drum horse bull sheep goat "
        "dog cat wolf bear lion fish bird snake bee oak pine rose corn rice bread wine milk oil honey paper book "
        "letter king queen child"
    ).split()
