"""Rows with a class and rows with two answers: what they become, what is left out and counted, units in batches."""

import numpy as np
import pytest

from molora_jax.data import build
from molora_jax.data.example import Example
from molora_jax.data.pairs import of_task
from molora_jax.errors import InputError
from molora_jax.io.tokenizer import byte_tokenizer
from tests.data.fakes import config, write_rows

CHATML = byte_tokenizer()
END = "<|im_end|>"


def make(tmp_path, rows, reads, *, unit=1, batch_size=4, valid=None, **changes):
    entry = write_rows(tmp_path / "d.jsonl", rows)
    if valid is not None:
        changes["valid"] = write_rows(tmp_path / "v.jsonl", valid)
    fields = dict(seq_len=120, test_share=0.0) | changes
    return build(config(entry, **fields), tokenizer=CHATML, batch_size=batch_size, seed=0, reads=reads, unit=unit)


def labelled(number=20):
    return [dict(text=f"text {i}", label="bca"[i % 3], task="xy"[i % 2]) for i in range(number)]


def paired(number=20):
    return [dict(prompt=f"Q{i}", chosen=f"yes {i}" * (1 + i % 2), rejected=f"no {i}") for i in range(number)]


def test_a_class_is_the_one_target_behind_the_text(tmp_path):
    data = make(tmp_path, labelled(), "label")
    assert data.classes == ("a", "b", "c"), "of all tasks, sorted: each task has numbered its own"
    split = data.splits["train"]
    for i in range(len(split.length)):
        example = split.example(i)
        assert CHATML.decode(example.context_ids) == example.prompt
        assert example.target_ids == (data.classes.index(example.target),) and example.num_targets == 1
    batch = data.train.batch(0)
    for row in range(4):
        for segment in range(1, batch["segment_ids"][row].max() + 1):
            at = np.flatnonzero(batch["segment_ids"][row] == segment)
            example = split.example(int(batch["example_ids"][row, at[0]]))
            assert CHATML.decode(batch["tokens"][row, at].tolist()) == example.prompt
            assert batch["loss_weight"][row, at].tolist() == [0.0] * (len(at) - 1) + [1.0]
            assert batch["targets"][row, at[-1]] == data.classes.index(example.target)


def test_numbers_are_classes_by_their_digits_and_files_own_names_are_mapped(tmp_path):
    rows = [dict(sentence=f"s{i}", y=i % 2) for i in range(8)]
    assert make(tmp_path, rows, "label", fields="text=sentence,label=y").classes == ("0", "1")


@pytest.mark.parametrize(
    "reads, row, message",
    [
        ("label", dict(text="a", label=1.5), "row 21: got label of type number"),
        ("label", dict(text="a", label=True), "row 21: got label of type boolean"),
        ("label", dict(text=" ", label="a"), "row 21: got an empty text"),
        ("label", dict(text="a"), "no field 'label'"),
        ("label", dict(prompt="a", target="b"), "objective 'lm' reads"),
        ("pair", dict(prompt="a", chosen="b"), "no field 'rejected'"),
        ("pair", dict(prompt="a", chosen="b", rejected=3), "rejected of type number"),
        ("pair", dict(text="a", label="b"), "objective 'classify' reads"),
        ("text", dict(prompt="a", chosen="b", rejected="c"), r"objective\.name=preference"),
    ],
)  # fmt: skip
def test_bad_rows_are_named_or_counted(tmp_path, reads, row, message):
    good = {"label": labelled(), "pair": paired(), "text": [dict(prompt=f"{i}", target="t") for i in range(20)]}[reads]
    unit = 2 if reads == "pair" else 1
    with pytest.raises(InputError, match=message):
        make(tmp_path, [*good, row], reads, unit=unit)
    report = make(tmp_path, [*good, row], reads, unit=unit, bad_rows="skip").report()
    assert sum(task.get("bad_rows", 0) for task in report["tasks"].values()) == 1


def test_ties_are_left_out_and_counted(tmp_path):
    rows = [*paired(), dict(prompt="T", chosen="same", rejected="same")]
    task = make(tmp_path, rows, "pair", unit=2).report()["tasks"]["d"]
    assert (task["rows"], task["kept"], task["train"], task["ties"]) == (21, 20, 20, 1)
    with pytest.raises(InputError, match="1 rows whose answers are the same"):
        make(tmp_path, rows[-1:], "pair", unit=2)


def test_two_answers_stand_in_two_rows_in_the_same_segments(tmp_path):
    data = make(tmp_path, paired(), "pair", unit=2, batch_size=4)
    split, seen = data.splits["train"], set()
    for step in range(12):
        batch = data.train.batch(step)
        for row in (0, 2):
            count = batch["segment_ids"][row].max()
            assert count == batch["segment_ids"][row + 1].max() > 1
            for segment in range(1, count + 1):
                ids = [int(batch["example_ids"][r][batch["segment_ids"][r] == segment][0]) for r in (row, row + 1)]
                chosen, rejected = split.example(ids[0]), split.example(ids[0]).rejected
                assert ids[1] == ids[0] + 1 == rejected.example_id and chosen.prompt == rejected.prompt
                assert chosen.target.startswith("yes") and rejected.target.startswith("no")
                assert CHATML.decode(chosen.target_ids) == chosen.target + END
                seen.add(ids[0])
    assert len(seen) == 20, "every pair within the epoch"
    halves = [data.train.batch(3, rows=slice(a, a + 2)) for a in (0, 2)]
    assert all(np.array_equal(np.concatenate([h[k] for h in halves]), v) for k, v in data.train.batch(3).items())


def test_held_out_pairs_keep_their_rows_and_their_index(tmp_path):
    data = make(tmp_path, paired(), "pair", unit=2, valid=paired(7))
    examples = data.heldout("valid", 5)
    assert len(examples) == 5 and all(example.rejected is not None for example in examples)
    found = []
    for batch in data.heldout_batches(examples, 4):
        index, own = batch["example_index"], batch["segment_ids"] > 0
        for row in (0, 2):
            assert list(dict.fromkeys(index[row][own[row]])) == list(dict.fromkeys(index[row + 1][own[row + 1]]))
            found += dict.fromkeys(index[row][own[row]])
    assert sorted(found) == list(range(5))


def test_pairs_of_unequal_length_are_skipped_or_cut_together(tmp_path):
    rows = [*paired(6), dict(prompt="L" * 50, chosen="x", rejected="y" * 90)]
    assert make(tmp_path, rows, "pair", unit=2).report()["tasks"]["d"]["skipped"] == 1
    cut = make(tmp_path, rows, "pair", unit=2, overlong="truncate")
    split = cut.splits["train"]
    long = next(e for e in map(split.example, range(0, len(split.length), 2)) if e.prompt.startswith("L"))
    assert long.context_ids == long.rejected.context_ids and CHATML.decode(long.target_ids) == "x" + END


def test_classes_need_two_and_those_of_valid_are_known(tmp_path):
    with pytest.raises(InputError, match="rows of one class"):
        make(tmp_path, [dict(text=f"{i}", label="a") for i in range(4)], "label")
    with pytest.raises(InputError, match=r"data\.valid.*class 'z'"):
        make(tmp_path, labelled(), "label", valid=[dict(text="t", label="z", task="x")])


def test_pairs_of_the_shipped_tasks():
    forms = [Example("morph", f"{form} of go", word, "go") for form, word in (("past", "went"), ("third", "goes"))]
    made = of_task("morph", [*forms, Example("morph", "plural of cat", "cats", "cat")])
    assert [(e.target, e.rejected.target) for e in made] == [("went", "goes"), ("goes", "went")], (
        "a word alone has none"
    )
    classes = of_task("sentiment", [Example("sentiment", "?", "negative", "g", ("negative", "positive"))])
    assert classes[0].rejected.target == "positive"
    with pytest.raises(InputError, match="without wrong answers"):
        of_task("math", [Example("math", "1+1", "2", "g")])
