"""Held-out items: a fixed choice, packed once each."""

import numpy as np
import pytest

from molora_jax.data import build
from molora_jax.errors import InputError
from tests.data.fakes import ByteTokenizer, config, numbered


@pytest.fixture
def make(tmp_path):
    a = numbered(tmp_path / "a.jsonl", 300, target="x {}")
    b = numbered(tmp_path / "b.jsonl", 120)

    def make(seed=0, **changes):
        return build(config(f"{a},{b}", **changes), tokenizer=ByteTokenizer(), batch_size=2, seed=seed)

    return make


def test_the_choice_is_fixed_and_nested(make):
    items = make().heldout("test", 5)
    assert [item.task for item in items] == ["a"] * 5 + ["b"] * 5
    assert make(seed=7).heldout("test", 5) == items
    more = [item for item in make().heldout("test", 6) if item.task == "a"]
    assert more[:5] == items[:5]
    assert items[:5] != sorted(items[:5], key=lambda item: item.example_id), "not in file order"
    assert not {i.prompt for i in items} & {i.prompt for i in make().heldout("valid", 99)}
    with pytest.raises(ValueError, match="train"):
        make().heldout("train", 5)


def test_items_carry_ids(make):
    data = make()
    for item in data.heldout("valid", 4):
        assert ByteTokenizer().decode(item.context_ids[1:-1]) == item.prompt
        assert ByteTokenizer().decode(item.target_ids) == item.target and item.target_ids[-1] == 1
        assert data.task_names[item.task_id] == item.task and item.split == "valid"


@pytest.mark.parametrize("rows", [1, 3, 50])
def test_every_item_is_packed_once(make, rows):
    data = make()
    items = data.heldout("test", 9) + data.heldout("valid", 2)
    batches = data.heldout_batches(items, rows, targets_per_row=data.train.targets_per_row)
    seen = np.zeros(len(items), int)
    for batch in batches:
        assert batch["tokens"].shape == (rows, 64) and batch.keys() - data.train.batch(0).keys() == {"example_index"}
        assert batch["loss_weight"].sum(1).max() <= data.train.targets_per_row
        assert ((batch["example_index"] == -1) == (batch["segment_ids"] == 0)).all()
        for i, item in enumerate(items):
            here = batch["example_index"] == i
            if here.any():
                seen[i] += 1
                ids = item.context_ids + item.target_ids
                assert batch["tokens"][here].tolist() == list(ids[:-1])
                assert batch["targets"][here & (batch["loss_weight"] > 0)].tolist() == list(item.target_ids)
    assert (seen == 1).all()


def test_an_item_that_does_not_fit_is_refused(make):
    data = make()
    with pytest.raises(InputError, match="targets"):
        data.heldout_batches(data.heldout("test", 3), 2, targets_per_row=2)
