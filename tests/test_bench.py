"""`launch.bench`: what it refuses before anything is compiled, and one pair measured."""

import importlib.util
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from launch import bench, bench_peers, flags
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
    (["--devices=0"], "--devices", ">= 1"),
    (["--devices=8"], "--batch", "a multiple of --devices=8"),
    (["--devices=2", "--generate"], "--devices", "1 with --generate"),
    (["--generate", "--no_update"], "--no_update", "with --generate"),
    (["--tree=/nowhere"], "--tree", "a checkout of molora_jax"),
    (["--against.train.steps=3"], "--against", "overrides alone"),
]


@pytest.mark.parametrize(("argv", "where", "text"), BAD, ids=[" ".join(argv) for argv, *_ in BAD])
def test_refused_before_a_side_starts(argv, where, text, monkeypatch):
    monkeypatch.setattr(bench, "Child", lambda *_: pytest.fail("a side was started"))
    with pytest.raises(InputError) as caught:
        bench.run([*TINY, *argv])
    assert caught.value.where == where and text in str(caught.value)


@pytest.mark.parametrize(("clock", "ratio", "tokens"), [("cpu", 4.0, 32 / 0.4), ("wall", 1.5, 32 / 3.0)])
def test_ratio_and_tokens_are_of_the_clock_of_the_device(clock, ratio, tokens):
    args = SimpleNamespace(generate=False, batch=2, seq=16, threads=1, dtype="float32")
    rows = [{"a": {"cpu": 0.4, "wall": 3.0}, "b": {"cpu": 0.1, "wall": 2.0}}] * 3
    start = dict(clock=clock, device="a card", compile=1.0, first=2.0, trainable=5)
    end = dict(peak_rss_mb=10.0, peak_device_mb=None if clock == "cpu" else 4321.0)
    result = bench.summary(rows, {"a": start, "b": start}, {"a": end, "b": end}, args)
    assert result["ratio"]["median"] == pytest.approx(ratio)
    assert result["a"]["tokens_per_cpu_second"] == pytest.approx(tokens)
    assert result["machine"]["clock"] == clock and result["machine"]["device"] == "a card"
    text = bench.table(result, args)
    assert text.startswith("CPU s" if clock == "cpu" else "wall s") and ("4321" in text) == (clock == "wall")


def test_two_sides_do_not_both_take_the_whole_device(monkeypatch):
    seen = []
    monkeypatch.setattr(bench.subprocess, "Popen", lambda *_, env, **__: seen.append(env))
    monkeypatch.setattr(bench.Child, "_send", lambda *_: None)
    for own in (None, "true"):
        monkeypatch.delenv("XLA_PYTHON_CLIENT_PREALLOCATE", raising=False)
        if own:
            monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", own)
        bench.Child({}, {"threads": 1})
    assert [env["XLA_PYTHON_CLIENT_PREALLOCATE"] for env in seen] == ["false", "true"]  # the user's own stays


@pytest.mark.slow
def test_another_checkout_is_the_second_side():
    size = ["--batch=2", "--seq=16", "--steps=2", "--json"]
    command = [sys.executable, "-m", "launch.bench", *TINY, f"--tree={flags.ROOT}", *size]
    done = subprocess.run(command, cwd=flags.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["a"]["trainable"] == result["b"]["trainable"] and "ratio" in result


@pytest.mark.slow
def test_a_pair_is_measured():
    against = f"--against={flags.ROOT / 'configs/lora.py'}"
    command = [sys.executable, "-m", "launch.bench", *TINY, against, "--batch=2", "--seq=16", "--steps=2", "--json"]
    done = subprocess.run(command, cwd=flags.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert set(result) == {"a", "b", "ratio", "machine"}
    for side in (result["a"], result["b"]):
        assert set(side) == {"cpu_seconds", "wall_seconds", "tokens_per_cpu_second", "peak_rss_mb", "peak_device_mb",
                             "compile_seconds", "first_step_seconds", "trainable"}  # fmt: skip
        for times in (side["cpu_seconds"], side["wall_seconds"]):
            assert 0 < times["min"] <= times["median"] <= times["max"]
        assert side["peak_device_mb"] is None
        assert all(side[name] > 0 for name in set(side) - {"cpu_seconds", "wall_seconds", "peak_device_mb"})
    assert result["a"]["trainable"] > result["b"]["trainable"]  # eight experts and their routers
    assert result["ratio"]["min"] <= result["ratio"]["median"] <= result["ratio"]["max"]
    assert {"batch": 2, "seq": 16, "threads": 1, "clock": "cpu"}.items() <= result["machine"].items()


PEERS = [
    (["--config=mixlora"], "--config", "overrides alone"),
    (["--steps=0"], "--steps", ">= 1"),
    (["--config.train.stepz=3"], "config.train.stepz", "unknown"),
    ([], "the extra peers", "no no_such_package"),
]


@pytest.mark.parametrize(("argv", "where", "text"), PEERS, ids=[" ".join(argv) for argv, *_ in PEERS])
def test_peers_are_refused_before_a_side_starts(argv, where, text, monkeypatch):
    monkeypatch.setattr(bench_peers, "measure", lambda *_: pytest.fail("a side was started"))
    monkeypatch.setattr(bench_peers, "PACKAGES", ("json", "no_such_package"))
    with pytest.raises(InputError) as caught:
        bench_peers.run(argv)
    assert where in str(caught.value) and text in str(caught.value)


def test_ratios_to_peers_are_formed_round_by_round():
    args = SimpleNamespace(batch=2, seq=16, threads=1, dtype="float32")
    seconds = [
        {"peft": 4.0, "peft kept": 3.0, "lora": 2.0, "mixlora": 2.5},
        {"peft": 6.0, "peft kept": 3.0, "lora": 1.0, "mixlora": 1.5},
    ]
    rows = [{name: {"cpu": value} for name, value in row.items()} for row in seconds]
    started = {name: {"trainable": 5, "loss": 1.5} for name in rows[0]} | {
        "peft": {"trainable": 5, "loss": 1.5, "versions": {"torch": "2"}}
    }
    result = bench_peers.summary(rows, started, {name: {"peak_rss_mb": 10.0} for name in rows[0]}, args)
    assert result["ratios"]["lora over peft"] == {
        "median": pytest.approx(1 / 3),
        "min": pytest.approx(1 / 6),
        "max": 0.5,
    }
    assert result["ratios"]["mixlora over lora"]["max"] == 1.5 and result["machine"]["torch"] == "2"
    text = bench_peers.table(result)
    assert "lora over peft: 0.333 (0.167 to 0.500)" in text and "peft kept  3.000, 3.000, 3.000" in text


@pytest.mark.slow
@pytest.mark.skipif(not all(map(importlib.util.find_spec, bench_peers.PACKAGES)), reason="needs the extra peers")
def test_peers_start_from_one_loss():
    command = [sys.executable, "-m", "launch.bench_peers", "--config.base.source=random:tiny", "--steps=1", "--json"]
    run = subprocess.run(command, cwd=flags.ROOT, capture_output=True, text=True, check=True)
    sides = json.loads(run.stdout)["sides"]
    assert sides["peft"]["loss"] == pytest.approx(sides["lora"]["loss"], abs=1e-4)
    assert sides["peft"]["trainable"] == sides["lora"]["trainable"]
