"""Configs whose method bends a contract start, train and go on by the real loop, on the tiny base."""

import json

import numpy as np
import pytest

import molora_jax as mj
from launch import flags
from molora_jax import config as schema
from molora_jax.training.loop import train
from tests.tiny import write_task

QUICK = ("x_lora", "smora")  # stages, and a state of the router: the others' starts are asked with --all
NAMES = ("mos", "coe", "x_lora", "dynmole", "smora", "loramoe", "rmoe", "llava_mole")
NAMES += (
    "lora_pro",
    "allora",
    "dylora",
    "adalora",
    "lora_fa",
    "vera",
    "ia3",
    "nola",
    "randlora",
    "lora_xs",
    "lora_sb",
    "lora_ga",
    "meteora",
    "mora_cl",
)
SCHEDULED = ("adalora", "dylora", "lora_pro")  # a budget, a rank that is drawn, moments in a form of their own


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


@pytest.mark.slow
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("name", SCHEDULED)
def test_a_schedule_goes_on_bit_by_bit(name, exact, tmp_path):
    """Six steps at once, and six of which a stop came after the third; with several experts."""
    config = flags.load(flags.ROOT / "configs" / f"{name}.py")
    config.base.source = "random:tiny"
    config.method.rules.all.update(sites="q,down", experts="3", router=dict(name="softmax_topk", k=2))
    config.data.update(tasks=f"jsonl:{write_task(tmp_path / 'task.jsonl', rows=40)}", seq_len=96)
    config.train.update(steps=6, batch_size=8, save_every=3, exact=exact)
    schema.validate(config)
    quiet = dict(note=lambda text: None)
    train(config, str(tmp_path / "whole"), **quiet)
    config.train.stop_after = 3
    train(config, str(tmp_path / "parts"), **quiet)
    config.train.stop_after = 0
    train(config, str(tmp_path / "parts"), **quiet)
    whole, parts = (mj.load_run(tmp_path / folder).view() for folder in ("whole", "parts"))
    for key, leaf in whole.items():
        np.testing.assert_array_equal(parts[key], leaf, err_msg=str(key))
    row = json.loads((tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()[-1])
    if name == "adalora":
        assert 0 < row["aux/orthogonal"] < 10
        lam = np.stack([x for key, x in whole.items() if key.leaf == "lam"])
        assert np.count_nonzero(lam) == lam.size * 8 // 12
