"""Small things that several tests share: a tiny model with random factors, a jsonl task, a run of three steps."""

import fcntl
import functools
import json
import os
import shutil

import jax
import numpy as np

from configs import common
from launch import flags
from molora_jax import config as config_lib
from molora_jax.backbones import hf_config
from molora_jax.backbones.compile import compile_model
from molora_jax.io import huggingface, random_init
from molora_jax.io.base import load_base
from molora_jax.io.tokenizer import byte_tokenizer

METHODS = {
    "lora": {},
    "mixlora": {},
    "dynamic_moe": {},
    "mola": {},
    "dora": dict(all=common.rule("q,v,down", adapter=common.adapter("dora"), experts="4",
                                 router=dict(name="softmax_topk", k=2, share="site"))),
    "model": dict(all=common.rule("q,up", adapter=common.adapter(), experts="4",
                                  router=dict(name="top_p", p=0.5, share="model"))),
}  # fmt: skip


def tiny_config(method: str):
    """A method's config on the tiny base: a file of configs/, or one of the rules above."""
    rules = METHODS[method]
    config = common.get_config() if rules else flags.load(flags.ROOT / "configs" / f"{method}.py")
    if rules:
        config.method.rules = rules
    config.base.source = "random:tiny"
    config_lib.validate(config)
    return config


@functools.cache
def tiny_model(method: str):
    """`(model, params, adapters, router_state)` with every leaf random, so that no expert is silent."""
    config = tiny_config("lora" if method == "base" else method)
    base = load_base("random:tiny")
    model = compile_model(config, base.config)
    model = model.without_rules() if method == "base" else model
    adapters = jax.jit(lambda p: model.init_adapters(jax.random.key(1), p))(base.params)
    leaves, tree = jax.tree.flatten(adapters)
    rng = np.random.default_rng(0)
    leaves = [np.asarray(x) + 0.1 * rng.standard_normal(x.shape).astype(np.float32) for x in leaves]
    return model, base.params, jax.tree.unflatten(tree, leaves), model.init_router_state()


def write_task(path, rows: int = 120):
    """A jsonl file of two small tasks."""
    lines = []
    for i in range(rows):
        lines.append({"prompt": f"Double {i}", "target": str(2 * i), "task": "double"})
        lines.append({"prompt": f"Is {i} even?", "target": "no" if i % 2 else "yes", "task": "even"})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def copy_of_tiny_run(tmp_path_factory, folder):
    """`folder/run`, a copy of the run of `train_tiny`, which is trained once for all workers of this session."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base  # a worker's own folder is inside
    with (shared / "tiny.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (shared / "tiny" / "done").exists():
            shutil.rmtree(shared / "tiny", ignore_errors=True)
            (shared / "tiny").mkdir()
            train_tiny(shared / "tiny")
            (shared / "tiny" / "done").touch()
    return shutil.copytree(shared / "tiny" / "run", folder / "run")


def train_tiny(folder, method: str = "mixlora", steps: int = 3):
    """A run of a few steps in `folder/run`; its data are in `folder/task.jsonl`."""
    from molora_jax.training.loop import train

    config = tiny_config(method)
    task = write_task(folder / "task.jsonl")
    with config.unlocked():
        if method == "mixlora":
            # every program of the tests on this run has every site and every dropout
            config.method.rules.attn.sites = "q,v"
            config.method.rules.attn.adapter.dropout = config.method.rules.ffn.adapter.dropout = 0.0
        config.data.update(tasks=f"jsonl:{task}", seq_len=96)
        config.train.update(steps=steps, batch_size=8, save_every=2)
        config.eval.update(num_items=8, num_generated=4, max_new_tokens=8, batch_size=8)
    train(config, str(folder / "run"), note=lambda text: None)
    return folder / "run"


def write_family(told: dict, folder):
    """A Hugging Face folder of random weights with the byte tokenizer, of a `config.json`'s content."""
    told = told | {"vocab_size": 320}
    backbone = hf_config.from_hf(told, where="config.json")
    sources = huggingface.sources_of(backbone, random_init.random_params(backbone)[0])
    folder.mkdir(parents=True)
    huggingface.write_folder(folder, told, sources, byte_tokenizer(), np.float32)
    return folder
