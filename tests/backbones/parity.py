"""How far our logits, losses and gradients are from transformers' (`tests/fixtures/make_families.py`).

    python -m tests.backbones.parity [NAME ...]     prints the rows of docs/models.md, of all or of those named
    python -m tests.backbones.parity --write ...    writes them there

An error is a norm: |ours - theirs| / |theirs| of the projected array; for a gradient the largest over the sites.
"""

import functools
import os
import pathlib
import sys
import tempfile

os.environ.setdefault(  # eight devices; programs that run once: compiling is the time
    "XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from molora_jax.backbones.model import Model  # noqa: E402
from molora_jax.io.base import load_base  # noqa: E402
from molora_jax.objectives.lm import lm  # noqa: E402
from tests.backbones import backbone_cases, family_cases, in_rows, others  # noqa: E402

DOCS, MARK = (
    pathlib.Path(__file__).parents[2] / "docs" / "models.md",
    "<!-- python -m tests.backbones.parity --write -->",
)
FIXTURE = pathlib.Path(__file__).parents[1] / "fixtures" / "families.npz"
LIMITS = {"float32": 1e-4, "bfloat16": 3e-2}


@functools.cache
def wanted() -> dict:
    with np.load(FIXTURE, allow_pickle=False) as file:
        return {str(n): family_cases.unpack(row) for n, row in zip(file["names"], file["values"], strict=True)}


def wanted_adapted(name: str) -> dict:
    """`family_cases.adapted_summary` of a checkpoint of ADAPTED."""
    with np.load(FIXTURE, allow_pickle=False) as file:
        return {key.removeprefix(f"{name}/"): file[key] for key in file.files if key.startswith(f"{name}/")}


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


def table(names):
    """`{(checkpoint, reader): row of Markdown}`, with the errors in both dtypes."""
    for name in names:
        config = family_cases.CASES[name]
        for reader in family_cases.READERS if name in family_cases.MAIN else ("folder", "gguf"):
            if reader == "gguf" and name not in family_cases.IN_GGUF:
                continue
            with tempfile.TemporaryDirectory() as folder:
                os.environ["MOLORA_CACHE"] = f"{folder}/cache"
                source = family_cases.write(pathlib.Path(folder), reader, config)
                found = {dtype: errors(name, load_base(source, dtype=dtype)) for dtype in LIMITS}
            yield f"| {name} | {reader} | {' | '.join(_figures(found[dtype]) for dtype in LIMITS)} |"


def families(names):
    """Rows of Markdown: for each family what was compared and how far apart it is."""
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder)
            os.environ["MOLORA_CACHE"] = f"{folder}/cache"
            if name not in family_cases.ADAPTED:
                found = others.errors(name, load_base(others.written(path / "m", name)))
                yield f"| {name} | {_figures(found)} | | | |"
                continue
            config = family_cases.ALL[name]
            alone = load_base(others.written(path / "o", name)) if name in backbone_cases.CASES else None
            base = load_base(family_cases.write(path, "folder", config))
        wanted = wanted_adapted(name)
        rows = [in_rows.errors(in_rows.run(config, base, mesh=mesh), wanted) for mesh in (False, True)]
        plain = errors(name, base) if alone is None else others.errors(name, alone)
        cells = [named(name), _figures(plain), *map(_figures, rows)]
        yield f"| {' | '.join(cells)} | {in_rows.cached(config, base):.0e} |"


def named(name: str) -> str:
    """The first cell of a family's row."""
    family = family_cases.ALL.get(name, {"model_type": name})["model_type"]
    return name if name.startswith(family) else f"{family}: {name}"


def _figures(found: dict) -> str:
    return ", ".join(f"{error:.0e}" for error in found.values())


HEADS = (
    "| checkpoint | reader | float32: logits, loss, gradients | bfloat16: logits, loss, gradients |",
    "| family | one text a row: outputs, loss, gradients | adapters, padded and packed rows: logits, loss, gradients | "
    "the same on 8 devices | cached against uncached |",
)
SECOND = (*family_cases.ADAPTED, *(case for case in backbone_cases.CASES if case not in family_cases.ADAPTED))


def write(names) -> None:
    """Into the docs: rows of `names` made anew, the others kept, all in the order of the cases."""
    text = DOCS.read_text().partition(MARK)
    have = {_key(line): line for line in text[2].splitlines() if line.startswith("| ") and line not in HEADS}
    made = (*table(n for n in names if n in family_cases.CASES), *families(n for n in names if n in SECOND))
    have |= {_key(line): line for line in made}
    first = [(name, reader) for name in family_cases.CASES for reader in family_cases.READERS]
    lines = [MARK]
    for head, keys in zip(HEADS, (first, [(named(name),) for name in SECOND]), strict=True):
        lines += ["", head, "|---" * (head.count("|") - 1) + "|", *(have[key] for key in keys if key in have)]
    DOCS.write_text(text[0] + "\n".join(lines) + "\n")


def _key(line: str) -> tuple[str, ...]:
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    return tuple(cells[:2]) if cells[1] in family_cases.READERS else (cells[0],)


if __name__ == "__main__":
    asked = [name for name in sys.argv[1:] if name != "--write"] or [*family_cases.CASES, *backbone_cases.CASES]
    if "--write" in sys.argv:
        write(asked)
    else:
        for line in (*table(n for n in asked if n in family_cases.CASES), *families(n for n in asked if n in SECOND)):
            print(line, flush=True)
