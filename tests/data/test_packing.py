"""Rows: the alignment of one hand-made example, the bounds, and how full they are."""

import hypothesis
import hypothesis.strategies as st
import numpy as np

from molora_jax.data import build
from molora_jax.data.packing import choose_targets_per_row, pack
from tests.data.fakes import ByteTokenizer, config, numbered, write_rows


def test_alignment_of_a_hand_made_example(tmp_path):
    """Context "\\x02ab\\x04" and target "XY": six inputs, of which the last three predict X, Y and the end."""
    data = build(
        config(write_rows(tmp_path / "a.jsonl", [dict(prompt="ab", target="XY")] * 1), seq_len=8),
        tokenizer=ByteTokenizer(),
        batch_size=1,
        seed=0,
    )
    batch = data.train.batch(0)
    a, b, x, y = (ord(c) + 5 for c in "abXY")
    assert batch["tokens"][0].tolist() == [2, a, b, 4, x, y, 0, 0]
    assert batch["targets"][0].tolist() == [a, b, 4, x, y, 1, 0, 0]
    assert batch["loss_weight"][0].tolist() == [0, 0, 0, 1, 1, 1, 0, 0]
    assert batch["segment_ids"][0].tolist() == [1] * 6 + [0, 0]
    assert batch["positions"][0].tolist() == [0, 1, 2, 3, 4, 5, 0, 0]
    assert batch["task_ids"][0].tolist() == [0] * 8


def test_every_segment_is_one_whole_example(tmp_path):
    tasks = f"{numbered(tmp_path / 'a.jsonl', 40)},{numbered(tmp_path / 'b.jsonl', 30, target='{}')}"
    data = build(config(tasks), tokenizer=ByteTokenizer(), batch_size=3, seed=1)
    split = data.splits["train"]
    for step in range(10):
        batch = data.train.batch(step)
        for row in range(3):
            segments = batch["segment_ids"][row]
            assert set(segments) - {0} == set(range(1, segments.max() + 1))
            for segment in range(1, segments.max() + 1):
                here = segments == segment
                example = split.example(int(batch["example_ids"][row][here][0]))
                ids = example.context_ids + example.target_ids
                assert batch["tokens"][row][here].tolist() == list(ids[:-1])
                assert batch["targets"][row][here].tolist() == list(ids[1:])
                assert batch["positions"][row][here].tolist() == list(range(len(ids) - 1))
                weight = [0.0] * (len(example.context_ids) - 1) + [1.0] * len(example.target_ids)
                assert batch["loss_weight"][row][here].tolist() == weight
                assert set(batch["task_ids"][row][here]) == {example.task_id}
                assert example.target_ids[-1] == ByteTokenizer.eos_id


@hypothesis.settings(max_examples=60)
@hypothesis.given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 16)), min_size=1, max_size=60),
    st.integers(16, 40),
    st.integers(1, 9),
    st.randoms(use_true_random=False),
)
def test_packing_keeps_every_example_and_every_bound(items, targets_per_row, max_segments, random):
    lengths = np.array([max(n, t) for n, t in items])
    targets = np.array([t for _, t in items])
    limits = dict(seq_len=40, targets_per_row=targets_per_row, max_segments=max_segments)
    rows = pack(lengths, targets, **limits)
    assert sorted(i for row in rows for i in row) == list(range(len(items)))
    assert all(lengths[row].sum() <= 40 and targets[row].sum() <= targets_per_row for row in rows)
    assert max(map(len, rows)) <= max_segments
    order = list(range(len(items)))
    random.shuffle(order)
    assert len(pack(lengths[order], targets[order], **limits)) == len(rows), "the count depends on lengths only"


def test_folding_beats_best_fit_where_rows_hold_few():
    random = np.random.default_rng(0)
    lengths = random.normal(43, 4, 3000).clip(34, 60).astype(int)
    rows = pack(lengths, np.ones(3000, int), seq_len=128, targets_per_row=128)
    assert 1 - lengths.sum() / (len(rows) * 128) < 0.08


def test_the_bound_on_targets_is_as_small_as_it_can_be():
    lengths, targets = np.full(400, 20), np.full(400, 3)
    bound = choose_targets_per_row(lengths, targets, seq_len=128, longest=5)
    assert bound == 24  # six examples of three fit a row; 16 would hold five
    assert choose_targets_per_row(lengths, targets, seq_len=128, longest=57) == 64
    assert choose_targets_per_row(lengths, targets, seq_len=100, longest=99) == 100


def test_all_padding_has_no_loss(tmp_path):
    data = build(config(numbered(tmp_path / "a.jsonl", 30)), tokenizer=ByteTokenizer(), batch_size=2, seed=0)
    (batch,) = data.heldout_batches([], 2) or [data.train.batch(0, rows=slice(0, 0))]
    assert batch["loss_weight"].sum() == 0
