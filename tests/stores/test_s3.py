"""Runs on S3, as moto serves it: real processes, killed with SIGKILL; several of them; readers."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

from molora_jax import stores
from molora_jax.evaluation.run import load_run
from molora_jax.runs import remote
from molora_jax.runs.verify import verify
from tests.training.test_loop import leaves, rows

pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).parents[2]
SEEN = os.pathsep.join([str(ROOT), *filter(None, sys.path)])  # what a process that is started can import
SMALL = [
    "--config=mixlora", "--config.base.source=random:tiny", "--config.data.tasks=math", "--config.data.seq_len=64",
    "--config.train.batch_size=4", "--config.train.eval_every=0", "--config.train.keep=2", "--config.train.steps=8",
]  # fmt: skip


@pytest.fixture(scope="module")
def s3():
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    port = server.get_host_and_port()[1]
    more = dict(
        AWS_ENDPOINT_URL=f"http://127.0.0.1:{port}", AWS_ACCESS_KEY_ID="test", AWS_SECRET_ACCESS_KEY="test",
        AWS_DEFAULT_REGION="us-east-1",
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, value in more.items():
            patch.setenv(name, value)
        import s3fs

        s3fs.S3FileSystem().mkdir("bucket")
        yield more
    server.stop()


def start(workdir, cache, *arguments, processes=1, devices=1):
    """The processes of one launch.train."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = os.environ | dict(
        MOLORA_CACHE=str(cache), PYTHONPATH=SEEN, MOLORA_KEEP_MEMORY="0",
        XLA_FLAGS=f"--xla_force_host_platform_device_count={devices}",
    )  # fmt: skip
    command = [sys.executable, "-m", "launch.train", *SMALL, f"--workdir={workdir}", *arguments]
    several = lambda i: dict(  # noqa: E731
        MOLORA_COORDINATOR=f"127.0.0.1:{port}", MOLORA_PROCESSES=str(processes), MOLORA_PROCESS=str(i)
    )
    return [
        subprocess.Popen(
            command, env=env | (several(i) if processes > 1 else {}), cwd=cache.parent, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for i in range(processes)
    ]  # fmt: skip


def ended(processes):
    said = [process.communicate(timeout=560)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(said)
    return said[0]


def test_a_killed_run_goes_on_with_the_same_bits_on_another_machine(s3, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "LEASE", 3.0)
    url, disk = "s3://bucket/runs/killed", tmp_path / "disk"
    ended(start(disk, tmp_path / "cache", "--config.train.save_every=2"))
    (process,) = start(url, tmp_path / "machine-a", "--config.train.save_every=2")
    store = stores.Store(url)
    deadline = time.monotonic() + 500
    while not store.info("checkpoints/4/manifest.json"):
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not verify(remote.at_hand(url))["problems"]
    (again,) = start(url, tmp_path / "machine-b", "--config.train.save_every=2")  # waits for the lease to be over
    said = ended([again])
    assert "was in use by process" in said and "resumed at step" in said
    here = remote.at_hand(url)
    assert leaves(here, 8) == leaves(disk, 8) and rows(here) == rows(disk)
    assert verify(here, deep=True)["ok"] and load_run(f"{url}@8").generate("1 + 1 =", max_new_tokens=2) is not None
    assert not list(pathlib.Path(tmp_path).glob("s3:*"))


def test_two_processes_with_a_folder_each_equal_one(s3, tmp_path):
    """Also restored by another number of processes."""
    url, disk = "s3://bucket/runs/two", tmp_path / "disk"
    mesh = ["--config.mesh.fsdp=2", "--config.mesh.data=1", "--config.train.save_every=4"]
    ended(start(disk, tmp_path / "cache", *mesh, devices=2))
    ended(start(url, tmp_path / "cache", *mesh, "--config.train.stop_after=4", processes=2))
    said = ended(start(url, tmp_path / "cache-b", *mesh, devices=2))
    assert "resumed at step 4" in said
    ended(start(url + "-b", tmp_path / "cache", *mesh, processes=2))
    for one in (url, url + "-b"):
        found = verify(remote.at_hand(one), deep=True)
        assert found["ok"] and found["newest_valid"] == 8
        losses = [row["loss"] for row in rows(remote.at_hand(one))]
        assert losses == pytest.approx([row["loss"] for row in rows(disk)], abs=1e-5)
    assert not list((tmp_path / "cache/stores").glob("run-*")), "copies of the other processes are left"


def test_evaluate_and_verify_open_a_url(s3, tmp_path):
    url = "s3://bucket/runs/killed"
    env = os.environ | dict(MOLORA_CACHE=str(tmp_path), PYTHONPATH=SEEN)
    for arguments in (
        ["verify", "--json"],
        ["evaluate", "--config.eval.num_items=2"],
        ["generate", "--prompt=1 + 1 ="],
    ):
        command = [sys.executable, "-m", f"launch.{arguments[0]}", f"--workdir={url}", *arguments[1:]]
        done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr
    assert json.loads(stores.Store(url).read("report/report.json"))["step"]
