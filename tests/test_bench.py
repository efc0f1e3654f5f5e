"""`launch.bench`: what it refuses before anything is compiled, and one pair measured."""

import json
import os
import subprocess
import sys

import pytest

from launch import bench, flags
from molora_jax.errors import InputError

TINY = [f"--config={flags.ROOT / 'configs/mixlora.py'}", "--config.base.source=random:tiny"]
PROCESSORS = len(os.sched_getaffinity(0))
BAD = [
    (["--steps=0"], "--steps", ">= 1"),
    (["--batch=0"], "--batch", ">= 1"),
    (["--seq=0"], "--seq", ">= 1"),
    (["--threads=0"], "--threads", ">= 1"),
    (["--threads=-1"], "--threads", ">= 1"),
    ([f"--threads={PROCESSORS + 1}"], "--threads", f"<= {PROCESSORS}"),
    (["--generate", "--no_update"], "--no_update", "with --generate"),
    (["--against.train.steps=3"], "--against", "overrides alone"),
]


@pytest.mark.parametrize(("argv", "where", "text"), BAD, ids=[" ".join(argv) for argv, *_ in BAD])
def test_refused_before_a_side_starts(argv, where, text, monkeypatch):
    monkeypatch.setattr(bench, "Child", lambda *_: pytest.fail("a side was started"))
    with pytest.raises(InputError) as caught:
        bench.run([*TINY, *argv])
    assert caught.value.where == where and text in str(caught.value)


@pytest.mark.slow
def test_a_pair_is_measured():
    against = f"--against={flags.ROOT / 'configs/lora.py'}"
    command = [sys.executable, "-m", "launch.bench", *TINY, against, "--batch=2", "--seq=16", "--steps=2", "--json"]
    done = subprocess.run(command, cwd=flags.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert set(result) == {"a", "b", "ratio", "machine"}
    for side in (result["a"], result["b"]):
        assert set(side) == {"cpu_seconds", "wall_seconds", "tokens_per_cpu_second", "peak_rss_mb", "compile_seconds",
                             "first_step_seconds", "trainable"}  # fmt: skip
        for times in (side["cpu_seconds"], side["wall_seconds"]):
            assert 0 < times["min"] <= times["median"] <= times["max"]
        assert all(side[name] > 0 for name in set(side) - {"cpu_seconds", "wall_seconds"})
    assert result["a"]["trainable"] > result["b"]["trainable"]  # eight experts and their routers
    assert result["ratio"]["min"] <= result["ratio"]["median"] <= result["ratio"]["max"]
    assert {"batch": 2, "seq": 16, "threads": 1}.items() <= result["machine"].items()
