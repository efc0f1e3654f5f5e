"""The same program in two processes on loopback as in one: steps, a checkpoint, a resumed run."""

import contextlib
import json
import os
import pathlib
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from tests import tiny

ROOT = pathlib.Path(__file__).parents[2]


def launch(*arguments, processes=None, devices=4):
    env = dict(os.environ, PATH=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}", JAX_PLATFORMS="cpu")
    env["XLA_FLAGS"] = "" if processes else f"--xla_force_host_platform_device_count={devices}"
    head = [sys.executable] if not processes else [
        "bash", "launch/local.sh", f"--processes={processes}", f"--devices={devices // processes}"
    ]  # fmt: skip
    return subprocess.run([*head, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, timeout=1500)


def training(task, steps: int) -> list[str]:
    """The arguments of a run of MixLoRA on four random layers."""
    return [
        "-m", "launch.train", "--config=configs/mixlora.py", "--config.base.source=random:tiny",
        f"--config.data.tasks=jsonl:{task}", "--config.data.seq_len=64", f"--config.train.steps={steps}",
    ]  # fmt: skip


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("engine, sizes", [("all_to_all", ("expert=4",)), ("gather", ("data=2", "expert=2"))])
def test_two_processes_run_the_same_program(tmp_path, engine, sizes):
    task = tiny.write_task(tmp_path / "task.jsonl")
    common = [
        "-m", "launch.train", "--config=configs/mixlora.py", "--config.base.source=random:tiny",
        f"--config.data.tasks=jsonl:{task}", "--config.data.seq_len=64", "--config.train.steps=4",
        f"--config.engine={engine}", *(f"--config.mesh.{size}" for size in sizes), "--config.train.log_every=1",
    ]  # fmt: skip
    two, one = tmp_path / "two", tmp_path / "one"
    for stop in (2, 4):  # the second start resumes
        done = launch(*common, f"--workdir={two}", f"--config.train.stop_after={stop}", processes=2)
        assert done.returncode == 0, done.stdout + done.stderr
    done = launch(*common, f"--workdir={one}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(losses(two)) == 4
    np.testing.assert_allclose(losses(two), losses(one), rtol=2e-5)
    # a checkpoint of two processes goes on in one
    other = ["--config.train.stop_after=0", "--config.engine=replicate", "--config.mesh.data=-1"]
    done = launch(*common, f"--workdir={two}", *other, devices=8)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "processes, devices, sizes",
    [(2, 2, ("tensor=2",)), (4, 8, ("tensor=4",)), (4, 8, ("fsdp=2", "expert=4")), (4, 8, ("expert=8", "data=1"))],
    ids=str,
)
def test_any_mesh_over_any_number_of_processes(tmp_path, processes, devices, sizes):
    """`tensor` and `expert` across processes: batch rows and base weights follow the sharding, not the process."""
    task = tiny.write_task(tmp_path / "task.jsonl")
    common = [
        *training(task, 3), "--config.train.eval_every=3", "--config.eval.num_items=4", "--config.train.log_every=1",
        *(f"--config.mesh.{size}" for size in sizes),
    ]  # fmt: skip
    several, one = tmp_path / "several", tmp_path / "one"
    for folder, count in ((several, processes), (one, None)):
        done = launch(*common, f"--workdir={folder}", processes=count, devices=devices)
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"{count or 1} process" in done.stdout + done.stderr, "the first line says how many"
    np.testing.assert_allclose(losses(several), losses(one), rtol=1e-6)


@pytest.mark.slow
def test_data_over_slices_and_a_restore_on_another_number_of_them(tmp_path):
    """Processes stand for slices: two of two devices equal one of four, and goes on as that, and back."""
    task = tiny.write_task(tmp_path / "task.jsonl")
    common = [
        *training(task, 6), "--config.train.eval_every=0", "--config.train.save_every=2", "--config.mesh.fsdp=2",
    ]  # fmt: skip
    one, two = tmp_path / "one", tmp_path / "two"
    stops = lambda step: f"--config.train.stop_after={step}"  # noqa: E731
    slices = dict(processes=2, devices=4)
    runs = [((), one, dict(processes=None, devices=4)), (("--config.mesh.dcn=2", stops(2)), two, slices)]
    runs += [((stops(4),), two, dict(processes=None, devices=4)), (("--config.mesh.dcn=2",), two, slices)]
    for arguments, folder, machines in runs:
        done = launch(*common, *arguments, f"--workdir={folder}", **machines)
        assert done.returncode == 0, done.stdout + done.stderr
    np.testing.assert_allclose(losses(two), losses(one), rtol=1e-5)
    done = launch(*common, "--config.mesh.dcn=2", f"--workdir={tmp_path / 'no'}", processes=None, devices=4)
    assert done.returncode and "mesh.dcn: got 2 for 1 slices" in done.stderr


@contextlib.contextmanager
def two_by_hand(folder, *arguments):
    """Two processes of folder/run, which has made steps; each started by hand: nobody ends the one that is left."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    env = dict(os.environ, JAX_PLATFORMS="cpu", XLA_FLAGS="")
    env |= dict(MOLORA_COORDINATOR=f"localhost:{port}", MOLORA_PROCESSES="2")
    command = [
        sys.executable, "-m", "launch.train", f"--workdir={folder / 'run'}", "--config=configs/lora.py",
        "--config.base.source=random:tiny", f"--config.data.tasks=jsonl:{tiny.write_task(folder / 'task.jsonl')}",
        "--config.data.seq_len=32", "--config.train.steps=1000000", *arguments,
    ]  # fmt: skip
    processes = [
        subprocess.Popen(command, cwd=ROOT, env=env | {"MOLORA_PROCESS": str(i)}, stderr=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    metrics = folder / "run/metrics.jsonl"
    try:
        while not (metrics.exists() and len(metrics.read_text().splitlines()) > 3):
            assert all(process.poll() is None for process in processes), [p.communicate() for p in processes]
            time.sleep(0.2)
        yield processes
    finally:
        for process in processes:
            process.kill()


@pytest.mark.slow
def test_a_preemption_of_one_process_stops_all_at_the_same_step(tmp_path):
    """SIGTERM to process 1 alone: both save the same step and end with 143; the next start goes on."""
    with two_by_hand(tmp_path, "--config.train.save_every=1000000") as processes:
        processes[1].terminate()
        ends = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [143, 143], ends
    steps = [int(path.name) for path in (tmp_path / "run/checkpoints").iterdir() if path.name.isdigit()]
    assert max(steps) == len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) > 3


LABELLED = ({"text": f"number {i}", "label": "odd" if i % 2 else "even"} for i in range(80))
PAIRS = ({"prompt": f"Double {i}", "chosen": str(2 * i), "rejected": str(2 * i + 1)} for i in range(80))
OBJECTIVES = {
    "classify": ("minilm_classify", "random:tiny-bert", LABELLED),
    "preference": ("preference", "random:tiny", PAIRS),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_of_two_processes_has_the_losses_of_one(tmp_path, name):
    """Classes and pairs (which no process tears) on eight devices, held-out numbers too; resumed by two, by one."""
    config, base, rows = OBJECTIVES[name]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = [
        "-m", "launch.train", f"--config=configs/{config}.py", f"--config.base.source={base}",
        f"--config.data.tasks=jsonl:{tmp_path / 'rows.jsonl'}", "--config.data.test_share=0.2",
        "--config.train.steps=4", "--config.train.batch_size=16", "--config.train.eval_every=2",
        "--config.eval.num_items=8", "--config.train.log_every=1",
    ]  # fmt: skip
    two, one = tmp_path / "two", tmp_path / "one"
    for stop in (2, 3):
        done = launch(*common, f"--workdir={two}", f"--config.train.stop_after={stop}", processes=2, devices=8)
        assert done.returncode == 0, done.stdout + done.stderr
    for folder in (two, one):
        done = launch(*common, f"--workdir={folder}", devices=8)
        assert done.returncode == 0, done.stdout + done.stderr
    found, wanted = (
        [json.loads(line) for line in (at / "metrics.jsonl").read_text().splitlines()] for at in (two, one)
    )
    assert len(found) == len(wanted) == 4
    for key in ("loss", "accuracy", "valid_nll"):
        values = [[row[key] for row in rows if key in row] for rows in (found, wanted)]
        assert len(values[1]) == (2 if key == "valid_nll" else 4)
        np.testing.assert_allclose(*values, rtol=2e-5, err_msg=key)


def test_local_says_what_its_processes_say_and_nothing_else():
    """Processes that end one after the other; the first that fails gives the status and ends the others."""
    code = (
        "import os, time; p = int(os.environ['MOLORA_PROCESS']); time.sleep({sleep}); print('hello', flush=True);"
        " os._exit({status})"
    )
    for sleep, status, code_of in (("0.2 * p", "0", 0), ("0.2 * p", "5 * (p == 2)", 5), ("600 * (p != 1)", "7", 7)):
        words = [code.format(sleep=sleep, status=status)]
        done = launch("-c", *words, processes=3, devices=3)
        assert done.returncode == code_of
        assert done.stdout in ("hello\n", "") and set(done.stderr.splitlines()) <= {"[1] hello", "[2] hello"}


@pytest.mark.slow
def test_a_dead_peer_is_an_error_within_a_minute(tmp_path):
    with two_by_hand(tmp_path) as processes:
        processes[1].kill()
        _, said = processes[0].communicate(timeout=300)
    assert processes[0].returncode == 1 and "error: processes" in said and "Traceback" not in said, said


def test_bad_arguments():
    for arguments in (["--processes=0", "-m", "x"], ["--processes=2"], ["--nodes=2", "-m", "x"]):
        done = subprocess.run(["bash", "launch/local.sh", *arguments], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2 and "expected" in done.stderr
