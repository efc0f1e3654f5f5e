"""Dynamic MoE, top-p routing (arXiv 2403.07652): its acceptance list."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from molora_jax.core import routing
from molora_jax.core.types import Context
from molora_jax.losses import LOSSES
from molora_jax.routers import ROUTERS
from molora_jax.training.step import site_metrics
from tests.acceptance import small
from tests.acceptance.blocks import ONE, VALID, edit, gradient, model, noisy, output
from tests.battery import reference
from tests.battery.cases import BATCH, base

T, E, D = 64, 16, 12


def context(shape):
    ids = jnp.ones(shape, jnp.int32)
    return Context(ids > 0, *[ids] * 4)


def routed(W, x, **options):
    return small.routed(ROUTERS["top_p"](**options), {"W": W}, {}, x, context(x.shape[:2]))[0]


def of_probs(probs, **options):
    """The decision at these probabilities `[T, E]`: the logits are their logarithms, through an identity router."""
    probs = np.asarray(probs, np.float32)
    return routed(jnp.eye(probs.shape[-1]), jnp.log(jnp.asarray(probs))[None], **options)


def random_probs(seed, sharpness=1.0):
    return np.random.default_rng(seed).dirichlet(np.full(E, sharpness), T)


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.sampled_from([0.1, 0.4, 0.8, 0.99]), st.sampled_from([0.1, 1.0, 10.0]))
def test_acceptance_1_kept_mass_passes_p_and_not_without_its_last(seed, p, sharpness):
    made = of_probs(np.maximum(random_probs(seed, sharpness), 1e-30), p=p)
    gates, t = np.asarray(made.gates, np.float64)[0], np.asarray(made.selected).sum(-1)[0]
    kept = gates.sum(-1)
    last = np.where(gates > 0, gates, np.inf).min(-1)
    assert (kept > p - 1e-6).all() and (kept - last <= p + 1e-6).all()
    assert t.min() >= 1 and t.max() <= E


def test_acceptance_2_uniform_one_hot_and_p_of_one():
    uniform = np.full((T, E), 1 / E)
    assert (np.asarray(of_probs(uniform, p=0.4).selected).sum(-1) == 7).all()
    hot = np.full((T, E), 1e-30)
    hot[np.arange(T), np.arange(T) % E] = 1.0
    assert (np.asarray(of_probs(hot, p=0.4).selected).sum(-1) == 1).all()
    for p in (1.0, 1.5):
        for probs in (uniform, random_probs(0), hot):
            assert (np.asarray(of_probs(probs, p=p).selected).sum(-1) == E).all()


def test_acceptance_3_gates_sum_to_the_kept_mass():
    made = of_probs(np.full((T, E), 1 / E), p=0.4)
    np.testing.assert_allclose(np.asarray(made.gates).sum(-1), 0.4375, rtol=1e-6)
    made = of_probs(random_probs(1), p=0.4)
    np.testing.assert_allclose(
        np.asarray(made.gates), np.where(made.selected, made.probs, 0), atol=0, err_msg="not renormalised"
    )


def test_acceptance_4_dynamic_loss_lowers_entropy_and_experts():
    """Gradient descent on L_d alone, on the whole distribution, averaged over tokens."""
    x = jax.random.normal(jax.random.key(0), (1, 256, D))
    W = 0.5 * jax.random.normal(jax.random.key(1), (E, D))
    loss = LOSSES["entropy"]()

    def value(W):
        made = routed(W, x, p=0.6)
        lead = jax.tree.map(lambda v: v[None], loss.stats(made, context(x.shape[:2])))
        return loss.value({"ffn": {"000-000": {"ffn": lead}}})

    probs = np.asarray(routed(W, x, p=0.6).probs, np.float64)[0]
    np.testing.assert_allclose(value(W), -(probs * np.log(probs)).sum(-1).mean(), rtol=1e-5)
    after = W - 1.0 * jax.jit(jax.grad(value))(W)
    assert value(after) < value(W)
    experts = lambda W: float(np.asarray(routed(W, x, p=0.6).selected).sum(-1).mean())  # noqa: E731
    assert experts(after) < experts(W)


@pytest.mark.parametrize("sites", [("ffn",), ("up", "down")], ids=",".join)
def test_acceptance_5_padded_form_equals_dense_and_clips_are_counted(sites):
    """All E slots: value and gradient of the masked dense form. Fewer slots: the clip rate is the counted one."""
    whole = model(sites, 6, ("top_p", dict(p=0.6)))
    adapters = noisy(whole)
    params, tree = map(reference.as_float64, (base(ONE), adapters))
    wanted, decisions = reference.forward(np, whole, params, tree, BATCH)
    np.testing.assert_allclose(output(whole, adapters), wanted[VALID], rtol=1e-6, atol=4e-6)
    probe = np.random.default_rng(9).standard_normal((*VALID.shape, ONE.width)).astype(np.float32) * VALID[..., None]
    dense = jax.jit(jax.grad(lambda a: (reference.forward(jnp, whole, base(ONE), a, BATCH)[0] * probe).sum()))(adapters)
    largest = max(np.abs(x).max() for x in jax.tree.leaves(dense))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 * largest), gradient(whole, adapters), dense
    )

    clipped = model(sites, 6, ("top_p", dict(p=0.6, max_experts=2)))
    _, stats, _, gates = clipped.hidden(base(ONE), adapters, {}, BATCH, collect=True)
    sums = {"mix": {s: {k: v["expert_load"] for k, v in sc.items()} for s, sc in stats["mix"].items()}}
    for scope in clipped.rules[0].scopes[:1]:  # the later site's input follows the clipped one
        d = decisions[0, "mix", scope]
        t = d.selected[VALID].sum(-1)
        cut = np.maximum(t - 2, 0).sum()
        assert cut > 0
        metrics = site_metrics(clipped, sums)[f"mix/{scope}"]
        np.testing.assert_allclose(metrics["clipped_share"], [cut / t.sum()], rtol=1e-6)
        np.testing.assert_allclose(metrics["active_experts"], [np.minimum(t, 2).mean()], rtol=1e-6)
        kept = np.asarray(gates["mix"]["000-000"][scope])[0][VALID]
        assert (kept > 0).sum(-1).max() == 2
        np.testing.assert_allclose(kept.max(-1), d.probs[VALID].max(-1), rtol=1e-5, err_msg="the strongest are kept")


def test_acceptance_6_low_p_is_top_1_without_renormalisation():
    low = model(("ffn",), 4, ("top_p", dict(p=0.0)))
    first = model(("ffn",), 4, ("softmax_topk", dict(k=1, renormalise=False)))
    adapters = noisy(low)
    gates = np.asarray(low.hidden(base(ONE), adapters, {}, BATCH, collect=True)[3]["mix"]["000-000"]["ffn"])[0][VALID]
    assert ((gates > 0).sum(-1) == 1).all() and (gates.max(-1) < 1).all()
    np.testing.assert_allclose(output(low, adapters), output(first, adapters), atol=1e-6)


def test_the_frozen_ffn_keeps_what_is_not_kept_and_shrink_gives_it_up():
    """B = 0: the base whatever the kept mass is; with `shrink` the FFN's output is scaled by the kept mass."""
    made = model(("ffn",), 4, ("top_p", dict(p=0.4)))
    silent = edit(noisy(made), B=lambda x, s: 0 * x)
    frozen = output(made.without_rules(), {})
    np.testing.assert_allclose(output(made, silent), frozen, atol=1e-5)
    scaled = dataclasses.replace(made, rules=(dataclasses.replace(made.rules[0], gates_scale_base=True),))
    assert np.abs(output(scaled, silent) - frozen).max() > 0.01
    d = reference.forward(np, made, *map(reference.as_float64, (base(ONE), silent)), BATCH)[1][0, "mix", "ffn"]
    assert d.gates[VALID].sum(-1).max() < 1


@pytest.mark.parametrize("router", [("top_p", dict(p=0.4)), ("softmax_topk", dict(renormalise=False))])
def test_shrink_against_float64(router):
    made = model(("ffn",), 4, router)
    made = dataclasses.replace(made, rules=(dataclasses.replace(made.rules[0], gates_scale_base=True),))
    leaves = noisy(made)
    wanted = reference.forward(np, made, *map(reference.as_float64, (base(ONE), leaves)), BATCH)[0]
    np.testing.assert_allclose(output(made, leaves), wanted[VALID], atol=2e-5)


def test_trap_p_of_one_survives_rounding():
    """Probabilities whose float32 sum is above or below 1: all experts stay, none is lost to a rounded comparison."""
    probs = np.float32(random_probs(5))
    assert (np.cumsum(np.sort(probs)[:, ::-1], axis=1)[:, -1] > 1).any()
    assert np.asarray(routing.top_p(jnp.asarray(probs), 1.0)).all()
