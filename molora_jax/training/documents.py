"""Mean embeddings of documents by task, for routers whose rows start from them (`routers/document_rows.py`).

    d = sum over its tokens of h / |sum|,   mean_t = mean over the task's documents of d

h `[S, D]` is the frozen base's last hidden state: the embedder that everybody who has the base has too. A document is a
training example as the run reads it, the first ones of its task whatever the run's seed, one a row; one whose embedding
is not finite is left out. Every device computes all of them, so their number changes no bit. D width, S `data.seq_len`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from molora_jax import sharding
from molora_jax.config.resolve import split_commas
from molora_jax.data.packing import empty_batch, write_segment
from molora_jax.engines import ALONE
from molora_jax.errors import InputError

ROWS = 8  # documents a pass: a constant, so that an embedding does not depend on the run's batch


def begin(run, stage, state):
    """The state of a run's start, with the rows of its routers from documents; `state` where none start so."""
    rules = [r for r in run.programs[stage.name].model.rules if r.router is not None and r.router.JOINS]
    rules = [rule for rule in rules if rule.router.documents]
    if not rules:
        return state
    most = max(rule.router.documents for rule in rules)
    named = {name for rule in rules for name in split_commas(rule.router.public)}
    vectors, means = embeddings(run, most), {}
    for task, name in enumerate(run.data.labels(named)[: run.data.num_trained]):
        means.setdefault(name, []).extend(vectors[task])
    run.note(f"documents: {sum(map(len, means.values()))} of {len(means)} tasks embedded for the rows of routers")
    flat = flatten_dict(jax.device_get(state.adapters), sep="/")
    for rule in rules:
        own = {name: np.mean(v[: rule.router.documents], axis=0) for name, v in means.items() if v}
        for path in [path for path in flat if path.startswith(f"{rule.name}/") and path.endswith("/W")]:
            head, old = path.removesuffix("W"), flat[path]  # [L, E, D]
            if "/router/" in path:
                W, r0 = rule.router.rows(own, *old.shape[1:], f"method.rules.{rule.name}.router")
                flat[path] = np.broadcast_to(W, old.shape)
                flat[f"{head}r0"] = np.broadcast_to(r0, (len(old), *r0.shape))
    placed = sharding.put(unflatten_dict(flat, sep="/"), run.compiled(stage).shardings.adapters)
    return dataclasses.replace(state, adapters=placed)


def embeddings(run, most: int) -> list[np.ndarray]:
    """`[documents, D]` float32 of each task that trains: at most so many of its training examples."""
    split, length = run.data.splits["train"], run.data.seq_len
    base = dataclasses.replace(run.model.without_rules(), engine=ALONE)
    everywhere, out = sharding.replicated(run.mesh), []
    params = jax.jit(lambda p: p, out_shardings=everywhere)(run.params)
    for task in range(run.data.num_trained):
        chosen, found = np.flatnonzero(split.task_ids == task)[:: run.data.unit][:most], []
        for first in range(0, len(chosen), ROWS):
            batch = empty_batch(ROWS, length, pad_id=run.data.pad_id)
            for row, example in enumerate(chosen[first : first + ROWS]):
                ids = split.tokens(example)[: length + 1]
                write_segment(batch, row, 0, 1, ids=ids, mask=np.zeros(len(ids)), task_id=task, example_id=0)
            vectors = embed(params, sharding.put(batch, everywhere), model=base)
            found.append(np.asarray(jax.device_get(vectors))[: len(chosen) - first])
        vectors = np.concatenate(found) if found else np.zeros((0, run.model.config.width), np.float32)
        vectors = vectors[np.isfinite(vectors).all(axis=1)]
        if not len(vectors):
            raise InputError(
                "data.tasks", got=f"no training document of {run.data.task_names[task]}", expected="at least one",
                fix="Give it more rows, or raise data.seq_len.",
            )  # fmt: skip
        out.append(vectors)
    return out


@functools.partial(jax.jit, static_argnames="model")
def embed(params: dict, batch: dict, *, model):
    """`[B, D]` float32: the direction of the mean hidden state of each row's tokens."""
    h = model.hidden(params, {}, {}, batch)[0].astype(jnp.float32)
    total = jnp.sum(jnp.where((batch["segment_ids"] > 0)[..., None], h, 0.0), axis=1)
    return total / jnp.linalg.norm(total, axis=-1, keepdims=True)
