"""SMoRA: the acceptance list of its specification, item by item (the numbers are the list's)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import grouped_lora, rank_gated
from molora_jax.core import lowrank
from molora_jax.core.routing import slots
from molora_jax.core.types import Site
from molora_jax.routers import ROUTERS
from molora_jax.runs.checkpoints import Checkpoints
from molora_jax.training.step import update_routers
from tests.acceptance import small
from tests.battery.cases import fresh_adapters

SIGMOID = ROUTERS["sigmoid_topk"]
T, D, r, k, ALPHA = 9, 16, 32, 8, 16.0  # rank, active rank, the paper's alpha
SITE = Site("q", D, 24, (0,), r)


def inputs(seed=0):
    return jax.device_put(np.float32(np.random.default_rng(seed).standard_normal((T, D))))


def rows(leaves):
    """Stacked `A [r, D_in]`, `B [r, D_out]` of experts of any rank."""
    return (np.asarray(x, np.float64).reshape(-1, x.shape[-1]) for x in (leaves["A"], leaves["B"]))


def decide(router, W, x, b=None, **changes):
    state = router.init_state(SITE) if b is None else {"b": jnp.asarray(b, jnp.float32)}
    decision, _, sums = small.routed(router, {"W": W}, {}, x[None], small.context(1, len(x), state=state, **changes))
    return decision, sums


def W_of(E, seed=2, scale=0.7):
    return jax.device_put(np.float32(scale * np.random.default_rng(seed).standard_normal((E, D))))


FEW = dict(method__rules__all__sites="q,down")  # two of the seven projections compile in a third of the time


@pytest.mark.parametrize("c", [1, 2, 4, 8])
def test_acceptance_1_one_stacked_lora_is_the_sum_of_gated_loras(c):
    E, x = r // c, inputs()
    leaves, gates = small.factors(E, c, D), jax.device_put(np.float32(np.random.default_rng(1).uniform(0, 2, (T, E))))
    A, B = rows(leaves)
    g, x64 = np.asarray(gates, np.float64), np.asarray(x, np.float64)
    stacked = (np.repeat(g, c, axis=1) * (x64 @ A.T)) @ B
    each = lambda e: x64 @ A[e * c : (e + 1) * c].T @ B[e * c : (e + 1) * c]  # noqa: E731
    np.testing.assert_allclose(stacked, sum(g[:, e : e + 1] * each(e) for e in range(E)), atol=1e-6)
    got = small.change(small.lora(c, float(c)), leaves, gates, x)
    np.testing.assert_allclose(got, stacked, rtol=0, atol=1e-6 * np.abs(stacked).max())


@pytest.mark.parametrize("c", [1, 4])
def test_acceptance_2_equal_scores_are_a_lora_of_the_chosen_rows_scaled_by_the_active_rank(c):
    """The config's alpha is the paper's divided by K: `alpha / rank` is then alpha / (K c), the active rank."""
    E, K, x = r // c, k // c, inputs()
    b = np.zeros(E)
    b[5 : 5 + K] = 0.25
    decision, _ = decide(SIGMOID(k=K), jnp.zeros((E, D)), x, b)
    assert (np.flatnonzero(decision.selected[0, 0]) == np.arange(5, 5 + K)).all()
    leaves = small.factors(E, c, D)
    got = small.change(small.lora(c, ALPHA / K), leaves, decision.gates[0], x)
    A, B = rows(leaves)
    want = ALPHA / k * (x @ A[5 * c : (5 + K) * c].T) @ B[5 * c : (5 + K) * c]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_acceptance_2_the_config_scales_by_the_active_rank():
    rule = small.config("smora").method.rules["all"]
    assert (rule.experts, rule.adapter.rank, rule.router.k) == ("64", 1, 8)
    assert rule.adapter.alpha / rule.adapter.rank == 16 / 8


def test_acceptance_3_all_ranks_with_equal_gates_are_plain_lora():
    x, leaves = inputs(), small.factors(r, 1, D)
    decision, _ = decide(SIGMOID(k=r), jnp.zeros((r, D)), x)
    A, B = rows(leaves)
    got = small.change(small.lora(1, ALPHA / r), leaves, decision.gates[0], x)
    np.testing.assert_allclose(got, ALPHA / r * (x @ A.T) @ B, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bias_in_gate", [True, False])
def test_acceptance_4_gates_sum_to_k(bias_in_gate):
    rng = np.random.default_rng(0)
    for seed in range(4):
        b = rng.uniform(-0.2, 0.5, r)
        decision, _ = decide(SIGMOID(k=k, bias_in_gate=bias_in_gate), W_of(r, seed, 1.5), inputs(seed), b)
        np.testing.assert_allclose(decision.gates.sum(-1), k, rtol=1e-5)
        assert (decision.selected.sum(-1) == k).all()
        s = np.asarray(jax.nn.sigmoid(decision.logits), np.float64)
        chosen = np.argsort(-(s + b), axis=-1)[..., :k]  # the bias always chooses; it is in the gate as in the code
        h = np.take_along_axis(s + b if bias_in_gate else s, chosen, -1)
        got = np.take_along_axis(np.asarray(decision.gates), chosen, -1)
        np.testing.assert_allclose(got, k * h / h.sum(-1, keepdims=True), rtol=1e-4)


def test_acceptance_4_shut_out_ranks_take_no_part():
    allowed = jnp.arange(r) % 3 > 0
    decision, _ = decide(SIGMOID(k=k), W_of(r), inputs(), allowed=allowed)
    assert not decision.gates[..., ~np.asarray(allowed)].any()
    np.testing.assert_allclose(decision.gates.sum(-1), k, rtol=1e-5)


def test_acceptance_5_gathered_rows_equal_the_masked_dense_form():
    """The product's two forms, and a gather of each token's k rows of A and columns of B."""
    leaves = {n: x[:, 0] for n, x in small.factors(r, 1, D).items()}  # [r, D]
    x, W = inputs(), W_of(r)
    weight = jax.device_put(np.float32(np.random.default_rng(5).standard_normal((T, 24))))

    def gates_of(x, W):
        return decide(SIGMOID(k=k), W, x)[0].gates[0]

    def dense(x, A, B, W):
        return jnp.sum(weight * rank_gated(x, A[:, None], B[:, None], gates_of(x, W)))

    def grouped(x, A, B, W):
        return jnp.sum(weight * grouped_lora(x, A[:, None], B[:, None], *slots(decide(SIGMOID(k=k), W, x)[0])))

    def gathered(x, A, B, W):
        g, idx = jax.lax.top_k(gates_of(x, W), k)
        z = jnp.einsum("td,tkd->tk", x, A[idx])
        return jnp.sum(weight * jnp.einsum("tk,tkd->td", g * z, B[idx]))

    args = x, leaves["A"], leaves["B"], W
    value, gradients = jax.jit(jax.value_and_grad(gathered, argnums=(0, 1, 2, 3)))(*args)
    for form in (dense, grouped):
        got, own = jax.jit(jax.value_and_grad(form, argnums=(0, 1, 2, 3)))(*args)
        np.testing.assert_allclose(got, value, rtol=1e-5)
        for a, b in zip(own, gradients, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * np.abs(b).max())


def test_acceptance_6_ranks_that_nobody_selects_get_no_gradient():
    model, params, adapters, state = small.build("smora", **FEW)
    state["all"]["000-001"]["router"]["q"]["b"] -= 2.0 * (jnp.arange(64) < 20)  # never among the chosen
    g = small.lm_gradient(model, params, adapters, state, small.batch())["all"]["000-001"]
    for leaf in ("A", "B"):
        assert not np.asarray(g["q"][leaf])[:, :20].any()
        assert np.asarray(g["q"][leaf])[:, 20:].any()


def test_acceptance_7_the_bias_moves_by_u_against_the_load():
    router = SIGMOID(bias_rate=1e-3)
    new = router.update({"b": jnp.array([0.1, 0.2, 0.3])}, {"count": jnp.array([9.0, 3.0, 6.0])})["b"]
    np.testing.assert_allclose(new, [0.1 - 1e-3, 0.2 + 1e-3, 0.3], rtol=1e-6)


def test_acceptance_7_counts_are_of_valid_tokens():
    valid = jnp.arange(T)[None] < 6
    decision, sums = decide(SIGMOID(k=k), W_of(r), inputs(), valid=valid)
    assert float(sums["count"].sum()) == 6 * k
    np.testing.assert_array_equal(sums["count"], decision.selected[0, :6].sum(0))
    assert not decision.gates[0, 6:].any()


def test_acceptance_7_the_bias_has_no_gradient_and_is_mutable_state(tmp_path):
    model, params, adapters, state = small.build("smora", method__rules__all__router__bias_rate=1e-3, **FEW)
    data = small.batch()
    assert "b" not in adapters["all"]["000-001"]["router"]["q"]
    assert {x.shape for x in jax.tree.leaves(state)} == {(2, 64)}
    before = jax.device_get(state)
    stats = small.lm_loss(model, params, adapters, state, data)[1]
    jax.tree.map(np.testing.assert_array_equal, before, state)  # a forward pass, as in evaluation, changes nothing
    sums = {r: {s: {k: v["router"] for k, v in sc.items()} for s, sc in seg.items()} for r, seg in stats.items()}
    moved = update_routers(model, state, sums)
    step = np.abs(np.asarray(moved["all"]["000-001"]["router"]["q"]["b"]))
    assert (np.isclose(step, 1e-3) | (step == 0)).all() and step.max() > 0
    items = {"router_state": moved}
    with Checkpoints(tmp_path / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(1, items, meta={})
    restored = Checkpoints(tmp_path / "checkpoints", keep=1).restore(1, jax.tree.map(np.zeros_like, items))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(moved), restored["router_state"])


def test_acceptance_8_fresh_factors_change_nothing():
    model, params, _, state = small.build("smora", **FEW)
    fresh = fresh_adapters(model, jax.random.key(0), params)
    data = small.batch()
    run = lambda model, a, s: jax.jit(lambda a: model.hidden(params, a, s, data)[0])(a)  # noqa: E731
    np.testing.assert_array_equal(run(model, fresh, state), run(model.without_rules(), {}, {}))


def test_the_router_reads_the_adapters_dropped_input():
    """`input_dropout`: the mask of the site's own adapter, so a dropped feature is dropped for both."""
    x, key = inputs(), jax.random.key(3)
    changes = dict(key=key, train=True, dropout=0.5)
    with_, without = (decide(SIGMOID(input_dropout=on), W_of(r), x, **changes)[0].logits for on in (True, False))
    np.testing.assert_allclose(without[0], x @ W_of(r).T, atol=1e-5)
    seen = lowrank.dropped(x, lowrank.dropout(key, 0.5), jnp.arange(len(x)))  # as placements/projection.py does
    np.testing.assert_allclose(with_[0], seen @ W_of(r).T, atol=1e-5)
