"""Rows, cuts, event files and the progress line."""

import io
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from molora_jax.runs.metrics import MetricsWriter, Progress, duration
from molora_jax.runs.metrics_file import cut


def lines_cut(path, after_step) -> int:
    lost = cut(path, after_step)
    return lost.cut + lost.broken


def rows(path):
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]


def test_rows_hold_all_kinds_of_values(tmp_path):
    with MetricsWriter(tmp_path, per_layer=True) as metrics:
        metrics.write({"step": jnp.int32(1), "loss": jnp.float32(0.5), "site/a": jnp.arange(3.0), "tokens": 7})
        written = rows(tmp_path / "metrics.jsonl")  # there before the file is closed
        metrics.write({"step": 2, "loss": math.nan, "site/a": np.array([np.inf, 1, -np.inf]), "note": "x"})
    assert written == [{"step": 1, "loss": 0.5, "site/a": [0.0, 1.0, 2.0], "tokens": 7}]
    second = rows(tmp_path / "metrics.jsonl")[1]
    assert second == {"step": 2, "loss": "NaN", "site/a": ["Infinity", 1.0, "-Infinity"], "note": "x"}
    np.testing.assert_array_equal(np.array(second["site/a"], float), [np.inf, 1, -np.inf])
    events = b"".join(p.read_bytes() for p in (tmp_path / "tensorboard").iterdir())
    assert b"loss" in events and b"site/a/layer_002" in events


@pytest.mark.parametrize("tail", ["", '{"step": 6, "lo', "garbage\n", "[1]\n", '{"loss": 1}\n', "\x00\x00"])
def test_rows_after_a_step_and_broken_lines_are_cut(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": s}) + "\n" for s in range(1, 6)) + tail)
    assert lines_cut(path, 3) == 2 + bool(tail)
    assert [row["step"] for row in rows(path)] == [1, 2, 3]
    assert lines_cut(path, 3) == 0 and [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert lines_cut(tmp_path / "none", 3) == 0


def test_a_resumed_writer_continues_after_the_step(tmp_path):
    with MetricsWriter(tmp_path) as metrics:
        for step in (1, 2, 3):
            metrics.write({"step": step, "loss": 1.0})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    with MetricsWriter(tmp_path, after_step=2) as metrics:
        metrics.write({"step": 3, "loss": 2.0})
    assert [(r["step"], r["loss"]) for r in rows(tmp_path / "metrics.jsonl")] == [(1, 1.0), (2, 1.0), (3, 2.0)]
    with MetricsWriter(tmp_path):
        pass
    assert len(rows(tmp_path / "metrics.jsonl")) == 3


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_quiet_in_a_file_and_redraws_on_a_terminal():
    for stream in (io.StringIO(), Terminal()):
        progress = Progress(25, log_every=10, stream=stream)
        for step in range(1, 26):
            progress.update(step, loss=1 / step, tokens=100)
        progress.note("saved")
        progress.close()
        text = stream.getvalue()
        assert text.endswith("saved\n") and "step 20/25  loss 0.0500  " in text and "tokens/s" in text
        lines = text.replace("\r", "\n").splitlines()
        assert sum("step" in line for line in lines) == (25 if stream.isatty() else 3)
        assert text.count("\n") == (1 if stream.isatty() else 4)


def test_durations():
    assert [duration(s) for s in (0.4, 42, 725, 11525)] == ["0:00", "0:42", "12:05", "3:12:05"]
