"""The stream is a function of (seed, step): purity, slices, epochs, bounds, grain."""

import collections

import numpy as np
import pytest

from molora_jax.data import build
from molora_jax.errors import InputError
from tests.data.fakes import ByteTokenizer, config, numbered


def make(tmp_path, *, batch_size=4, seed=0, sizes=(90, 40), **changes):
    tasks = [
        numbered(tmp_path / f"t{i}.jsonl", n, prompt="p" * (3 + 5 * i) + "{}", target=f"t{i}" + " {}" * (i + 1))
        if i == 0
        else numbered(tmp_path / f"t{i}.jsonl", n, prompt="p" * (3 + 5 * i) + "{}", target=f"t{i} {{}} long")
        for i, n in enumerate(sizes)
    ]
    return build(config(",".join(tasks), **changes), tokenizer=ByteTokenizer(), batch_size=batch_size, seed=seed)


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def test_a_batch_does_not_depend_on_what_was_asked_before(tmp_path):
    one, two = make(tmp_path), make(tmp_path)
    forward = [one.train.batch(step) for step in range(60)]
    backward = [two.train.batch(step) for step in reversed(range(60))][::-1]
    assert all(same(a, b) for a, b in zip(forward, backward, strict=True))
    assert same(make(tmp_path).train.batch(59), forward[59])


def test_the_seed_changes_the_order(tmp_path):
    assert not same(make(tmp_path, seed=0).train.batch(0), make(tmp_path, seed=1).train.batch(0))


def test_two_processes_see_the_whole_batch(tmp_path):
    data, other = make(tmp_path, batch_size=6), make(tmp_path, batch_size=6)
    for step in (0, 7, 31):
        whole = data.train.batch(step)
        halves = [data.train.batch(step, rows=slice(0, 3)), other.train.batch(step, rows=slice(3, 6))]
        assert same(whole, {k: np.concatenate([half[k] for half in halves]) for k in whole})
        assert same(data.train.batch(step, rows=slice(None, None, 2)), {k: v[::2] for k, v in whole.items()})


def test_shapes_and_types(tmp_path):
    batch = make(tmp_path, batch_size=5).train.batch(3)
    assert {k: v.shape for k, v in batch.items()} == dict.fromkeys(batch, (5, 64))
    assert {k for k, v in batch.items() if v.dtype != np.int32} == {"loss_weight"}
    assert batch["loss_weight"].dtype == np.float32


def used(stream, steps):
    """Times that each example occurs in the rows of `steps`."""
    count = collections.Counter()
    for step in steps:
        batch = stream.batch(step)
        first = (batch["positions"] == 0) & (batch["segment_ids"] > 0)
        count.update(batch["example_ids"][first].tolist())
    return count


def test_one_task_one_epoch_no_example_lost_or_repeated(tmp_path):
    data = make(tmp_path, sizes=(90,), batch_size=1)
    size = data.report()["tasks"]["t0"]["train"]
    epoch_rows = len(data.train.plan(0))
    for epoch in range(3):
        count = used(data.train, range(epoch * epoch_rows, (epoch + 1) * epoch_rows))
        assert count == dict.fromkeys(range(size), 1)


def test_an_epoch_may_end_inside_a_batch(tmp_path):
    data = make(tmp_path, sizes=(90,), batch_size=4)
    size, rows = data.report()["tasks"]["t0"]["train"], len(data.train.plan(0))
    assert rows % 4, "choose sizes so that the boundary is inside a batch"
    assert used(data.train, range(rows)) == dict.fromkeys(range(size), 4)  # 4 * rows rows are four epochs


def test_every_example_of_a_mixture_is_used_as_often_as_its_neighbours(tmp_path):
    data = make(tmp_path, temperature=3.0)
    count = collections.Counter()
    for window in range(7):
        count.update(i for row in data.train.plan(window) for i in row)
        for task in (0, 1):
            members = np.flatnonzero(data.splits["train"].task_ids == task)
            times = [count[i] for i in members.tolist()]
            assert max(times) - min(times) <= 1


def test_shares_follow_the_temperature(tmp_path):
    for temperature in (1.0, 3.0):
        data = make(tmp_path, temperature=temperature)
        sizes = np.array([row["train"] for row in data.report()["tasks"].values()], float)
        wanted = sizes ** (1 / temperature) / (sizes ** (1 / temperature)).sum()
        drawn = np.concatenate([data.train.draws(w) for w in range(50)])
        got = np.bincount(data.splits["train"].task_ids[drawn]) / len(drawn)
        assert np.allclose(got, wanted, atol=0.003)


def test_windows_of_a_large_task_make_up_its_epoch(tmp_path, monkeypatch):
    monkeypatch.setattr("molora_jax.data.stream.WINDOW", 20)
    data = make(tmp_path, sizes=(90,), batch_size=1)
    size = data.report()["tasks"]["t0"]["train"]
    windows = -(-size // 20)
    assert windows > 1
    for epoch in range(2):
        ids = [i for w in range(windows) for row in data.train.plan(epoch * windows + w) for i in row]
        assert sorted(ids) == list(range(size))
    rows = sum(len(data.train.plan(w)) for w in range(windows))
    assert used(data.train, range(rows)) == dict.fromkeys(range(size), 1)


def test_stages_restrict_tasks_and_keep_ids(tmp_path):
    data = make(tmp_path)
    stream = data.train.for_tasks("t1")
    batch = stream.batch(2)
    assert set(batch["task_ids"][batch["segment_ids"] > 0]) == {1}
    assert (stream.targets_per_row, stream.max_segments) == (data.train.targets_per_row, data.train.max_segments)
    assert same(data.train.for_tasks("t0,t1").batch(5), data.train.batch(5))
    with pytest.raises(InputError, match="t9"):
        data.train.for_tasks("t0,t9")


def test_bounds_hold(tmp_path):
    data = make(tmp_path)
    assert data.train.targets_per_row % 8 == 0
    for step in range(40):
        batch = data.train.batch(step)
        assert batch["loss_weight"].sum(1).max() <= data.train.targets_per_row
        assert batch["segment_ids"].max() <= data.train.max_segments


@pytest.mark.parametrize("prefetch", [0, 2])
def test_the_iterator_equals_batch(tmp_path, prefetch):
    data = make(tmp_path)
    steps = data.train.iterate(17, rows=slice(1, 3), prefetch=prefetch)
    for step in range(17, 27):
        got_step, got = next(steps)
        assert got_step == step and same(got, data.train.batch(step, rows=slice(1, 3)))


def test_a_failure_in_a_worker_surfaces(tmp_path, monkeypatch):
    data = make(tmp_path)
    good = data.train.batch

    def batch(step, rows=None):
        if step == 3:
            raise OSError("disk gone")
        return good(step, rows)

    monkeypatch.setattr(data.train, "batch", batch)
    steps = data.train.iterate(0)
    with pytest.raises(OSError, match="disk gone"):
        for _ in range(6):
            next(steps)


def test_negative_steps_are_refused(tmp_path):
    with pytest.raises(ValueError, match="negative"):
        make(tmp_path).train.batch(-1)
