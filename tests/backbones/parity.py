"""How far our logits, losses and gradients are from transformers' (`tests/fixtures/make_families.py`).

    python -m tests.backbones.parity     prints the table of docs/models.md (or of the checkpoints that are named)

An error is a norm: |ours - theirs| / |theirs| of the projected array; for a gradient the largest over the sites.
"""

import functools
import os
import pathlib
import sys
import tempfile

os.environ.setdefault(
    "XLA_FLAGS", "--xla_backend_optimization_level=0"
)  # programs that run once: compiling is the time

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from molora_jax.backbones.model import Model  # noqa: E402
from molora_jax.io.base import load_base  # noqa: E402
from molora_jax.objectives.lm import lm  # noqa: E402
from tests.backbones import family_cases  # noqa: E402

FIXTURE = pathlib.Path(__file__).parents[1] / "fixtures" / "families.npz"
LIMITS = {"float32": 1e-4, "bfloat16": 3e-2}


@functools.cache
def wanted() -> dict:
    with np.load(FIXTURE, allow_pickle=False) as file:
        return {str(n): family_cases.unpack(row) for n, row in zip(file["names"], file["values"], strict=True)}


@functools.partial(jax.jit, static_argnames="model")
def _outputs(params, model):
    tokens, targets = family_cases.rows()
    positions = jnp.broadcast_to(jnp.arange(family_cases.S), tokens.shape)
    batch = dict(tokens=tokens, positions=positions, segment_ids=jnp.ones_like(tokens), targets=targets)
    batch["loss_weight"] = jnp.ones(tokens.shape, jnp.float32)

    def loss(blocks):
        whole = {**params, "blocks": blocks}
        hidden = model.hidden(whole, {}, {}, batch)[0]
        return lm(model, whole, hidden, batch, family_cases.S) / tokens.size, model.logits(whole, hidden)

    (value, logits), gradients = jax.value_and_grad(loss, has_aux=True)(params["blocks"])
    return logits, value, {site: gradients[site]["kernel"] for site in family_cases.SITES}


def outputs(base) -> dict:
    with jax.default_matmul_precision("highest"):
        logits, loss, gradients = jax.device_get(_outputs(base.params, model=Model(base.config)))
    return family_cases.summary(logits, loss, {site: np.asarray(g, np.float32) for site, g in gradients.items()})


def errors(name: str, base) -> dict[str, float]:
    """`logits`, `loss`, `gradient`: the error of one loaded checkpoint."""
    ours, theirs = outputs(base), wanted()[name]
    apart = {key: np.linalg.norm(ours[key] - theirs[key]) / np.linalg.norm(theirs[key]) for key in theirs}
    gradient = max(apart[site] for site in family_cases.SITES)
    return {"logits": float(apart["logits"]), "loss": float(apart["loss"]), "gradient": float(gradient)}


def table(names=tuple(family_cases.CASES)):
    """Lines of Markdown: a row for each checkpoint and reader, with the errors in both dtypes."""
    yield "| checkpoint | reader | float32: logits, loss, gradients | bfloat16: logits, loss, gradients |"
    yield "|---" * 4 + "|"
    for name in names:
        config = family_cases.CASES[name]
        for reader in family_cases.READERS if name in family_cases.MAIN else ("folder", "gguf"):
            if reader == "gguf" and name not in family_cases.IN_GGUF:
                continue
            with tempfile.TemporaryDirectory() as folder:
                os.environ["MOLORA_CACHE"] = f"{folder}/cache"
                source = family_cases.write(pathlib.Path(folder), reader, config)
                found = {dtype: errors(name, load_base(source, dtype=dtype)) for dtype in LIMITS}
            cells = [", ".join(f"{e:.0e}" for e in found[dtype].values()) for dtype in LIMITS]
            yield f"| {name} | {reader} | {cells[0]} | {cells[1]} |"


if __name__ == "__main__":
    for line in table(sys.argv[1:] or tuple(family_cases.CASES)):
        print(line, flush=True)
