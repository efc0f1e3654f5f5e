"""Every option of the routing losses against a hand computation over the joined tokens."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from molora_jax.core.types import Context, Routing
from molora_jax.losses import LOSSES
from molora_jax.losses.balance import Balance
from molora_jax.losses.base import Penalty
from tests.battery import reference

LAYERS, SITES, B, S, E = 3, ("q", "down"), 2, 7, 5
SEGMENTS = np.array([[1, 1, 1, 2, 2, 3, 0], [1, 2, 2, 2, 2, 0, 0]])
CTX = Context(jnp.asarray(SEGMENTS > 0), *[jnp.asarray(SEGMENTS)] * 4, max_segments=4)
ON_ROUTING = [name for name, loss in LOSSES.items() if not issubclass(loss, Penalty)]


def decisions(seed=0, experts=E):
    """`{(layer, rule, scope): Decision}` of random routers, with padding that would be seen if it were counted."""
    rng, out = np.random.default_rng(seed), {}
    for layer, site in itertools.product(range(LAYERS), SITES):
        probs = rng.dirichlet(np.ones(experts), (B, S)).astype(np.float32)
        selected = (probs > 0.2) & (SEGMENTS > 0)[..., None]
        gates = np.where(selected, probs, 0).astype(np.float32)
        rows = np.arange(B)[:, None] * 1000 + SEGMENTS
        out[layer, "all", site] = reference.Decision(probs, selected, gates, SEGMENTS > 0, rows)
    return out


def stats(loss, found, ctx=CTX, shift=0.0):
    """As the scan leaves them: `{rule: {segment: {scope: sums [layers, ...]}}}`. `shift [E]` is added to the logits."""
    scopes = {}
    for site in SITES:
        each = []
        for layer in range(LAYERS):
            d = found[layer, "all", site]
            z = jnp.log(d.probs) + shift
            probs = jax.nn.softmax(z, axis=-1)
            gates = jnp.where(d.selected, probs, 0.0)
            made = Routing(gates, jnp.asarray(d.selected), z, probs, jnp.asarray(d.valid), k_max=E)
            each.append(loss.stats(made, ctx))
        scopes[site] = jax.tree.map(lambda *x: jnp.stack(x), *each)
    return {"all": {"000-002": scopes}}


OPTIONS = [
    dict(zip(("over", "reduce", "normalise", "counts", "times_experts", "per_example"), values, strict=True))
    for values in itertools.product(("site", "layer", "all"), ("sum", "mean"), ("slots", "tokens"), ("hard", "soft"),
                                    (True, False), (False, True))
]  # fmt: skip


@pytest.mark.parametrize("option", OPTIONS, ids=lambda o: "-".join(str(v) for v in o.values()))
def test_balance_equals_the_joined_tokens(option):
    loss, found = Balance(**option), decisions()
    if option["per_example"] and option["over"] == "all":
        # joined over layers by example: the same rows meet in every layer
        assert len(found) == LAYERS * len(SITES)
    np.testing.assert_allclose(loss.value(stats(loss, found)), reference.balance(np, found, loss), rtol=2e-6)


def test_balance_known_values():
    """Uniform routing: 1 by slots, K by tokens. Everything on one pair: N/K by slots, E by tokens (8 at E=8, K=2)."""
    E, T = 8, 16
    uniform = np.zeros((1, T, E), bool)
    for t in range(T):
        uniform[0, t, [t % E, (t + 1) % E]] = True
    flat = np.full((1, T, E), 1 / E, np.float32)
    pair = np.zeros((1, T, E), bool)
    pair[..., :2] = True
    ids = jnp.ones((1, T), jnp.int32)
    ctx = Context(ids > 0, *[ids] * 4, max_segments=1)

    def value(selected, probs, **option):
        loss = Balance(**option)
        made = Routing(jnp.asarray(probs), jnp.asarray(selected), probs, jnp.asarray(probs), ids > 0, k_max=2)
        lead = jax.tree.map(lambda x: x[None], loss.stats(made, ctx))
        return float(loss.value({"r": {"000-000": {"ffn": lead}}}))

    assert value(uniform, flat) == pytest.approx(1) and value(uniform, flat, normalise="tokens") == pytest.approx(2)
    assert value(pair, pair / 2.0) == pytest.approx(4) and value(pair, pair / 2.0, normalise="tokens") == pytest.approx(
        8
    )


def test_layers_of_other_counts_stay_apart_and_use_their_own_count():
    loss = Balance(over="layer", reduce="sum")
    a, b = decisions(1, 5), decisions(2, 3)
    joined = {"all": {"000-002": stats(loss, a)["all"]["000-002"], "003-005": stats(loss, b)["all"]["000-002"]}}
    wanted = reference.balance(np, a, loss) + reference.balance(np, b, loss)
    np.testing.assert_allclose(loss.value(joined), wanted, rtol=2e-6)


@pytest.mark.parametrize("counts", ["hard", "soft"])
def test_gradient_through_f_only_where_counts_are_soft(counts):
    """`d value / d shift` by central differences with f held (hard) or moving (soft)."""
    loss, found = Balance(counts=counts), decisions()
    g = jax.grad(lambda shift: loss.value(stats(loss, found, shift=shift)))(jnp.zeros(E))

    def moved(shift):
        out = {}
        for key, d in found.items():
            probs = d.probs.astype(np.float64) * np.exp(shift)
            probs /= probs.sum(-1, keepdims=True)
            out[key] = d._replace(probs=probs, gates=np.where(d.selected, probs, 0))
        return reference.balance(np, out, loss)

    steps = np.eye(E) * 1e-5
    np.testing.assert_allclose(g, [(moved(h) - moved(-h)) / 2e-5 for h in steps], rtol=1e-3, atol=1e-5)
    assert np.abs(g).max() > 1e-3


def test_entropy_and_z_loss_by_hand():
    found = decisions()
    entropy, z = LOSSES["entropy"](), LOSSES["z_loss"]()
    np.testing.assert_allclose(entropy.value(stats(entropy, found)), reference.entropy(np, found, entropy), rtol=1e-6)
    shift = jnp.arange(E) * 0.5
    squares = [
        np.log((d.probs * np.exp(shift)).sum(-1))[d.valid] ** 2 for d in found.values()
    ]  # log-sum-exp of log p + shift
    np.testing.assert_allclose(z.value(stats(z, found, shift=shift)), np.mean([s.mean() for s in squares]), rtol=1e-5)


def test_entropy_of_a_certain_router_has_a_finite_gradient():
    loss = LOSSES["entropy"]()
    found = {
        key: d._replace(probs=np.eye(E, dtype=np.float32)[np.zeros((B, S), int)]) for key, d in decisions().items()
    }

    def value(scale):
        made = Routing(jnp.zeros((B, S, E)), jnp.zeros((B, S, E), bool), jnp.zeros((B, S, E)),
                       scale * found[0, "all", "q"].probs, CTX.valid, k_max=1)  # fmt: skip
        lead = jax.tree.map(lambda x: x[None], loss.stats(made, CTX))
        return loss.value({"r": {"s": {"q": lead}}})

    assert float(value(1.0)) == 0 and np.isfinite(jax.grad(value)(1.0))


@pytest.mark.parametrize("name", ON_ROUTING)
@pytest.mark.parametrize("shape", ["E", "BE"])
def test_shut_out_experts_do_not_count(name, shape):
    """Two more experts that nobody may choose, with logits of any size: the loss is that of a router without them."""
    loss = LOSSES[name]()
    rng = np.random.default_rng(0)
    z = rng.standard_normal((B, S, E)).astype(np.float32)
    wide = np.concatenate([z, np.full((B, S, 2), 3.0, np.float32)], axis=-1)
    allowed = np.array([True] * E + [False] * 2)
    allowed = jnp.asarray(allowed if shape == "E" else np.tile(allowed, (B, 1)))

    def value(z, ctx):
        from molora_jax.core import routing

        probs = routing.softmax(jnp.asarray(z), ctx.allowed)
        made = routing.finish(probs, routing.top_k(probs, 2), jnp.asarray(z), probs, ctx, k_max=2)
        return loss.value({"r": {"s": {"q": jax.tree.map(lambda x: x[None], loss.stats(made, ctx))}}})

    np.testing.assert_allclose(value(wide, CTX.replace(allowed=allowed)), value(z, CTX), rtol=1e-6)
