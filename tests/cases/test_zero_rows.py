"""Rows of zeros (a pruned head, a router that is not trained yet): every member stays finite, in value and gradient."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from molora_jax.adapters import ADAPTERS
from molora_jax.adapters.dora import row_norm
from molora_jax.backbones.compile import compile_model
from molora_jax.config.members import attribute
from molora_jax.config.outside import stated_with
from molora_jax.core import routing
from molora_jax.core.types import Context, Routing, Site
from molora_jax.inits import INITS
from molora_jax.io.base import load_base
from molora_jax.losses import LOSSES
from molora_jax.losses.base import Penalty
from molora_jax.objectives.lm import lm
from molora_jax.routers import ROUTERS
from tests.battery.cases import BATCH
from tests.tiny import tiny_config

D_IN, D_OUT, E, S = 12, 10, 3, 4
SITE = Site("up", D_IN, D_OUT, (0,), E, (E,))
IDS = jnp.ones((1, S), jnp.int32)
CTX = Context(IDS > 0, *[IDS] * 4, site=SITE, max_segments=1)
ON_ROUTING = [name for name, loss in LOSSES.items() if not issubclass(loss, Penalty)]


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def finite(tree):
    assert all(np.isfinite(np.asarray(v, np.float32)).all() for v in jax.tree.leaves(tree)), tree


def floats(tree):
    """`(leaves with a gradient, a function that puts them back)`."""
    leaves, shape = jax.tree.flatten(tree)
    real = [jnp.issubdtype(v.dtype, jnp.floating) for v in leaves]

    def back(some):
        some = iter(some)
        return jax.tree.unflatten(shape, [next(some) if r else v for v, r in zip(leaves, real, strict=True)])

    return [v for v, r in zip(leaves, real, strict=True) if r], back


def accepts(cls, init):
    """Whether the class's annotation allows this start, both have a core or neither, and a start that is not zero is
    taken off again."""
    field = {f.name: f for f in dataclasses.fields(cls)}
    if attribute("inits", init, "AWAY") and not stated_with(cls, "SUBTRACTS", "factors"):
        return False
    return init in getattr(field["init"].type, "__args__", INITS) and cls.CORE == bool(attribute("inits", init, "CORE"))


KERNELS = {"one row": [0], "half": range(D_OUT // 2), "all": range(D_OUT)}
PAIRS = [(a, i) for a, i in itertools.product(ADAPTERS, INITS) if accepts(ADAPTERS[a], i)]


@pytest.mark.parametrize(("name", "init"), PAIRS)
def test_an_adapter_on_a_kernel_with_rows_of_zeros(name, init):
    """One row, half of them, all of them; at the start, and after a step."""
    adapter = ADAPTERS[name](rank=3, alpha=8.0, dropout=0.0, init=init)
    x, dy = normal(1, S, D_IN), normal(2, E, S, D_OUT)

    def leaves(W):
        own = adapter.init_leaves(jax.random.key(0), SITE, 0, base=W, base_grad=W)
        return own, adapter.init_shared(jax.random.key(1), (SITE,))

    @jax.jit
    def both(moved, W):
        real, back = floats(leaves(W))

        def out(some):
            p, common = back(some)
            f = adapter.factors(p, common, CTX.replace(base=W))
            y = (x if f.inp is None else x * f.inp[:, None]) @ W * (1.0 if f.out is None else f.out[:, None])
            low = jnp.einsum("sd,erd->esr", x, jnp.broadcast_to(f.A, (E, *f.A.shape[1:])))
            low = low if f.mid is None else jnp.einsum("esr,eqr->esq", low, f.mid)
            return jnp.sum(dy * (y + adapter.scale() * jnp.einsum("esr,ero->eso", low, f.B)))

        return jax.value_and_grad(out)([v + moved * normal(3, *v.shape) for v in real])

    for rows in KERNELS.values():
        W = normal(0, D_IN, D_OUT)
        W[:, list(rows)] = 0
        for moved in (0.0, 0.1):
            finite(both(moved, W))


def test_dora_where_the_change_cancels_the_row():
    """`W + s B A` is zero up to rounding: the norm neither falls below 0 nor to nothing beside its parts."""
    A, scale = normal(0, 1, 4, D_IN), 2.0
    B = normal(1, 1, 4, D_OUT)
    W = -scale * np.einsum("rd,ro->do", A[0], B[0])
    for noise in (0.0, 1e-7, -1e-7):
        norm = np.asarray(row_norm(jnp.asarray(W * (1 + noise)), jnp.asarray(A), jnp.asarray(B), scale))[0]
        assert np.isfinite(norm).all() and (norm >= 1e-4 * np.linalg.norm(W, axis=0)).all()
    assert not np.any(row_norm(jnp.zeros((D_IN, D_OUT)), jnp.asarray(A), jnp.zeros_like(B), scale))


def test_dora_leaves_other_rows_as_they_are():
    W = normal(0, D_IN, D_OUT)
    adapter, pruned = ADAPTERS["dora"](rank=4, dropout=0.0), np.where(np.arange(D_OUT) < 3, 0, W)
    own = jax.jit(lambda W: adapter.init_leaves(jax.random.key(0), SITE, 0, base=W))(W)
    own = own | {"B": own["B"] + normal(4, *own["B"].shape)}
    factors = jax.jit(lambda W: adapter.factors(own, {}, CTX.replace(base=W)))
    whole, cut = (factors(w) for w in (W, pruned))
    np.testing.assert_array_equal(whole.out[:, 3:], cut.out[:, 3:])


@pytest.mark.parametrize("name", ROUTERS)
def test_a_router_of_zeros(name):
    options = {"renormalise": True} if hasattr(ROUTERS[name], "renormalise") else {}
    options |= {"score": "linear"} if name == "self_activated" else {}  # else its input is what the site's A makes
    router = ROUTERS[name](**options)
    site = Site("q", 8, 8, (0,), 6)
    trees = jax.eval_shape(
        lambda: (router.init_leaves(jax.random.key(0), site, 0), router.init_shared(jax.random.key(1), (site,)))
    )
    start, back = floats(jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), trees))
    ctx = CTX.replace(site=site, tokens=IDS, state=router.init_state(site), carry=router.init_carry(1, S))

    def total(some, x):
        own, shared = back(some)
        made = router.route(own, shared, router.base_features(shared, x, ctx) if router.INPUT else x, ctx)[0]
        return jnp.sum(made.gates * jnp.arange(6.0)) + jnp.sum(made.probs**2)

    both = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))
    for x in (jnp.zeros((1, S, 8)), jnp.ones((1, S, 8))):
        finite(both(start, x))


MORE = {"entropy": [dict(kind=k, q=q, eps=0.0) for k in ("shannon", "tsallis", "renyi") for q in (0.5, 1.5)],
        "localized_balance": [dict(variant="paper", per_token=True, world="t")],
        "balance": [dict(over="all", counts="soft"), dict(normalise="tokens")]}  # fmt: skip
SEEN = {
    "certain": (np.eye(4, dtype=np.float32)[[0] * S], True),
    "nothing selected": (np.full((S, 4), 0.25, np.float32), False),
    "all zero": (np.zeros((S, 4), np.float32), False),
}


@pytest.mark.parametrize("allowed", ["all", "none"])
@pytest.mark.parametrize("name", ON_ROUTING)
def test_a_loss_on_decisions_that_hold_zeros(name, allowed):
    ctx = CTX.replace(tasks=("t",), allowed=None if allowed == "all" else jnp.zeros(4, bool))
    for options in [{}, *MORE.get(name, ())]:
        loss = LOSSES[name](**options)

        def value(z, probs, selected, loss=loss):
            z = jnp.where(routing.permitted(ctx.allowed), z, routing.NEG_INF)
            gates = jnp.where(selected, probs, 0.0)
            made = Routing(gates, jnp.full(z.shape, selected), z, probs, ctx.valid, k_max=4)
            stats = jax.tree.map(lambda v: v[None], loss.stats(made, ctx))
            return loss.value({"r": {"000-000": {"ffn": stats}}})

        both = jax.jit(jax.value_and_grad(value, argnums=(0, 1)))
        for probs, selected in SEEN.values():
            finite(both(jnp.zeros((1, S, 4)), jnp.asarray(probs)[None], selected))


@pytest.mark.parametrize("method", ["dora", "lora"])
def test_the_loss_of_a_model_with_a_pruned_head(method):
    base = load_base("random:tiny")
    model, params = compile_model(tiny_config(method), base.config), base.params
    blocks = dict(params["blocks"])
    for site, columns in (("q", 16), ("up", 3), ("down", 5)):
        kernel = np.array(blocks[site]["kernel"])
        kernel[..., :columns] = 0
        blocks[site] = blocks[site] | {"kernel": jnp.asarray(kernel)}
    params = params | {"blocks": blocks}

    def loss(adapters):
        hidden = model.hidden(params, adapters, model.init_router_state(), BATCH)[0]
        return lm(model, params, hidden, BATCH, int(BATCH["loss_weight"].sum(axis=1).max()))

    fresh = jax.jit(lambda p: model.init_adapters(jax.random.key(1), p))(params)
    both = jax.jit(jax.value_and_grad(loss))
    finite(both(fresh))
    finite(both(jax.tree.map(lambda leaf: np.asarray(leaf) + 0.1 * normal(5, *leaf.shape), fresh)))  # after a step
