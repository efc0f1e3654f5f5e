"""Kills, full disks and damaged files: a fault is named, and a whole older step is found."""

import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from molora_jax.errors import InputError
from molora_jax.runs.checkpoints import Checkpoints, read_manifest

POINTS = ("snapshot", "written", "manifest", "read back", "renamed", "best", "deleting")


def tree(step, size=64):
    rng = np.random.default_rng(step)
    leaves = {f"leaf{i}": {"A": rng.standard_normal(size).astype(np.float32)} for i in range(4)}
    return {"adapters": leaves, "train": {"step": step}}


def save(checkpoints, *steps, size=64):
    for step in steps:
        checkpoints.save(step, tree(step, size), meta={"samples": step}, wait=True)


def is_whole(checkpoints, step, size=64):
    restored = checkpoints.restore(step, tree(step, size))
    for name, leaf in tree(step, size)["adapters"].items():
        np.testing.assert_array_equal(restored["adapters"][name]["A"], leaf["A"])
    assert restored["train"]["step"] == step


class Killed(BaseException):
    pass


class Fragile(Checkpoints):
    """Stops dead at a named point: what is on the disk stays, as after kill -9."""

    point = None

    def reached(self, point):
        if point == self.point:
            raise Killed

    def _failed(self, step, stage, error):
        assert isinstance(error, Killed)

    def _retain(self, saved):
        try:
            super()._retain(saved)
        except Killed:
            pass


@pytest.mark.parametrize("point", POINTS)
def test_a_stop_at_every_named_point_leaves_whole_steps(tmp_path, point):
    dying = Fragile(tmp_path, keep=1)
    save(dying, 1)
    dying.point = point
    try:
        dying.save(2, tree(2), meta={}, best=True, wait=True)
    except Killed:
        assert point == "snapshot"
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        step = checkpoints.newest_valid()
        assert step == (2 if point in ("renamed", "best", "deleting") else 1)
        is_whole(checkpoints, step)
        save(checkpoints, 3)
        assert checkpoints.failures == [] and checkpoints.newest_valid() == 3
        assert {p.name for p in tmp_path.iterdir()} <= {"3", "2", "best.json"}  # 2 if it is the best; no temporaries


def test_a_stop_while_a_step_is_replaced(tmp_path):
    save(Checkpoints(tmp_path, keep=1), 5)
    os.rename(tmp_path / "5", tmp_path / "old-5")
    assert Checkpoints(tmp_path, keep=1, writer=False).newest_valid() is None and (tmp_path / "old-5").exists()
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.newest_valid() == 5
        is_whole(checkpoints, 5)


CHILD = """
import os, sys
sys.path[:0] = {paths!r}
from tests.io.test_checkpoints_faults import Checkpoints, tree
class Told(Checkpoints):
    def reached(self, point):
        if point == "renamed":
            print("renamed", flush=True)
with Told(sys.argv[1], keep=2) as checkpoints:
    print("ready", flush=True)
    for step in range(1, 10_000):
        checkpoints.save(step, tree(step, 20_000), meta={{}}, best=step % 3 == 0)
"""


def kill_while_saving(folder, rng):
    root = pathlib.Path(__file__).parents[2]
    code = CHILD.format(paths=[str(root)])
    child = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True, cwd=root)
    assert child.stdout.readline() == "ready\n"
    seen = rng.randrange(1, 4)
    assert [child.stdout.readline() for _ in range(seen)] == ["renamed\n"] * seen  # a slow machine changes nothing
    time.sleep(0.05 * rng.random())  # any moment of the next save
    child.send_signal(signal.SIGKILL)
    committed = seen + child.stdout.read().count("renamed\n")
    assert child.wait() == -signal.SIGKILL
    child.stdout.close()
    with Checkpoints(folder, keep=2) as checkpoints:
        step = checkpoints.newest_valid()
        assert committed <= step <= committed + 1  # killed between the rename and its report
        is_whole(checkpoints, step, 20_000)
        save(checkpoints, step + 1)
        assert checkpoints.failures == [] and not list(folder.glob("saving-*"))


def test_kill_9_during_saves(tmp_path):
    kill_while_saving(tmp_path, random.Random(0))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(50))
def test_kill_9_at_random_moments(tmp_path, seed):
    kill_while_saving(tmp_path, random.Random(seed))


def mutate(folder, rng) -> str:
    """Damages one file; returns what was done, or "" where this changed nothing."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    path, kind = rng.choice(files), rng.choice(["flip", "truncate", "delete", "swap", "extend"])
    before = path.read_bytes()
    if kind == "delete":
        path.unlink()
    elif kind == "swap":
        other = rng.choice(files)
        content = other.read_bytes()
        if content == before:
            return ""
        path.write_bytes(content), other.write_bytes(before)
    elif kind == "extend":
        path.write_bytes(before + b"x")
    else:
        if not before:
            return ""
        at = rng.randrange(len(before))
        flipped = bytes([before[at] ^ (1 << rng.randrange(8))])
        path.write_bytes(before[:at] + flipped + before[at + 1 :] if kind == "flip" else before[:at])
    return f"{kind} {path.relative_to(folder)}"


def check_mutations(tmp_path, seeds):
    source = tmp_path / "source"
    save(Checkpoints(source, keep=2), 1, 2)
    for seed in seeds:
        folder = tmp_path / "copy"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(source, folder)
        done = mutate(folder / "2", random.Random(seed))
        warnings = []
        checkpoints = Checkpoints(folder, keep=2, warn=warnings.append)
        step = checkpoints.newest_valid()
        is_whole(checkpoints, step)
        if step == 2:  # only where nothing that matters has changed: white space in the manifest, say
            assert not done or done.endswith("manifest.json"), done
        else:
            assert step == 1 and "checkpoint 2 is skipped" in warnings[0], done
            name = done.split()[1]
            assert done.startswith("swap") or name in warnings[0] or pathlib.Path(name).name in warnings[0], warnings
            with pytest.raises(InputError):
                checkpoints.restore(2, tree(2))


def test_damage_is_found_by_name(tmp_path):
    check_mutations(tmp_path, range(40))


@pytest.mark.slow
def test_damage_is_found_by_name_200(tmp_path):
    check_mutations(tmp_path, range(1000, 1200))


def data_file(folder, leaf):
    (path,) = (p for p in (folder / "adapters" / leaf / "c").rglob("*") if p.is_file())
    return path


@pytest.mark.parametrize("damage", ["flip", "swap", "delete"])
def test_leaf_digests_find_what_the_list_of_files_would_miss(tmp_path, damage):
    """As if the files had been rewritten by a tool that also renewed their hashes."""
    checkpoints = Checkpoints(tmp_path, keep=1)
    save(checkpoints, 1)
    a, b = data_file(tmp_path / "1", "leaf1.A"), data_file(tmp_path / "1", "leaf2.A")
    raw = a.read_bytes()
    if damage == "flip":
        a.write_bytes(raw[:100] + bytes([raw[100] ^ 1]) + raw[101:])
    elif damage == "swap":
        a.write_bytes(b.read_bytes()), b.write_bytes(raw)
    else:
        a.unlink()
    assert 1 in checkpoints._verified  # so `restore` goes straight to the values
    with pytest.raises(InputError, match="adapters/leaf1[./]A"):
        checkpoints.restore(1, tree(1))


def test_nothing_valid_is_an_error_and_never_a_new_start(tmp_path):
    save(Checkpoints(tmp_path, keep=2), 1, 2)
    for step in (1, 2):
        data_file(tmp_path / str(step), "leaf0.A").unlink()
    with pytest.raises(InputError, match=r"step 2: adapters/leaf0\.A.* is missing; step 1: adapters"):
        Checkpoints(tmp_path, keep=2).newest_valid()


def test_retention_counts_valid_steps_only(tmp_path):
    save(Checkpoints(tmp_path, keep=3), 1, 2, 3)
    data_file(tmp_path / "3", "leaf0.A").write_bytes(b"")
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        save(checkpoints, 4)
        assert checkpoints.steps() == [2, 4]  # 3 would have been the second newest


def test_a_step_of_another_number_is_refused(tmp_path):
    save(Checkpoints(tmp_path, keep=1), 1)
    os.rename(tmp_path / "1", tmp_path / "9")
    assert Checkpoints(tmp_path, keep=1).valid(9) == (False, "its manifest is that of step 1")


def test_a_damaged_step_is_written_anew(tmp_path):
    save(Checkpoints(tmp_path, keep=2), 1, 2)
    data_file(tmp_path / "2", "leaf0.A").unlink()
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.newest_valid() == 1
        save(checkpoints, 2)
        assert checkpoints.newest_valid() == 2 and checkpoints.steps() == [1, 2]
        is_whole(checkpoints, 2)


def test_a_failed_save_is_known_and_older_steps_stay(tmp_path):
    """A limit on the size of files stands for a full disk: a read-only folder does not stop root."""
    warnings, big = [], 1 << 20
    checkpoints = Checkpoints(tmp_path, keep=1, warn=warnings.append)
    save(checkpoints, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
        for step in (2, 3):
            checkpoints.save(step, tree(step, big), meta={})
            assert [f.step for f in checkpoints.wait()] == list(range(2, step + 1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(warnings) == 2 and "checkpoint 3: save failed (2 failed saves so far)" in warnings[1]
    assert [p.name for p in tmp_path.iterdir()] == ["1"] and checkpoints.newest_valid() == 1
    save(checkpoints, 4, size=big)
    assert checkpoints.steps() == [4] and len(checkpoints.failures) == 2
    is_whole(checkpoints, 4, big)


def test_a_write_that_changes_the_values_is_a_failed_save(tmp_path):
    """The step is read back before it gets its name."""

    class Rotten(Checkpoints):
        def reached(self, point):
            if point == "written":
                path = data_file(self._staging(2), "leaf1.A")
                path.write_bytes(path.read_bytes()[::-1])

    save(Checkpoints(tmp_path, keep=1), 1)
    checkpoints = Rotten(tmp_path, keep=1)
    checkpoints.save(2, tree(2), meta={})
    assert "leaf1" in checkpoints.wait()[0].error and checkpoints.steps() == [1]


def test_manifest_states_what_the_run_was(tmp_path):
    save(Checkpoints(tmp_path, keep=1), 1)
    manifest = read_manifest(tmp_path / "1")
    assert manifest["packages"]["jax"].startswith("0.") and manifest["samples"] == 1
    with pytest.raises(ValueError, match="'tree'"):
        failing = Checkpoints(tmp_path, keep=1)
        failing.save(2, tree(2), meta={"tree": 1})
        raise ValueError(failing.wait()[0].error)
