"""Runs of tiny models with random leaves, written without any training."""

import jax
import numpy as np

from configs import common
from molora_jax.io.base import load_base
from molora_jax.io.base_facts import base_facts
from molora_jax.runs import written
from tests.tiny import write_task


def lora_rules(rank=4, alpha=8.0, sites="q,v,down", name="lora", **more):
    return dict(all=common.rule(sites, adapter=common.adapter(name, rank=rank, alpha=alpha, dropout=0.0, **more)))


def new_run(folder, rules, *, seed=0, source="random:tiny", modules=None, scale=0.1, **groups):
    """A run at step 0 in `folder`; every float leaf is random."""
    config = common.get_config()
    config.method.rules = rules
    config.base.source = source
    task = folder.parent / "task.jsonl"
    if not task.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        write_task(task)
    config.data.update(tasks=f"jsonl:{task}", seq_len=96)
    config.eval.update(num_items=4, num_generated=0, batch_size=8)
    for group, values in groups.items():
        config[group].update(values)
    base, rng = load_base(source), np.random.default_rng(seed)
    fresh = written.shapes_of(config, base.config, classes=0)

    def draw(leaf):
        if not np.issubdtype(leaf.dtype, np.floating):
            return np.zeros(leaf.shape, leaf.dtype)
        return np.float32(scale * rng.standard_normal(leaf.shape))

    items = jax.tree.map(draw, fresh) | ({"modules": modules(base.params)} if modules else {})
    facts = {"base_digest": base.digest, "data_fingerprint": f"data of {seed}", "base": base_facts(base)}
    return written.write(folder, config=config, items=items, facts=facts, backbone=base.config)


def config_of(name, *inputs, **options):
    config = common.surgery(name, **options)
    config.surgery.inputs = tuple(map(str, inputs))
    return config
