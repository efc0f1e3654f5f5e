"""A decoder of 5.6 million parameters, trained whole by the trainer that trains everything else.

`train_base="all"` on a base of random values, rows of plain text, the held-out documents as `data.valid`; the base with
the trained copies in its leaves' places is then written in bfloat16.
"""

import contextlib
import dataclasses
import os
import pathlib

import jax
import ml_dtypes
import numpy as np

from configs import common
from experiments.sandbox import text
from molora_jax import config as schema
from molora_jax.backbones.llama import Llama
from molora_jax.evaluation.run import load_run
from molora_jax.io import base as bases
from molora_jax.io import huggingface, random_init
from molora_jax.io.parts import scratch, whole_folder
from molora_jax.training.loop import train

SHAPE = Llama(
    family="llama", layers=6, width=256, ffn_width=640, heads=4, kv_heads=4, head_dim=64, vocab=text.VOCABULARY,
    context=512, rope_base=10000.0, norm_eps=1e-5, tied=True,
)  # fmt: skip
WARMUP = 100  # steps; a steady run may go on to any number of them


def start(folder: pathlib.Path, tokenizer, seed: int = 0) -> pathlib.Path:
    """A base of random values as a folder, made once."""
    if (folder / "config.json").is_file():
        return folder
    shape = dataclasses.replace(SHAPE, vocab=tokenizer.vocab_size)
    params, digest = random_init.random_params(shape, seed=seed)
    with whole_folder(folder) as part:
        huggingface.write_base(part, bases.Base(shape, params, tokenizer, digest, "random"))
    return folder


def config(base, entries: dict, *, steps: int, rows: int, rate: float, decay: str, init_from="", save_every: int = 200):
    """A run that trains every parameter of `base` on the rows of `text.write_rows`."""
    made = common.get_config()
    made.base.source = f"dir:{base}"
    made.data.update(
        tasks=entries["train"], valid=entries["valid"], raw=True, seq_len=text.LENGTH, temperature=1.0, test_share=0.0
    )
    made.method.train_base = "all"
    warmup = 5 if init_from else WARMUP
    made.optim.update(learning_rate=rate, warmup=warmup, decay=decay, weight_decay=0.1, b2=0.95)
    made.train.update(
        steps=steps, batch_size=rows, save_every=save_every, keep=1, log_every=20, eval_every=save_every, remat="none",
        init_from=str(init_from),
    )  # fmt: skip
    made.eval.update(num_items=8, num_generated=0)
    schema.validate(made)
    return made


def trained(made, workdir: pathlib.Path) -> bool:
    """Trains, or goes on; whether the last step was made."""
    return train(made, str(workdir)).step == made.train.steps


def write(run: pathlib.Path, out: pathlib.Path):
    """The base of a run with what it trained in its leaves' places, in bfloat16."""
    loaded = load_run(run, "latest")
    base = bases.load_base(loaded.config.base.source)
    params = jax.tree.map(np.asarray, loaded.params)
    with replaced(out) as part:
        huggingface.write_base(part, dataclasses.replace(base, params=params, folder=None), dtype=ml_dtypes.bfloat16)


@contextlib.contextmanager
def replaced(folder: pathlib.Path):
    """`whole_folder`, in the place of what is there, which goes only when the new one is complete."""
    with scratch(folder.parent) as place:
        new, old = place / "new", place / "old"
        new.mkdir()
        yield new
        if folder.exists():
            os.rename(folder, old)
        os.rename(new, folder)
