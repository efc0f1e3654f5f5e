"""AdaMoLE: the acceptance list of its specification, item by item (the numbers are the list's)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from molora_jax.core.types import Site
from molora_jax.losses import LOSSES
from molora_jax.routers import ROUTERS
from tests.acceptance import small

THRESHOLD = ROUTERS["learned_threshold"]
AS_SHIPPED = THRESHOLD()
P = [0.4, 0.3, 0.15, 0.1, 0.05]
T, D, E, R = 40, 16, 8, 4
LORA = small.lora(R, 16.0)  # alpha over the rank of one expert: 4


def normal(*shape, seed=0):
    return jax.device_put(np.float32(np.random.default_rng(seed).standard_normal(shape)))


def at(probs, tau, **options):
    """The decision for given probabilities `[T, E]` and one threshold: sigmoid(0) is half of tau_max."""
    probs = jnp.atleast_2d(jnp.asarray(probs, jnp.float32))
    n = probs.shape[-1]
    leaves = {"W": jnp.eye(n), "w_tau": jnp.zeros((1, n)), "b_tau": jnp.zeros(1)}
    return decide(leaves, jnp.log(probs), THRESHOLD(ceiling=2 * n * tau, **options))


def random_leaves(n=E, seed=1):
    return {"W": normal(n, D, seed=seed) / 2, "w_tau": normal(1, D, seed=seed + 1), "b_tau": normal(1, seed=seed + 2)}


def decide(leaves, x, router=AS_SHIPPED, **changes):
    return small.routed(router, leaves, {}, x[None], small.context(1, len(x), **changes))[0]


@functools.partial(jax.jit, static_argnums=0)
def step(router, leaves, factors, x, probe):
    """`(y, gradients of sum(probe * y) with respect to the router's leaves and the factors)`."""
    form = lambda p, f: small.change(LORA, f, decide(p, x, router).gates[0], x)  # noqa: E731
    return form(leaves, factors), jax.grad(lambda p, f: jnp.sum(probe * form(p, f)), argnums=(0, 1))(leaves, factors)


X, PROBE = normal(T, D, seed=9), normal(T, 24, seed=10)


@pytest.mark.parametrize(
    "tau, gates",
    [(0.2, [2 / 3, 1 / 3, 0, 0, 0]), (0.1, [0.5455, 0.3636, 0.0909, 0, 0]), (0.05, [0.4667, 0.3333, 0.1333, 0.0667, 0]),
     (0.0, P)],
)  # fmt: skip
def test_acceptance_1_numbers_of_the_list(tau, gates):
    np.testing.assert_allclose(at(P, tau).gates[0, 0], gates, atol=6e-5)


def test_acceptance_2_up_to_one_over_E_every_token_has_an_expert_and_gates_sum_to_one():
    for ceiling in (0.3, 1.0):
        for scale in (1e-3, 1.0, 30.0):
            leaves = jax.tree.map(lambda w, s=scale: s * w, random_leaves())
            decision = decide(leaves, normal(500, D, seed=4), THRESHOLD(ceiling=ceiling))
            assert decision.selected.any(-1).all() and decision.gates.min() >= 0
            np.testing.assert_allclose(decision.gates.sum(-1), 1, rtol=1e-5)
            assert not decision.base_gate.any()


def test_acceptance_2_shut_out_experts_and_padding_take_no_part():
    allowed, valid = jnp.arange(E) % 3 > 0, jnp.arange(T)[None] < 30
    for ceiling in (0.0, 1.0):
        decision = decide(random_leaves(), X, THRESHOLD(ceiling=ceiling), allowed=allowed, valid=valid)
        assert not decision.selected[..., ~np.asarray(allowed)].any() and not decision.selected[0, 30:].any()
        np.testing.assert_allclose(decision.gates.sum(-1), valid, rtol=1e-5)
        np.testing.assert_array_equal(decision.base_gate, ~valid)


def test_acceptance_3_a_ceiling_of_0_is_the_dense_softmax_mixture():
    leaves, factors = random_leaves(), small.factors(E, R, D)
    y, (g, gf) = step(THRESHOLD(ceiling=0.0), leaves, factors, X, PROBE)
    y_dense, (g_dense, gf_dense) = step(ROUTERS["softmax_topk"](k=0), leaves, factors, X, PROBE)
    near = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    jax.tree.map(near, (y, g["W"], gf), (y_dense, g_dense["W"], gf_dense))
    assert not np.asarray(g["w_tau"]).any() and not np.asarray(g["b_tau"]).any()


def test_acceptance_4_no_expert_reaches_a_threshold_of_1():
    leaves = random_leaves() | {"b_tau": jnp.full(1, 50.0)}
    y, gradients = step(THRESHOLD(ceiling=float(E)), leaves, small.factors(E, R, D), X, PROBE)
    assert not np.asarray(y).any()
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))
    assert decide(leaves, X, THRESHOLD(ceiling=float(E))).base_gate.all(), "a routed FFN keeps the frozen one"


def test_acceptance_5_one_active_expert_has_weight_1_and_teaches_neither_gate_nor_threshold():
    leaves, factors = random_leaves(), small.factors(E, R, D)
    decision = decide(leaves, X, THRESHOLD(ceiling=3.0))
    one = np.flatnonzero(decision.selected[0].sum(-1) == 1)
    assert 5 < len(one) < T
    np.testing.assert_allclose(decision.gates[0, one].max(-1), 1, rtol=1.2e-7)  # a / a, to one unit in the last place
    alone, rest = (np.zeros((T, 1), np.float32) for _ in "12")
    alone[one], rest[~np.isin(np.arange(T), one)] = 1, 1
    (g, _), (usual, _) = (step(THRESHOLD(ceiling=3.0), leaves, factors, X, PROBE * mask)[1] for mask in (alone, rest))
    for name in leaves:
        np.testing.assert_allclose(g[name], 0, atol=1e-5 * np.abs(usual[name]).max())


def test_acceptance_6_the_gradient_of_the_threshold_is_the_closed_form_and_the_finite_difference():
    ceiling, leaves = 1.0, random_leaves()
    gates = lambda b: decide(leaves | {"b_tau": b[None]}, X, THRESHOLD(ceiling=ceiling)).gates[0]  # noqa: E731
    got = np.asarray(jax.jit(jax.jacfwd(gates))(leaves["b_tau"][0]), np.float64)
    x, W, w, b = (np.asarray(v, np.float64) for v in (X, leaves["W"], leaves["w_tau"], leaves["b_tau"]))
    p = np.exp(x @ W.T)
    p /= p.sum(-1, keepdims=True)
    tau_of = lambda b: ceiling / E / (1 + np.exp(-(x @ w.T + b)))  # noqa: E731
    tau = tau_of(b)
    S = p >= tau
    n, mass = S.sum(-1, keepdims=True), (p * S).sum(-1, keepdims=True)
    slope = tau * (1 - tau * E / ceiling)  # of tau with respect to b
    closed = np.where(S, (n * p - mass) / (mass - n * tau) ** 2, 0) * slope
    np.testing.assert_allclose(got, closed, rtol=1e-3, atol=1e-5)

    def weights(tau):
        return np.where(S, p - tau, 0) / np.where(S, p - tau, 0).sum(-1, keepdims=True)

    h = 1e-6
    np.testing.assert_allclose(closed, (weights(tau_of(b + h)) - weights(tau_of(b - h))) / (2 * h), atol=1e-7)


def test_acceptance_7_a_loop_over_gathered_tokens_equals_the_product():
    leaves, factors = random_leaves(), small.factors(E, R, D)
    y, _ = step(THRESHOLD(), leaves, factors, X, PROBE)
    x, W, w, b = (np.asarray(v, np.float64) for v in (X, leaves["W"], leaves["w_tau"], leaves["b_tau"]))
    p = np.exp(x @ W.T)
    excess = p / p.sum(-1, keepdims=True) - 1 / E / (1 + np.exp(-(x @ w.T + b)))
    total, want = np.maximum(excess, 0).sum(-1), np.zeros(y.shape)
    A, B = (np.asarray(factors[n], np.float64) for n in "AB")
    for e in range(E):
        mine = np.flatnonzero(excess[:, e] >= 0)
        want[mine] += (excess[mine, e] / total[mine])[:, None] * (4.0 * x[mine] @ A[e].T @ B[e])
    np.testing.assert_allclose(y, want, rtol=1e-3, atol=1e-4)


def balance(decisions):
    """The loss as the config has it, without its weight: a sum over routers."""
    loss = LOSSES["balance"](over="site", reduce="sum", normalise="tokens")
    sums = [loss.stats(d, small.context(1, d.gates.shape[1])) for d in decisions]
    return loss.value({"r": {"0": {str(i): jax.tree.map(lambda v: v[None], s) for i, s in enumerate(sums)}}})


def test_acceptance_8_the_balance_loss_is_on_the_excess():
    uniform = np.full((6, E), 1 / E)
    np.testing.assert_allclose(balance([at(uniform, 0.05)]), E * (1 - E * 0.05), rtol=1e-5)
    np.testing.assert_allclose(balance([at(uniform, 1 / (2 * E))] * 3), 3 * 4.0, rtol=1e-5)  # summed over routers
    np.testing.assert_allclose(balance([at(uniform, 0.05, balance_on="probs")]), E, rtol=1e-5)
    tau = np.asarray(jax.nn.sigmoid(X @ random_leaves()["w_tau"].T + random_leaves()["b_tau"])) / E
    decision = decide(random_leaves(), X)
    np.testing.assert_allclose(decision.averaged.mean((0, 1)).sum(), 1 - E * tau.mean(), rtol=1e-5)
    assert decision.averaged.min() < 0, "negative entries stay"
    f, Q = np.asarray(decision.selected[0], np.float64).mean(0), np.asarray(decision.averaged[0], np.float64).mean(0)
    np.testing.assert_allclose(balance([decision]), E * (f * Q).sum(), rtol=1e-5)


def test_acceptance_8_counts_carry_no_gradient_and_the_loss_pushes_the_threshold_up():
    leaves = random_leaves()
    f = np.asarray(decide(leaves, X).selected[0]).mean(0)

    def by_hand(p):
        tau = jax.nn.sigmoid(X @ p["w_tau"].T + p["b_tau"]) / E
        return E * jnp.sum(f * (jax.nn.softmax(X @ p["W"].T) - tau).mean(0))

    got, want = (jax.jit(jax.grad(f))(leaves) for f in (lambda p: balance([decide(p, X)]), by_hand))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)
    assert float(got["b_tau"][0]) < 0


def test_acceptance_8_the_config_sums_over_all_routers():
    config = small.config("adamole")
    loss, rule = config.losses.balance, config.method.rules["attn"]
    assert (loss.over, loss.reduce, loss.normalise, loss.counts, loss.weight) == ("site", "sum", "tokens", "hard", 1e-3)
    assert rule.adapter.alpha / rule.adapter.rank == 4.0 and rule.router.ceiling == 1.0


def test_acceptance_9_one_expert_is_plain_lora():
    factors = small.factors(1, R, D)
    y, _ = step(THRESHOLD(ceiling=0.9), random_leaves(1), factors, X, PROBE)
    np.testing.assert_allclose(y, 4.0 * X @ factors["A"][0].T @ factors["B"][0], rtol=1e-4, atol=1e-4)


def test_the_threshold_starts_near_half_of_its_ceiling():
    leaves = THRESHOLD(init="kaiming").init_leaves(jax.random.key(0), Site("q", D, 24, (0,), E), 0)
    assert {name: leaf.shape for name, leaf in leaves.items()} == {"W": (E, D), "w_tau": (1, D), "b_tau": (1,)}
    assert all(0 < np.abs(leaf).max() <= D**-0.5 for leaf in leaves.values())
