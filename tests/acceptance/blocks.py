"""One layer of one model at work, for tests of equations: the frozen part, one rule, its output and its gradients."""

import dataclasses
import functools

import jax
import numpy as np

from molora_jax.adapters import ADAPTERS
from molora_jax.backbones.model import Model
from molora_jax.core.rules import Rule
from molora_jax.routers import ROUTERS
from tests.battery.cases import BATCH, SMALL, base, hidden_states, random_adapters

ONE = dataclasses.replace(SMALL, layers=1)
VALID = BATCH["segment_ids"] > 0
ALL = ("q", "k", "v", "o", "gate", "up", "down")


def model(sites, experts, router=None, adapter="lora", decoder=ONE, rank=3, **options):
    """A model of one rule `mix`. `router` is `(name, options)`."""
    made = ADAPTERS[adapter](rank=rank, alpha=6.0, dropout=0.0, **options)
    router = router and ROUTERS[router[0]](**router[1])
    down = "per_expert" if adapter == "dora" and sites == ("ffn",) else "once"
    counts = (experts,) * decoder.layers if isinstance(experts, int) else experts
    return Model(decoder, (Rule("mix", sites, counts, made, router, down),), (), "dots", 3)


def output(made, adapters, batch=None, params=None):
    """Final hidden states of the valid positions `[N, D]`."""
    params = base(made.config) if params is None else params
    return np.asarray(hidden_states(made, params, adapters, {}, BATCH if batch is None else batch))[VALID]


def gradient(made, adapters):
    """Of a fixed random functional of the output, with respect to every leaf."""
    probe = np.random.default_rng(9).standard_normal((*VALID.shape, made.config.width)).astype(np.float32)
    probe = probe * VALID[..., None]
    return jax.device_get(_gradient(made, base(made.config), adapters, probe))


@functools.partial(jax.jit, static_argnames="made")
def _gradient(made, params, adapters, probe):
    return jax.grad(lambda a: (made.hidden(params, a, {}, BATCH)[0] * probe).sum())(adapters)


def trace_anew():
    """After a part of the product was replaced: a model's compiled programs are of the parts as they were."""
    hidden_states.clear_cache()
    _gradient.clear_cache()


def noisy(made, seed=3):
    return random_adapters(made, base(made.config), seed=seed)


def edit(adapters, segment="000-000", **changes):
    """A copy in which `changes[leaf](value, site)` stands for every leaf of that name in the segment."""
    out = {"mix": {segment: {}}}
    for site, leaves in adapters["mix"][segment].items():
        if site == "router":
            out["mix"][segment]["router"] = {
                scope: {leaf: changes.get(leaf, lambda x, s: x)(x, scope) for leaf, x in group.items()}
                for scope, group in leaves.items()
            }
        else:
            out["mix"][segment][site] = {leaf: changes.get(leaf, lambda x, s: x)(x, site) for leaf, x in leaves.items()}
    return out
