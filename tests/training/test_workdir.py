"""One writer, one identity."""

import json
import os
import signal
import subprocess
import sys

import pytest

from configs import common
from molora_jax.errors import InputError
from molora_jax.runs.workdir import Workdir, differences, identity

EXTRA = {"base_digest": "b0", "data_fingerprint": "d0"}


def config(**changes):
    """`config(train__steps=3)`: the defaults with some fields changed."""
    value = json.loads(common.get_config().to_json())
    value["method"]["rules"] = {"all": {"sites": "q,v", "experts": "4", "adapter": {"name": "lora", "rank": 8}}}
    for name, new in changes.items():
        *parents, last = name.split("__")
        node = value
        for parent in parents:
            node = node[parent]
        node[last] = new
    return value


def test_a_second_writer_is_refused_by_name(tmp_path):
    with Workdir(tmp_path / "run"):
        with pytest.raises(InputError, match=f"in use by process {os.getpid()} on "):
            Workdir(tmp_path / "run")
        Workdir(tmp_path / "run", writer=False).close()
    Workdir(tmp_path / "run").close()


HOLDER = """
import os, sys, time
sys.path.insert(0, {root!r})
from molora_jax.runs.workdir import Workdir
workdir = Workdir(sys.argv[1])
if os.fork() == 0:
    print("worker", os.getpid(), flush=True)
    time.sleep(600)
time.sleep(600)
"""


def test_the_lock_of_a_killed_process_is_free_even_if_its_worker_lives_on(tmp_path):
    code = HOLDER.format(root=os.getcwd())
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    worker = int(child.stdout.readline().split()[1])
    try:
        with pytest.raises(InputError, match=f"in use by process {child.pid} on "):
            Workdir(tmp_path)
        child.kill()
        child.wait()
        with Workdir(tmp_path):
            assert f"process {os.getpid()}" in (tmp_path / "lock").read_text()
    finally:
        os.kill(worker, signal.SIGKILL)
        child.stdout.close()


def test_a_file_in_its_place_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for path in ("file", "file/run"):
        with pytest.raises(InputError, match="a file"):
            Workdir(tmp_path / path)


def test_config_is_written_whole(tmp_path):
    with Workdir(tmp_path) as workdir:
        workdir.write_config(config())
        workdir.write_config(config(seed=3))
        assert json.loads((tmp_path / "config.json").read_text()) == config(seed=3)
        assert os.fspath(workdir) == str(tmp_path)


RUNTIME = ["engine", "mesh__data", "train__remat", "train__log_every", "train__save_every", "train__eval_every"]
RUNTIME += ["train__keep", "train__stop_after", "eval__items", "base__source", "data__tasks"]


@pytest.mark.parametrize("field", RUNTIME)
def test_runtime_fields_may_change(tmp_path, field):
    with Workdir(tmp_path) as workdir:
        first = workdir.check_identity(config(), EXTRA)
        assert workdir.check_identity(config(**{field: "changed"}), EXTRA) == first


IDENTITY = ["seed", "base__dtype", "data__seq_len", "data__temperature", "losses", "optim__learning_rate"]
IDENTITY += ["method__rules__all__experts", "method__rules__all__adapter__rank", "schedule__s00__tasks"]
IDENTITY += ["train__batch_size", "train__accumulate", "train__clip", "train__init_from", "train__steps"]


@pytest.fixture
def saved(tmp_path):
    """A run's folder that holds something: only then does it belong to an identity."""
    for folder in (tmp_path, tmp_path / "cosine"):
        (folder / "checkpoints" / "0").mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize("field", IDENTITY)
def test_another_identity_is_refused_by_field(saved, field):
    with Workdir(saved) as workdir:
        workdir.check_identity(config(), EXTRA)
        with pytest.raises(InputError) as caught:
            workdir.check_identity(config(**{field: "changed"}), EXTRA)
        assert f"{field.replace('__', '.')}: was " in str(caught.value) and 'now "changed"' in str(caught.value)
        workdir.check_identity(config(), EXTRA)


def test_a_start_that_saved_nothing_claims_nothing(tmp_path):
    with Workdir(tmp_path) as workdir:
        workdir.check_identity(config(train__init_from="wrong"), EXTRA)
        right = workdir.check_identity(config(), EXTRA)
        (tmp_path / "checkpoints" / "0").mkdir(parents=True)
        assert workdir.check_identity(config(), EXTRA) == right


def test_content_is_part_of_the_identity_and_every_difference_is_listed(saved):
    with Workdir(saved) as workdir:
        workdir.check_identity(config(), EXTRA)
        with pytest.raises(InputError) as caught:
            workdir.check_identity(config(seed=1), {"base_digest": "b1", "data_fingerprint": "d1"})
    lines = str(caught.value).splitlines()[1:4]
    assert lines == [
        '  base.digest: was "b0", now "b1"',
        '  data.fingerprint: was "d0", now "d1"',
        "  seed: was 0, now 1",
    ]


def test_steps_may_change_where_the_schedule_does_not_depend_on_them(saved):
    with Workdir(saved) as workdir:
        workdir.check_identity(config(optim__decay="constant"), EXTRA)
        workdir.check_identity(config(optim__decay="constant", train__steps=999), EXTRA)
    with Workdir(saved / "cosine") as workdir:
        workdir.check_identity(config(), EXTRA)
        with pytest.raises(InputError, match=r"train\.steps: was 200, now 999 \(the learning rate depends on it"):
            workdir.check_identity(config(train__steps=999), EXTRA)


def test_types_and_absent_fields_are_differences():
    assert differences({"a": {"b": 1}}, {"a": {"b": True, "c": None}}) == [
        "a.b: was 1, now true",
        "a.c: was absent, now null",
    ]
    assert differences(identity(config(), EXTRA), identity(config(), EXTRA)) == []
