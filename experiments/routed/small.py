"""What the parts share: a decoder that knows some prose, a run of a method on it, and what held-out items say."""

import dataclasses
import functools
import json
import pathlib
import statistics

import numpy as np

from configs import common
from experiments import small_base
from molora_jax import config as schema

PROSE, NEW, FIRST = "factbook,topic,dialog,translate", "morph,math,sentiment", 400  # FIRST: steps of the base on prose
SITES = "q,down"


config_of = functools.partial(small_base.config_of, seq_len=96)


def base(workdir, tasks=PROSE, steps=FIRST) -> str:
    """The source of a small base that is trained whole on these tasks."""
    return small_base.first_base(workdir, config_of("random:tiny", tasks, steps, rate=2e-3), name="first")


def rules(sites=SITES, **rule):
    return dict(all=common.rule(sites, **rule))


def trained(made, workdir):
    """The finished run, opened; trains what is left of it."""
    from molora_jax.evaluation.run import load_run
    from molora_jax.training.loop import train

    schema.validate(made)
    train(made, str(workdir))
    return load_run(str(workdir), "latest", config=made)


def scored(run, tasks=None, *, route=""):
    """`{task: NLL in nats an answer token}` and `{task: share of items whose every answer token is the likeliest}`.

    `tasks`: others than the run's own; `route="task"` sends each to the expert of its place.
    """
    from molora_jax import sharding
    from molora_jax.objectives.held_out import example_nll

    if tasks is not None:
        run.config = run.config.copy_and_resolve_references()
        with run.config.unlocked():
            run.config.data.tasks = tasks
    data, model = run.data, dataclasses.replace(run.model, route=route)
    examples, bound = data.heldout("test", run.config.eval.num_items), data.train.targets_per_row
    batches = data.heldout_batches(examples, run.config.eval.batch_size, targets_per_row=bound)
    sums = example_nll(
        model, run.params, run.adapters, run.router_state, batches, len(examples), mesh=run.mesh,
        targets_per_row=bound, constrain=sharding.constrain(run.mesh),
    )  # fmt: skip
    ids = np.array([example.task_id for example in examples])
    nll, exact = {}, {}
    for i, name in enumerate(data.task_names):
        here = ids == i
        nll[name] = round(float(sums["nll"][here].sum() / sums["tokens"][here].sum()), 4)
        exact[name] = round(float((sums["right"][here] == sums["tokens"][here]).mean()), 4)
    return nll, exact


def routed(workdir, *names, last=10) -> dict:
    """Means of routing statistics over sites, layers and the last steps; None without a router."""
    rows = [json.loads(line) for line in (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()][-last:]
    out = {}
    for name in names:
        found = [v for row in rows for key, values in row.items() if key.endswith(f"/{name}") for v in values]
        out[name] = round(statistics.mean(map(float, found)), 4) if found else None
    return out


def losses(workdir) -> list[float]:
    rows = [json.loads(line) for line in (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()]
    return [float(row["lm_loss"]) for row in rows]


def leaves(run, name) -> list[np.ndarray]:
    """Leaves of this name, `[L, ...]`, one a site."""
    from flax.traverse_util import flatten_dict

    flat = flatten_dict(run.adapters, sep="/")
    return [np.asarray(v, np.float64) for path, v in sorted(flat.items()) if path.rpartition("/")[2] == name]


def cosine(X) -> float:
    """Mean cosine of two entries along axis 1 of `X [L, E, ...]`."""
    flat = X.reshape(*X.shape[:2], -1)
    flat = flat / np.maximum(np.linalg.norm(flat, axis=-1, keepdims=True), 1e-12)
    e, f = np.triu_indices(X.shape[1], 1)
    return float(np.einsum("led,lfd->lef", flat, flat)[:, e, f].mean())
