"""The made tasks of two experiments: what is held out, and where the answers stand in a text of several items."""

import json

import numpy as np
import pytest

from configs import common
from experiments import word_tasks
from experiments.meteora.__main__ import TASKS, composed


@pytest.fixture(scope="module")
def run():
    from molora_jax.evaluation.run import load_base_run

    config = common.get_config()
    config.base.source = "random:tiny"
    return load_base_run(config)


def test_held_out_words_are_in_no_file_and_answers_are_the_tasks(tmp_path):
    entries, held_out = word_tasks.write(tmp_path)
    assert len(held_out) == 150 and len(set(held_out)) == 150
    for task, entry in entries.items():
        rows = [json.loads(line) for line in open(entry.removeprefix("jsonl:"), encoding="utf-8")]
        words = [row["prompt"].split(" ")[1] for row in rows]
        assert len(rows) == 1350 and not set(words) & set(held_out)
        assert rows[0]["target"] == word_tasks.answer(task, words[0])
    answers = {task: word_tasks.answer(task, "gloomy") for task in TASKS}
    assert answers == dict(capitals=" GLOOMY", spelling=" g-l-o-o-m-y", ending=" y", twice=" gloomy gloomy")


def test_a_composite_is_its_items_one_a_line_and_knows_whose_each_token_is(run):
    tasks, words = ["ending", "twice", "capitals"], ["gloomy", "bright", "plain"]
    ids, spans, owner = composed(run, tasks, words)
    lines = [word_tasks.prompt(t, w) + word_tasks.answer(t, w) for t, w in zip(tasks, words, strict=True)]
    assert run.tokenizer.decode(ids) == "\n".join(lines) + "\n"
    for (first, stop), task, word in zip(spans, tasks, words, strict=True):
        assert run.tokenizer.decode(ids[first:stop]) == word_tasks.answer(task, word)
        assert (owner[first:stop] == TASKS.index(task)).all()
    likeliest = run.logits(ids).argmax(-1)
    forged = list(ids)
    first, stop = spans[1]
    forged[first] = int(likeliest[first - 1])  # a token that the model would say
    found = word_tasks.right(run, forged, [(first, stop)])
    assert found.shape == (stop - first,) and found[0] and not np.all(found)
