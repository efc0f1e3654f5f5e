"""Configs whose method bends a contract start, train and go on by the real loop, on the tiny base."""

import json

import numpy as np
import pytest

from launch import flags
from molora_jax import config as schema
from molora_jax.training.loop import train
from tests.tiny import write_task

QUICK = ("x_lora", "smora")  # stages, and a state of the router: the others' starts are asked with --all
NAMES = ("mos", "coe", "x_lora", "dynmole", "smora", "loramoe", "rmoe", "llava_mole", "lora_pro", "allora", "dylora")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in NAMES])
def test_config_starts_on_the_tiny_base_and_goes_on(name, tmp_path):
    config = flags.load(flags.ROOT / "configs" / f"{name}.py")
    config.base.source = "random:tiny"
    config.data.update(tasks=f"jsonl:{write_task(tmp_path / 'task.jsonl', rows=40)}", seq_len=96)
    if "localized_balance" in config.losses:
        config.losses.localized_balance.world = config.data.tasks
    config.train.update(steps=2, batch_size=8, save_every=1, stop_after=1)
    schema.validate(config)
    train(config, str(tmp_path / "run"), note=lambda text: None)
    config.train.stop_after = 0
    done = train(config, str(tmp_path / "run"), note=lambda text: None)  # of x_lora: the second stage
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert done.step == 2 and len(losses) == 2 and np.isfinite(losses).all()
