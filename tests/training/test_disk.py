"""Disks that fail: the run says it once, keeps its newest valid step, and goes on where it can."""

import errno
import io
import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from molora_jax.errors import InputError
from molora_jax.io import disk, files
from molora_jax.runs import manifest, metrics_file
from molora_jax.runs import workdir as workdir_lib
from molora_jax.runs.checkpoints import Checkpoints
from molora_jax.runs.metrics import MetricsWriter, Progress
from molora_jax.runs.workdir import Workdir
from molora_jax.training import programs
from molora_jax.training.loop import train
from tests.tiny import tiny_config, write_task

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(disk, "WAITS", (0.0, 0.0, 0.0))


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    config = tiny_config("lora")
    task = write_task(tmp_path_factory.mktemp("task") / "task.jsonl", rows=40)
    with config.unlocked():
        config.data.update(tasks=f"jsonl:{task}", seq_len=64)
        config.train.update(steps=6, batch_size=8, save_every=2, keep=2, log_every=100)
        config.method.rules.all.adapter.rank = 2
    return config


def full(number=errno.ENOSPC):
    return OSError(number, os.strerror(number))


def failing(monkeypatch, where, name, when, error=None):
    """The function raises while `when(number of the call)`; returns the list of the calls that did."""
    function, failed, calls = getattr(where, name), [], []

    def wrapped(*args, **kwargs):
        calls.append(args)
        if when(len(calls)):
            failed.append(len(calls))
            raise error or full()
        return function(*args, **kwargs)

    monkeypatch.setattr(where, name, wrapped)
    return failed


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


slow = pytest.mark.slow


@pytest.mark.parametrize(
    "calls", [pytest.param((1, 2), id="first save"), pytest.param((2, 3), id="between", marks=slow),
              pytest.param((4, 5), id="last save", marks=slow)]
)  # fmt: skip
def test_a_disk_that_is_full_for_a_while_ends_nothing(config, tmp_path, monkeypatch, calls):
    failed, notes = failing(monkeypatch, manifest, "write", lambda n: n in calls), []
    assert train(config, str(tmp_path), note=notes.append).step == 6
    assert failed == list(calls)
    assert Checkpoints(tmp_path / "checkpoints", keep=2).newest_valid() == 6
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4, 5, 6]
    said = [note for note in notes if "save failed" in note]
    assert 1 <= len(said) <= 2 and "No space left on device" in said[0]
    assert not list(tmp_path.rglob("saving-*")) and not list(tmp_path.rglob(".*.tmp"))


@pytest.mark.parametrize("number", [errno.ENOSPC, *(pytest.param(n, marks=slow) for n in (errno.EFBIG, errno.EIO))])
def test_a_disk_that_stays_full_keeps_the_newest_step_and_is_an_error(config, tmp_path, monkeypatch, number):
    failing(monkeypatch, manifest, "write", lambda n: n > 2, full(number))
    notes = []
    with pytest.raises(InputError, match=f"checkpoint 6: got OSError: .*{os.strerror(number)}"):
        train(config, str(tmp_path), note=notes.append)
    assert Checkpoints(tmp_path / "checkpoints", keep=2).newest_valid() == 2
    assert len(rows(tmp_path)) == 6, "what was computed is not thrown away earlier than it must"
    assert not any("peak memory" in note for note in notes), "no table of success"
    monkeypatch.undo()
    assert train(config, str(tmp_path), note=notes.append).step == 6 and "resumed at step 2" in notes


def test_a_failed_save_is_tried_again_between_the_save_steps(config, tmp_path, monkeypatch):
    from molora_jax.training import loop

    monkeypatch.setattr(loop, "RETRY_SECONDS", 0.0)
    config = config.copy_and_resolve_references()
    config.train.update(steps=12, save_every=6)
    failing(monkeypatch, manifest, "write", lambda n: n == 2)
    saved, real = [], Checkpoints._publish
    monkeypatch.setattr(Checkpoints, "_publish", lambda self, step, *a: (saved.append(step), real(self, step, *a)))
    train(config, str(tmp_path), note=lambda text: None)
    assert saved[0] == 0 and 6 < saved[1] < 12 and saved[-1] == 12


def test_a_best_step_that_was_not_saved_is_not_the_one_to_beat(config, tmp_path, monkeypatch):
    config = config.copy_and_resolve_references()
    config.train.update(steps=3, eval_every=1, save_every=0)
    config.eval.num_items = 2
    from molora_jax.training import loop

    values = iter([1.0, 2.0, 3.0])
    monkeypatch.setattr(loop.TrainingRun, "valid_nll", lambda *_: next(values))
    failing(monkeypatch, manifest, "write", lambda n: n == 2)  # step 1, the best
    train(config, str(tmp_path), note=lambda text: None)
    assert Checkpoints(tmp_path / "checkpoints", keep=2).best() == 2


@pytest.mark.slow
def test_a_best_step_that_is_saved_at_last_is_the_best(config, tmp_path, monkeypatch):
    config = config.copy_and_resolve_references()
    config.train.update(steps=2, eval_every=1, save_every=0)
    config.eval.num_items = 2
    from molora_jax.training import loop

    values = iter([2.0, 1.0])
    monkeypatch.setattr(loop.TrainingRun, "valid_nll", lambda *_: next(values))
    failing(monkeypatch, manifest, "write", lambda n: n in (3, 4))  # step 2, the best and the last
    train(config, str(tmp_path), note=lambda text: None)
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    assert checkpoints.best() == 2
    best = checkpoints.restore(2, {"train": {"step": np.int32(0), "skipped": np.int32(0), "best": np.float64(0)}})
    assert best["train"]["best"] == 1.0


@pytest.mark.parametrize("how", ["full", "short"])
def test_metrics_wait_for_the_disk(tmp_path, monkeypatch, how):
    real, calls, said = os.write, [], []

    def write(handle, data):
        calls.append(data)
        if len(calls) in (2, 3, 4):
            if how == "short" and len(calls) != 3:
                return real(handle, data[:5])
            raise full()
        return real(handle, data)

    monkeypatch.setattr(metrics_file.os, "write", write)
    with MetricsWriter(tmp_path, warn=said.append) as metrics:
        for step in range(1, 6):
            metrics.write({"step": step, "loss": 0.5})
    monkeypatch.undo()
    assert rows(tmp_path) == [{"step": step, "loss": 0.5} for step in range(1, 6)]
    assert len(said) == 2 and "cannot be written (No space left" in said[0] and "nothing is lost" in said[1]


def test_metrics_and_tensorboard_that_cannot_be_written_never_end_a_run(config, tmp_path, monkeypatch):
    from tensorboardX import record_writer

    failing(monkeypatch, metrics_file.os, "write", lambda n: True)
    failing(monkeypatch, record_writer.RecordWriter, "write", lambda n: True)
    notes = []
    assert train(config, str(tmp_path), note=notes.append).step == 6
    assert sum("tensorboard cannot be written" in note for note in notes) == 1
    assert any("the last 6 rows could not be written" in note for note in notes)


def test_the_file_says_what_it_lost(tmp_path):
    path, said = tmp_path / "metrics.jsonl", []
    path.write_text("".join(json.dumps({"step": s}) + "\n" for s in (1, 2, 5, 6, 9)) + "garb\nage\n" + '{"step": 10')
    with MetricsWriter(tmp_path, after_step=8, warn=said.append) as metrics:
        metrics.write({"step": 9})
        metrics.write({"step": 10})
    assert said == ["metrics.jsonl: 1 rows after the restored step cut, 3 broken lines cut, no rows of steps 3-4,7-8"]
    assert rows(tmp_path)[-2:] == [{"step": 9, "lost": "3-4,7-8"}, {"step": 10}]
    with MetricsWriter(tmp_path, after_step=10, warn=said.append) as metrics:
        metrics.write({"step": 11})
    assert rows(tmp_path)[-1] == {"step": 11}, "once"


def test_a_resume_cuts_metrics_without_room_for_a_copy(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": s}) + "\n" for s in range(1, 6)))
    failing(monkeypatch, metrics_file.os, "replace", lambda n: True)
    assert metrics_file.cut(path, 3).cut == 2 and len(rows(tmp_path)) == 3


def test_a_start_waits_for_room_and_leaves_no_temporaries(tmp_path, monkeypatch):
    failed = failing(monkeypatch, files.os, "fsync", lambda n: n in (1, 2))
    with Workdir(tmp_path) as workdir:
        workdir.write_config({"a": 1})
    assert failed == [1, 2] and json.loads((tmp_path / "config.json").read_text()) == {"a": 1}
    failing(monkeypatch, files.os, "fsync", lambda n: True)
    with Workdir(tmp_path) as workdir, pytest.raises(OSError, match="No space left"):
        workdir.write_config({"a": 2})
    assert {p.name for p in tmp_path.iterdir()} == {"lock", "config.json"}


def test_a_killed_start_leaves_nothing_behind_for_long(tmp_path):
    for name in (".config.json.1.tmp", ".metrics.jsonl.tmp", ".identity.json.77.tmp"):
        (tmp_path / name).write_text("half")
    Workdir(tmp_path).close()
    assert {p.name for p in tmp_path.iterdir()} == {"lock"}


def test_a_lock_without_room_for_its_holder_holds(tmp_path, monkeypatch):
    failing(monkeypatch, workdir_lib.os, "pwrite", lambda n: True)
    with Workdir(tmp_path), pytest.raises(InputError, match="in use by another process"):
        Workdir(tmp_path)


@pytest.mark.parametrize("how", ["removed", *(pytest.param(h, marks=slow) for h in ("moved", "another in its place"))])
def test_a_workdir_that_goes_ends_the_run_with_an_error(config, tmp_path, how):
    folder, notes = tmp_path / "run", []
    programs._compiled_step.cache_clear()  # so that it says that it compiles

    def note(text):
        notes.append(text)
        if "compiling" in text:
            shutil.rmtree(folder, ignore_errors=True) if how == "removed" else os.rename(folder, tmp_path / "elsewhere")
            if how == "another in its place":
                folder.mkdir()

    with pytest.raises(InputError, match="workdir: got .*run, removed or moved"):
        train(config, str(folder), note=note)
    assert not any("peak memory" in text for text in notes)
    assert not folder.exists() or not list(folder.rglob("manifest.json"))


def test_a_disk_without_room_for_a_folder_does_not_hang(tmp_path, monkeypatch, capfd):
    """Orbax's writers would wait 300 s for the folder, and keep the process that long."""
    real = os.mkdir

    def mkdir(path, *args, **kwargs):
        if "orbax-checkpoint-tmp" in str(path):
            raise full()
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "mkdir", mkdir)
    said, before, began = [], set(threading.enumerate()), time.monotonic()
    checkpoints = Checkpoints(tmp_path, keep=1, warn=said.append)
    checkpoints.save(1, {"adapters": {"a": np.zeros(3)}, "train": {"step": 1}}, meta={}, wait=True)
    assert checkpoints.last_save_failed and checkpoints.failures[0].passing
    left = [t for t in set(threading.enumerate()) - before if not t.daemon and "ThreadPool" not in t.name]
    for thread in left:
        thread.join(timeout=20)
    assert time.monotonic() - began < 60 and not any(t.is_alive() for t in left), left
    monkeypatch.undo()
    checkpoints.save(2, {"adapters": {"a": np.zeros(3)}, "train": {"step": 2}}, meta={}, wait=True)
    assert checkpoints.newest_valid() == 2 and len(said) == 1
    assert "Traceback" not in "".join(capfd.readouterr())


def test_a_log_on_a_full_disk_does_not_end_the_run():
    class Full(io.StringIO):
        def write(self, text):
            raise full()

    progress = Progress(3, log_every=1, stream=Full())
    progress.update(1, loss=1.0, tokens=1)
    progress.note("text")
    progress.close()


@pytest.mark.slow
def test_files_that_may_not_grow(tmp_path):
    """RLIMIT_FSIZE for a process of its own: few lines, the reason among them, status 2, and no wait."""
    write_task(tmp_path / "task.jsonl", rows=40)
    command = [
        sys.executable, "-m", "launch.train", "--config=configs/lora.py", f"--workdir={tmp_path}/run",
        "--config.base.source=random:tiny", f"--config.data.tasks=jsonl:{tmp_path}/task.jsonl",
        "--config.data.seq_len=64", "--config.train.steps=4", "--config.method.rules.all.adapter.rank=64",
    ]  # fmt: skip
    limit = (40_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    began = time.monotonic()
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=280,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
        env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"MOLORA_CACHE": str(tmp_path / "cache")},
    )  # fmt: skip
    assert done.returncode == 2 and time.monotonic() - began < 250
    assert "File too large" in done.stderr.splitlines()[-1] and len(done.stderr.splitlines()) < 40, done.stderr
