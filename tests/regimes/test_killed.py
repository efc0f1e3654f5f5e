"""kill -9 in the middle of a round, and of a task: the same command goes on to the same bits."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest

from molora_jax.runs.checkpoints import Checkpoints
from tests.regimes.small import digests, rows, write

ROOT = pathlib.Path(__file__).parents[2]
CASES = {
    "federated": ["--config=configs/ffa_lora.py", "--config.regime.local_steps=5", "--config.regime.split=iid",
                  "--config.regime.dp_noise=0.8"],
    "continual": ["--config=configs/ewc_lora.py", '--config.objective.name=classify', "--config.regime.replay=5",
                  "--config.regime.fisher_rows=6"],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path, name):
    fields = [
        *CASES[name], "--config.base.source=random:tiny", f"--config.data.tasks={write(tmp_path)}",
        "--config.data.seq_len=16", "--config.data.test_share=0.2", "--config.train.steps=90",
        "--config.train.batch_size=4", "--config.train.save_every=4", "--config.train.eval_every=0",
        "--config.train.keep=99", "--config.train.log_every=1", "--config.eval.num_items=4",
    ]  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"PYTHONPATH": str(ROOT)}
    command = lambda folder: [sys.executable, "-m", "launch.train", *fields, f"--workdir={folder}"]  # noqa: E731
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    subprocess.run(command(whole), cwd=ROOT, check=True, env=environment, capture_output=True)
    seen = []
    for moment in (35, 65):  # saves are made in the background: the newest is one of some steps before
        child = subprocess.Popen(command(broken), cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        for line in child.stderr:
            step = int(line.split()[1].split("/")[0]) if line.startswith("step ") else 0
            if step >= moment:
                child.send_signal(signal.SIGKILL)
                break
        child.stderr.read()
        assert child.wait(timeout=600) == -9
        seen.append(Checkpoints(broken / "checkpoints", keep=99).newest_valid())
    assert 4 <= seen[0] < 90 and seen[1] > seen[0] and any(step % (15 if name == "federated" else 30) for step in seen)
    subprocess.run(command(broken), cwd=ROOT, check=True, env=environment, capture_output=True)
    assert rows(broken) == rows(whole)
    for step in Checkpoints(whole / "checkpoints", keep=99).steps():
        assert digests(broken, step) == digests(whole, step), step
