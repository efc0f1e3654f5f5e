"""MixLoRA (arXiv 2404.15159): items 1 to 7 of its acceptance list (8, two adapters at once, needs another engine)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from molora_jax.core import routing
from molora_jax.core.types import Context
from molora_jax.losses.balance import Balance
from tests.acceptance.blocks import ONE, VALID, edit, gradient, model, noisy, output
from tests.battery import reference
from tests.battery.cases import BATCH, base, fresh_adapters

FFN = ("ffn",)
TOP2 = ("softmax_topk", dict(k=2))
MIX = model(FFN, 4, TOP2)
ROUTER_SCALES = (0.0, 1.0, 50.0)


def frozen():
    return output(MIX.without_rules(), {})


@pytest.mark.parametrize("scale", ROUTER_SCALES)
def test_acceptance_1_b_zero_is_the_frozen_ffn_for_any_router(scale):
    silent = edit(noisy(MIX), B=lambda x, s: 0 * x, W=lambda x, s: scale * x)
    np.testing.assert_allclose(output(MIX, silent), frozen(), atol=1e-5)
    assert np.abs(output(MIX, noisy(MIX)) - frozen()).max() > 0.05, "the factors matter otherwise"


@pytest.mark.parametrize("scale", ROUTER_SCALES)
def test_acceptance_2_equal_experts_are_one_ffn_with_that_lora(scale):
    first = lambda x, s: np.broadcast_to(x[:, :1], x.shape)  # noqa: E731
    same = edit(noisy(MIX), A=first, B=first, W=lambda x, s: scale * x)
    single = model(FFN, 1)
    one = edit(noisy(MIX), A=lambda x, s: x[:, :1], B=lambda x, s: x[:, :1])
    del one["mix"]["000-000"]["router"]
    np.testing.assert_allclose(output(MIX, same), output(single, one), atol=1e-5)


def test_acceptance_3_optimised_equals_naive():
    """Shared W_g x, W_u x and one W_d against a whole FFN an expert, in values and in gradients."""
    adapters = noisy(MIX)
    naive, _ = reference.forward(np, MIX, *map(reference.as_float64, (base(ONE), adapters)), BATCH)
    np.testing.assert_allclose(output(MIX, adapters), naive[VALID], atol=1e-5)
    probe = np.random.default_rng(9).standard_normal((*VALID.shape, ONE.width)).astype(np.float32) * VALID[..., None]
    slow = jax.jit(jax.grad(lambda a: (reference.forward(jnp, MIX, base(ONE), a, BATCH)[0] * probe).sum()))(adapters)
    largest = max(np.abs(x).max() for x in jax.tree.leaves(slow))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * largest), gradient(MIX, adapters), slow
    )


def test_acceptance_4_k_equal_e_sums_experts_and_is_not_the_averaged_delta():
    every = model(FFN, 4, ("softmax_topk", dict(k=4)))
    adapters = noisy(every)
    params, tree = map(reference.as_float64, (base(ONE), adapters))
    wanted, decisions = reference.forward(np, every, params, tree, BATCH)
    (decision,) = decisions.values()
    np.testing.assert_allclose(decision.gates[VALID], decision.probs[VALID], atol=1e-12)
    np.testing.assert_allclose(output(every, adapters), wanted[VALID], atol=1e-5)

    mixed = model(
        ("gate", "up", "down"), 4, ("softmax_topk", dict(k=4, share="ffn"))
    )  # deltas mixed in each projection
    assert np.abs(output(mixed, adapters) - output(every, adapters)).max() > 1e-3, "the mixing is after the activation"
    first = lambda x, s: np.broadcast_to(x[:, :1], x.shape)  # noqa: E731
    equal = edit(adapters, A=first, B=first)
    np.testing.assert_allclose(output(mixed, equal), output(every, equal), atol=1e-5)


def test_acceptance_5_balance_is_k_at_uniform_and_e_at_collapse_with_gradient_through_p_alone():
    E, K, L, T = 8, 2, 3, 32
    loss = Balance(over="all", normalise="tokens")
    ids = jnp.ones((1, T), jnp.int32)
    ctx = Context(ids > 0, *[ids] * 4, max_segments=1)

    @jax.jit
    def value(z, selected):
        probs = jax.nn.softmax(z, axis=-1)
        each = [loss.stats(routing.finish(probs[i], selected[i], z[i], probs[i], ctx, k_max=K), ctx) for i in range(L)]
        return loss.value({"ffn": {"000-002": {"ffn": jax.tree.map(lambda *x: jnp.stack(x), *each)}}})

    spread = (np.arange(T)[:, None] + np.arange(K)) % E
    uniform = np.broadcast_to((np.eye(E)[spread] > 0).any(1), (L, 1, T, E))
    assert float(value(np.zeros((L, 1, T, E), np.float32), uniform)) == pytest.approx(K)
    first = np.broadcast_to(np.arange(E) == 0, (L, 1, T, E))  # all mass and every first choice on expert 0
    collapsed = np.where(first, np.float32(50), np.float32(0))
    pair = first | (np.arange(E) == 1)
    assert float(value(collapsed, pair)) == pytest.approx(E)

    # through P only: f is a constant, so the derivative is that of E * sum f P at fixed f
    z = jax.random.normal(jax.random.key(0), (L, 1, T, E))
    selected = routing.top_k(z, K)
    f = np.asarray(selected).reshape(-1, E).mean(axis=0)
    at_fixed_f = lambda z: E * jnp.sum(f * jax.nn.softmax(z, axis=-1).reshape(-1, E).mean(axis=0))  # noqa: E731
    wanted = jax.jit(jax.grad(at_fixed_f))(z)
    np.testing.assert_allclose(jax.jit(jax.grad(value))(z, selected), wanted, atol=1e-7)

    # pooled over layers, not summed: opposite collapse in two layers cancels (trap: the coefficient times L)
    apart = jnp.stack([collapsed[0], collapsed[0, ..., ::-1]])
    halves = jnp.stack([pair[0], pair[0, ..., ::-1]])
    probs = jax.nn.softmax(apart, axis=-1)
    each = [loss.stats(routing.finish(probs[i], halves[i], apart[i], probs[i], ctx, k_max=K), ctx) for i in range(2)]
    pooled = loss.value({"ffn": {"000-001": {"ffn": jax.tree.map(lambda *x: jnp.stack(x), *each)}}})
    assert float(pooled) == pytest.approx(E / 2)


def test_acceptance_6_router_learns_from_the_lm_and_unselected_experts_do_not():
    """Every expert has tokens; then expert 3 may not be chosen, and it alone is left without a gradient."""
    adapters = noisy(MIX)
    decided = reference.forward(np, MIX, *map(reference.as_float64, (base(ONE), adapters)), BATCH)[1]
    (d,) = decided.values()
    assert d.selected[VALID].any(axis=0).all()
    allowed = dict(BATCH, allowed=jnp.array([True, True, True, False]))
    probe = np.random.default_rng(1).standard_normal((*VALID.shape, ONE.width)).astype(np.float32) * VALID[..., None]
    g = jax.jit(jax.grad(lambda a: (MIX.hidden(base(ONE), a, {}, allowed)[0] * probe).sum()))(adapters)
    leaves = g["mix"]["000-000"]
    for site in ("gate", "up", "down"):
        for leaf in ("A", "B"):
            size = np.abs(leaves[site][leaf][0]).reshape(4, -1).max(axis=1)
            assert (size[:3] > 0).all() and size[3] == 0, f"{site}/{leaf}"
    W = np.abs(leaves["router"]["ffn"]["W"][0]).max(axis=1)
    assert (W[:3] > 0).all() and W[3] == 0


def test_acceptance_7_dora_on_attention_changes_attention_alone():
    """MixDoRA: the start is the base, and the routed FFN's factors and their values are those of MixLoRA."""
    attn, dora = model(("q", "k", "v", "o"), 1), model(("q", "k", "v", "o"), 1, adapter="dora")
    start = fresh_adapters(dora, jax.random.key(0), base(ONE))
    np.testing.assert_allclose(output(dora, start), frozen(), atol=1e-5)
    both = {
        name: dataclasses.replace(MIX, rules=(dataclasses.replace(one.rules[0], name="attn"), *MIX.rules))
        for name, one in (("lora", attn), ("dora", dora))
    }
    key = jax.random.key(1)
    trees = {name: fresh_adapters(m, key, base(ONE)) for name, m in both.items()}
    jax.tree.map(np.testing.assert_array_equal, trees["lora"]["mix"], trees["dora"]["mix"])
    assert set(trees["dora"]["attn"]["000-000"]["q"]) == {"A", "B", "m"}
    for name in both:
        trees[name]["mix"] = noisy(MIX)["mix"]
    outputs = {name: output(m, trees[name]) for name, m in both.items()}
    np.testing.assert_allclose(outputs["lora"], outputs["dora"], atol=1e-5)
    trees["dora"]["attn"]["000-000"]["q"]["m"] *= 1.5
    assert np.abs(output(both["dora"], trees["dora"]) - outputs["lora"]).max() > 1e-3
