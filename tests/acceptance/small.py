"""What acceptance tests run on: one router by itself, one routed projection, and a config on a decoder of two layers.

B = 4 rows, S = 10 positions: two packed examples and two positions of padding a row. D width, E experts.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import tiles
from launch import flags
from molora_jax import config as schema
from molora_jax import engines
from molora_jax.adapters import ADAPTERS
from molora_jax.backbones.compile import compile_model
from molora_jax.backbones.families import TINY
from molora_jax.core.rules import Rule
from molora_jax.core.types import Context, Routing
from molora_jax.io.random_init import random_params
from molora_jax.objectives.lm import PLAIN, lm
from molora_jax.placements import projection
from molora_jax.training.probe import make_gradient
from tests.battery.cases import BATCH, SMALL, TARGETS_PER_ROW, fresh_adapters

DECODER = dataclasses.replace(TINY, layers=2, width=32, ffn_width=48, heads=2, kv_heads=1, head_dim=16, vocab=64)
B, S = 4, 10


def context(batch=1, length=6, **changes):
    """A router's context: no padding, one example a row."""
    ones = np.ones((batch, length), np.int32)  # numpy: each shape would be a few programs
    places = np.broadcast_to(np.arange(length, dtype=np.int32), (batch, length))
    arrays = jax.device_put((ones > 0, ones, places, 0 * ones, 0 * ones))
    return Context(*arrays, max_segments=1, state={}).replace(**changes)


def from_probs(router, probs, **changes):
    """The decision for given probabilities `[E]` or `[T, E]`: the router reads their logarithms through an identity."""
    probs = jnp.atleast_2d(jnp.asarray(probs, jnp.float32))
    return _from_logits(router, jnp.log(jnp.maximum(probs, 1e-30))[None], context(1, len(probs), **changes))


@functools.partial(jax.jit, static_argnums=0)
def routed(router, leaves, shared, x, ctx):
    """`router.route` as one program, not one an operation: `(decision, carry, sums)`."""
    return router.route(leaves, shared, x, ctx)


@functools.partial(jax.jit, static_argnums=0)
def loss_value(loss, decision, ctx):
    """A loss without its weight, of one decision of one router."""
    sums = jax.tree.map(lambda x: x[None], loss.stats(decision, ctx))
    return loss.value({"r": {"000-000": {"ffn": sums}}})


@functools.partial(jax.jit, static_argnums=0)
def _from_logits(router, x, ctx):
    return router.route({"W": jnp.eye(x.shape[-1])}, {}, x, ctx)[0]


@functools.partial(jax.jit, static_argnums=0)
def change(adapter, leaves, gates, x):
    """What one routed projection adds to W x = 0: `x [T, D_in]`, `gates [T, E]` -> `[T, D_out]`, as the model does."""
    rule = Rule("r", ("q",), (1,), adapter, router=object())
    gates = gates[None]
    routing = Routing(gates, gates != 0, gates, gates, jnp.ones(gates.shape[:2], bool), k_max=gates.shape[-1])
    part = projection.part(rule, leaves, {}, routing, context(1, len(x)), x)
    return engines.project(engines.ALONE, "q", jnp.zeros((x.shape[-1], leaves["B"].shape[-1])), None, x, [part])[0]


def begun_from_gradient(made):
    """`(adapters, gradients)` of a battery case, begun from the gradient of the battery's batch, layer by layer."""
    gradient = make_gradient(
        made.model.without_rules(), objective=PLAIN, accumulate=1, targets_per_row=TARGETS_PER_ROW,
        constrain=lambda x: x,
    )  # fmt: skip
    zeros = {site: jnp.zeros((1, *SMALL.dims(site))) for site in SMALL.sites}  # a layer a pass
    take = jax.jit(lambda n: gradient(zeros, made.params, {}, {}, BATCH, 0, n, jnp.float32(1)))
    begun = jax.jit(lambda a, n, g: made.model.begun_anew(jax.random.key(0), made.params, a, n, g))
    adapters, found = made.start().adapters, []
    for layer in range(SMALL.layers):
        found.append({site: np.asarray(sums[0]) for site, sums in take(layer).items()})
        adapters = begun(adapters, layer, found[-1])
    return jax.device_get(adapters), found


def lora(rank, alpha):
    return ADAPTERS["lora"](rank=rank, alpha=alpha, dropout=0.0)


def factors(E, rank, d_in=16, d_out=24, seed=0):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jax.device_put(np.float32(rng.standard_normal(shape)))  # noqa: E731
    return {"A": normal(E, rank, d_in) / 4, "B": normal(E, rank, d_out) / 4}


def config(name, **changes):
    """`configs/NAME.py` on random weights, without dropout; `changes` are dotted fields with `__` for the dot."""
    made = flags.load(flags.ROOT / "configs" / f"{name}.py")
    changes = {"base.source": "random:tiny"} | {k.replace("__", "."): v for k, v in changes.items()}
    with made.unlocked():
        for rule in made.method.rules.values():
            rule.adapter.dropout = 0.0
        for path, value in changes.items():
            group, _, key = path.rpartition(".")
            functools.reduce(lambda node, part: node[part], filter(None, group.split(".")), made)[key] = value
    schema.validate(made)
    return made


@functools.cache
def base(decoder):
    return jax.device_put(random_params(decoder, seed=1, dtype="float32")[0])


def build(name, *, layers=2, decoder=DECODER, **changes):
    """`(model, params, adapters, router_state)`: every leaf random, so that no expert is silent."""
    decoder = dataclasses.replace(decoder, layers=layers)
    model = compile_model(config(name, **changes), decoder, max_segments=2)
    params = base(decoder)
    fresh = fresh_adapters(model, jax.random.key(0), params)
    rng = np.random.default_rng(0)
    noise = lambda x: x + 0.2 * rng.standard_normal(x.shape).astype(np.float32)  # noqa: E731
    return model, params, jax.tree.map(noise, jax.device_get(fresh)), model.init_router_state()


def batch(seed=0):
    """Tokens at random; the first example of a row has task 3 (factbook), the second task 0."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, DECODER.vocab, (B, S)).astype(np.int32)
    segment = np.repeat([[1] * 5 + [2] * 3 + [0] * 2], B, axis=0).astype(np.int32)
    segment[1] = [1] * 3 + [2] * 4 + [0] * 3  # rows differ
    return dict(
        tokens=tokens, targets=np.roll(tokens, -1, axis=1), segment_ids=segment,
        positions=np.concatenate([np.r_[:5], np.r_[:3], np.r_[:2]])[None].repeat(B, 0).astype(np.int32),
        loss_weight=(segment > 0).astype(np.float32), task_ids=np.where(segment == 1, 3, 0).astype(np.int32),
        example_ids=(segment + 2 * np.arange(B)[:, None]).astype(np.int32),
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames="model")
def lm_loss(model, params, adapters, state, data):
    hidden, stats, _, _ = model.hidden(params, adapters, state, data)
    return lm(model, params, hidden, data, S) / jnp.sum(data["loss_weight"]), stats


@functools.partial(jax.jit, static_argnames="model")
def lm_gradient(model, params, adapters, state, data):
    """Of the language-model loss alone."""
    return jax.grad(lambda a: lm_loss(model, params, a, state, data)[0])(adapters)


@functools.partial(jax.jit, static_argnames=("model", "train"))
def gates(model, params, adapters, state, data, train=False, **options):
    """`{rule: {segment: {scope: [L, B, S, E]}}}`."""
    return model.hidden(params, adapters, state, data, collect=True, train=train, **options)[3]


def rows_visited(monkeypatch, run, *args):
    """The rows of work of each grouped product of `run`: those of the tiles that its loop visits, one count a plan."""
    found, plan = [], tiles.plan

    def spy(idx, E, rows=None):
        schedule = plan(idx, E, rows)
        jax.debug.callback(lambda n: found.append(int(n) * schedule.slot.shape[1]), schedule.count)
        return schedule

    with monkeypatch.context() as patch:
        patch.setattr(tiles, "plan", spy)
        jax.block_until_ready(jax.jit(run)(*args))
        jax.effects_barrier()
    return found
