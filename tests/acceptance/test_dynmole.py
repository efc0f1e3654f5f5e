"""DynMoLE: the acceptance list of its specification, item by item (the numbers are the list's)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from molora_jax.core import entropy
from molora_jax.losses import LOSSES
from molora_jax.routers import ROUTERS
from tests.acceptance import small

HYBRID = ROUTERS["entropy_hybrid"]
STEEP = [0.5, 0.3, 0.1, 0.05, 0.03, 0.02]


def random_probs(n=64, E=6, seed=0):
    z = 2 * np.random.default_rng(seed).standard_normal((n, E))
    return np.exp(z) / np.exp(z).sum(-1, keepdims=True)


def tsallis(p, q):
    """Normalised, float64, by the formula alone."""
    return (1 - (p**q).sum(-1)) / (1 - p.shape[-1] ** (1 - q))


def shannon(p):
    return -(p * np.log(p)).sum(-1) / np.log(p.shape[-1])


def test_acceptance_1_tsallis_near_one_is_shannon():
    p = random_probs()
    np.testing.assert_allclose(tsallis(p, 1 + 1e-6), shannon(p), atol=1e-6)
    for q in (1.0, 1 - 1e-6, 1 + 1e-6, 1 + 9e-4):  # the Shannon branch
        np.testing.assert_allclose(entropy.normalised(jnp.asarray(p), kind="tsallis", q=q), shannon(p), atol=1e-6)
    for q in (0.5, 0.9, 1.05, 1.1, 2.0):
        value = entropy.normalised(jnp.asarray(p, jnp.float32), kind="tsallis", q=q)
        np.testing.assert_allclose(value, tsallis(p, q), atol=1e-5)


@pytest.mark.parametrize("kind", ["tsallis", "renyi", "shannon"])
@pytest.mark.parametrize("q", [0.5, 0.9, 1.0, 1.1, 1.5, 2.0])
def test_acceptance_2_uniform_is_one_and_one_hot_is_zero(kind, q):
    for E in (2, 6, 64):
        p = jnp.stack([jnp.full(E, 1 / E), jnp.eye(E)[1]])
        np.testing.assert_allclose(entropy.normalised(p, kind=kind, q=q), [1, 0], atol=2e-6)


def test_acceptance_2_numbers_of_the_reference_code():
    z = jnp.array([[1, 0, 0, 0, 0, 0], [2, 1, 0, 0, 0, 0], [3, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]], jnp.float32)
    H = entropy.normalised(jax.nn.softmax(z), kind="tsallis", q=1.1, eps=1e-5)
    np.testing.assert_allclose(H, [0.942, 0.780, 0.442, 0.99966], atol=6e-4)
    np.testing.assert_allclose(entropy.normalised(jnp.eye(6)[0], kind="tsallis", q=1.1, eps=1e-5), -1.6e-4, atol=2e-5)
    decision = small.from_probs(HYBRID(), jax.nn.softmax(z))
    np.testing.assert_array_equal(decision.selected[0].sum(-1), [6, 2, 2, 6])
    np.testing.assert_allclose(decision.gates[0, 2].sum(), 0.84, atol=5e-3)


def test_acceptance_2_shut_out_experts_have_no_share_in_the_entropy():
    allowed = jnp.array([True, True, False, True, False, False])
    p = jnp.where(allowed, 1 / 3, 0.0)
    for kind in ("tsallis", "renyi", "shannon"):
        np.testing.assert_allclose(entropy.normalised(p, kind=kind, q=1.1, allowed=allowed), 1.0, atol=1e-5)
    decision = small.from_probs(HYBRID(), jnp.full(6, 1 / 6), allowed=allowed)
    np.testing.assert_allclose(decision.gates[0, 0], p, atol=1e-6)


def test_acceptance_3_threshold_of_one_is_never_soft_and_a_tiny_one_is_the_dense_mixture():
    p = np.concatenate([random_probs(), np.full((1, 6), 1 / 6)])
    never = small.from_probs(HYBRID(threshold=1.0), p)
    c = np.cumsum(-np.sort(-p, axis=-1), axis=-1)
    np.testing.assert_array_equal(never.selected[0].sum(-1), np.maximum((c <= 0.75).sum(-1), 2))
    assert never.selected.sum(-1).max() <= never.k_max < 6
    always = small.from_probs(HYBRID(threshold=1e-6), p)
    np.testing.assert_allclose(always.gates[0], p, atol=1e-6)
    leaves, x = small.factors(6, 4), jax.device_put(np.float32(np.random.default_rng(1).standard_normal((len(p), 16))))
    dense = sum(p[:, e : e + 1] * (x @ leaves["A"][e].T @ leaves["B"][e]) for e in range(6))
    np.testing.assert_allclose(small.change(small.lora(4, 4.0), leaves, always.gates[0], x), dense, atol=1e-5)


def test_acceptance_3_the_entropy_decides_for_each_token():
    decision = small.from_probs(HYBRID(), [STEEP, [1 / 6] * 6, STEEP])
    np.testing.assert_array_equal(decision.selected[0].sum(-1), [2, 6, 2])


def test_acceptance_4_floor_of_one_and_no_mass_is_the_argmax_with_its_own_weight():
    p = random_probs()
    decision = small.from_probs(HYBRID(k=1, p=1e-9, threshold=1.0), p)
    np.testing.assert_array_equal(decision.selected[0], np.eye(6, dtype=bool)[p.argmax(-1)])
    np.testing.assert_allclose(decision.gates[0].max(-1), p.max(-1), rtol=1e-5)


def test_acceptance_5_the_crossing_expert_is_not_kept():
    one, two = (small.from_probs(HYBRID(k=k, p=0.75), STEEP) for k in (1, 2))
    np.testing.assert_array_equal(one.selected[0, 0], [True] + [False] * 5)
    np.testing.assert_array_equal(two.selected[0, 0], [True, True] + [False] * 4)
    shuffled = small.from_probs(HYBRID(k=1, p=0.85), np.array(STEEP)[[3, 1, 5, 0, 2, 4]])
    np.testing.assert_array_equal(shuffled.selected[0, 0], [False, True, False, True, False, False])


def test_acceptance_6_weights_are_the_probabilities_without_renormalisation():
    p = random_probs()
    for router in (HYBRID(), HYBRID(threshold=1.0), HYBRID(kind="renyi", q=1.5)):
        decision = small.from_probs(router, p)
        np.testing.assert_allclose(decision.gates[0], p * np.asarray(decision.selected[0]), rtol=1e-5)
        assert decision.gates.sum(-1).max() <= 1 + 1e-6
        assert decision.selected.sum(-1).min() >= 2


def entropy_loss(z):
    loss = LOSSES["entropy"](kind="tsallis")
    decision = small.routed(HYBRID(), {"W": jnp.eye(z.shape[-1])}, {}, z[None], small.context(1, len(z)))[0]
    return small.loss_value(loss, decision, small.context(1, len(z)))


def test_acceptance_7_entropy_loss_is_flat_at_uniform_and_drives_to_one_hot():
    gradient = jax.jit(jax.grad(entropy_loss))
    np.testing.assert_allclose(gradient(jnp.zeros((3, 6))), 0, atol=1e-7)
    z = jax.device_put(np.float32(0.3 * np.random.default_rng(0).standard_normal((8, 6))))
    first = z.argmax(-1)
    for _ in range(400):
        z = z - 40 * gradient(z)
    p = jax.nn.softmax(z)
    assert p.max(-1).min() > 0.99
    np.testing.assert_array_equal(p.argmax(-1), first)


def test_acceptance_7_padding_is_not_in_the_mean():
    loss, ctx = LOSSES["entropy"](kind="tsallis"), small.context(1, 3, valid=jnp.array([[True, True, False]]))
    z = jnp.log(jnp.array([[STEEP, STEEP, [1 / 6] * 6]], jnp.float32))
    decision = small.routed(HYBRID(), {"W": jnp.eye(6)}, {}, z, ctx)[0]
    assert not decision.selected[0, 2].any() and float(decision.gates[0, 2].sum()) == 0
    want = jax.jit(lambda p: entropy.normalised(p, kind="tsallis", q=1.1, eps=1e-5))(jnp.array(STEEP))
    np.testing.assert_allclose(small.loss_value(loss, decision, ctx), want, rtol=1e-5)


def balance_of(decisions, **options):
    loss = LOSSES["balance"](over="all", normalise="tokens", counts="soft", **options)

    @jax.jit
    def pooled(decisions):
        sums = [loss.stats(d, small.context(1, d.gates.shape[1])) for d in decisions]
        return loss.value({"r": {"0": {"gate": jax.tree.map(lambda *x: jnp.stack(x), *sums)}}})

    return pooled(decisions)


def test_acceptance_8_soft_balance_pools_all_routers():
    p, q = random_probs(seed=1), random_probs(seed=2)
    decisions = [small.from_probs(HYBRID(), x) for x in (p, q)]
    w = np.concatenate([d.gates[0] for d in decisions])
    want = 6 * (w.mean(0) * np.concatenate([p, q]).mean(0)).sum()
    np.testing.assert_allclose(balance_of(decisions), want, rtol=1e-5)
    uniform = small.from_probs(HYBRID(), np.full((5, 6), 1 / 6))
    np.testing.assert_allclose(balance_of([uniform]), 1.0, rtol=1e-6)


def test_acceptance_8_both_factors_carry_gradient():
    z = jax.device_put(np.float32(np.random.default_rng(0).standard_normal((9, 6))))

    def value(z, hold):
        d = small.routed(HYBRID(threshold=1e-6), {"W": jnp.eye(6)}, {}, z[None], small.context(1, 9))[0]
        return balance_of([d.replace(gates=jax.lax.stop_gradient(d.gates)) if hold else d])

    slope = jax.jit(jax.grad(value), static_argnums=1)
    both, half = (slope(z, hold) for hold in (False, True))
    np.testing.assert_allclose(both, 2 * half, atol=1e-7)  # dense: w = p, so the two factors are equal


def test_router_learns_from_the_language_model_through_the_gates():
    model, params, adapters, state = small.build("dynmole")
    g = small.lm_gradient(model, params, adapters, state, small.batch())
    for site in ("gate", "up", "down"):
        assert np.abs(g["ffn"]["000-001"]["router"][site]["W"]).max() > 0
