"""LD-MoLE: the acceptance list of its specification, item by item (the numbers are the list's)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from molora_jax import config as schema
from molora_jax.backbones.compile import compile_model
from molora_jax.core.types import Site
from molora_jax.errors import InputError
from molora_jax.losses import LOSSES, sparsity
from molora_jax.routers import ROUTERS
from molora_jax.routers import sparsegen as module
from tests.acceptance import small
from tests.battery.cases import fresh_adapters

ROUTER = ROUTERS["sparsegen"]
E, D, T = 8, 16, 64
FEW = dict(method__rules__all__sites="q,down", method__rules__all__router__hidden=8)
rng = np.random.default_rng
sparsegen, lower = jax.jit(module.sparsegen), jax.jit(sparsity.lower, static_argnums=1)


def independent(u, lam):
    """float64, by bisection of sum max(u - tau, 0) = 1 - lambda: no sort, no closed form."""
    u, left = np.asarray(u, np.float64), 1 - np.float64(lam)
    low, high = u.min() - left, u.max()
    for _ in range(200):
        tau = (low + high) / 2
        low, high = (tau, high) if np.maximum(u - tau, 0).sum() > left else (low, tau)
    return np.maximum(u - tau, 0) / left


def inputs(seed=0, n=T):
    return jax.device_put(np.float32(rng(seed).standard_normal((1, n, D))))


def made(router, seed=1):
    """Its leaves, and shared ones in which the hidden layer is alive."""
    leaves = {"W": jax.device_put(np.float32(rng(seed).standard_normal((E, D)) / 2))}
    site = Site("q", D, D, (0,), E)
    shared = router.init_shared(jax.random.key(seed), (site,))
    return leaves, jax.tree.map(lambda v: v + 0.4 * rng(seed).standard_normal(v.shape).astype(np.float32), shared)


def test_acceptance_1_numbers_of_the_specification():
    u = jnp.array([1, 0.5, 0, -0.5])
    for lam, wanted in (
        (0, [0.75, 0.25, 0, 0]), (-1, [0.5833, 0.3333, 0.0833, 0]), (-2, [0.5, 0.3333, 0.1667, 0]), (0.5, [1, 0, 0, 0]),
    ):  # fmt: skip
        np.testing.assert_allclose(sparsegen(u, jnp.float32(lam)), wanted, atol=5e-5)


def test_acceptance_2_a_point_of_the_simplex_whatever_the_shift_and_the_order():
    u = jax.device_put(np.float32(3 * rng(0).standard_normal((512, E))))
    lam = jax.device_put(np.float32(rng(1).uniform(-5, 0.98, 512)))
    p = np.asarray(sparsegen(u, lam))
    np.testing.assert_allclose(p.sum(-1), 1, atol=1e-6)
    assert (p >= 0).all() and (p.max(-1) > 0).all()
    np.testing.assert_allclose(sparsegen(u + 2.5, lam), p, atol=2e-5 / 0.02)  # u + 2.5 is rounded, then over 1 - lambda
    np.testing.assert_array_equal(sparsegen(u + 4.0, jnp.zeros(512)) > 0, sparsegen(u, jnp.zeros(512)) > 0)
    order = rng(2).permutation(E)
    np.testing.assert_allclose(sparsegen(u[:, order], lam), p[:, order], atol=1e-6)


def test_acceptance_3_it_is_sparsemax_of_the_scaled_logits():
    u = rng(0).standard_normal((50, E)).astype(np.float32)
    lam = rng(1).uniform(-5, 0.9, 50).astype(np.float32)
    for given, scaled in ((np.zeros_like(lam), u), (lam, u / (1 - lam[:, None]))):
        wanted = [independent(row, 0.0) for row in scaled]
        np.testing.assert_allclose(sparsegen(jnp.asarray(u), jnp.asarray(given)), wanted, atol=2e-5)


def test_acceptance_4_k_experts_are_active_between_the_bounds():
    with jax.enable_x64(True):
        u = jnp.asarray(rng(0).standard_normal((40, E)))
        active = lambda lam: np.asarray((sparsegen(u, lam) > 0).sum(-1))  # noqa: E731
        for k in range(1, E):
            ranked = -np.sort(-np.asarray(u), axis=-1)
            total = ranked[:, :k].sum(-1)
            low, high = 1 - (total - k * ranked[:, k]), 1 - (total - k * ranked[:, k - 1])
            np.testing.assert_allclose(lower(u, k), low, atol=1e-12)
            high = np.minimum(high, 0.99) if k == 1 else high
            assert (active(jnp.asarray(low + 1e-9)) == k)[low + 1e-9 < high].all()
            assert (active(jnp.asarray(high - 1e-9)) == k)[low < high - 1e-9].all()
            assert (active(jnp.asarray(low - 1e-9)) == k + 1).all()


def test_acceptance_4_the_bound_itself_belongs_to_fewer_experts():
    """Numbers without rounding: at lambda = lower_k the expert k + 1 has weight 0 and is not active."""
    u = jnp.array([1.0, 0.5, 0.25, -1.0])
    assert [int((sparsegen(u, lower(u, k)) > 0).sum()) for k in (1, 2, 3)] == [1, 2, 3]


def test_acceptance_5_derivatives_are_the_closed_forms():
    derivatives = jax.jit(jax.jacobian(sparsegen, (0, 1)))
    with jax.enable_x64(True):
        for u, lam in ((rng(s).standard_normal(E), l) for s in range(4) for l in (-3.0, 0.0, 0.6)):  # noqa: E741
            p = np.asarray(sparsegen(jnp.asarray(u), jnp.asarray(lam)))
            of_u, of_lam = derivatives(jnp.asarray(u), jnp.asarray(lam))
            on = (p > 0).astype(float)
            k = on.sum()
            np.testing.assert_allclose(of_u, (np.diag(on) - np.outer(on, on) / k) / (1 - lam), atol=1e-12)
            np.testing.assert_allclose(of_lam, on * (p - 1 / k) / (1 - lam), atol=1e-12)


def test_acceptance_6_equal_logits_are_shared_equally():
    for lam in (-100.0, -1.0, 0.0, 0.5, 0.99):
        np.testing.assert_allclose(sparsegen(jnp.full((3, E), 1.7), jnp.full(3, lam)), 1 / E, atol=1e-6)


def test_acceptance_7_the_sparsity_loss_moves_lambda_alone_until_k_experts_are_active():
    router, loss = ROUTER(hidden=8, bias=0.0), LOSSES["sparsity"](k=2)
    leaves, shared = made(router)
    x, ctx = inputs(), small.context(1, T)

    def value(leaves, shared):
        decision = small.routed(router, leaves, shared, x, ctx)[0]
        return loss.value({"r": {"s": {"q": jax.tree.map(lambda v: v[None], loss.stats(decision, ctx))}}}), decision

    (got, decision), (of_router, of_mlp) = jax.jit(jax.value_and_grad(value, (0, 1), has_aux=True))(leaves, shared)
    ranked = -np.sort(-np.asarray(decision.logits[0], np.float64), axis=-1)
    low = 1 - (ranked[:, 0] + ranked[:, 1] - 2 * ranked[:, 2])
    np.testing.assert_allclose(got, np.maximum(low - decision.sparsity[0], 0).mean(), rtol=1e-5)
    assert got > 0 and not np.asarray(of_router["W"]).any()
    assert all(np.asarray(v).any() for v in jax.tree.leaves(of_mlp))
    most = np.asarray((decision.gates > 0).sum(-1))[0]
    np.testing.assert_array_equal(most <= 2, low <= decision.sparsity[0])
    for shift, zero in ((1e-4, True), (-1e-4, False)):
        stats = loss.stats(decision.replace(sparsity=jnp.asarray(low + shift, jnp.float32)[None]), ctx)
        assert (float(stats["hinge"]) == 0) == zero


def test_acceptance_7_padding_is_not_in_the_loss_and_few_experts_need_none():
    router, loss = ROUTER(learned=False, fixed=-2.0), LOSSES["sparsity"](k=2)
    leaves, _ = made(router)
    ctx = small.context(1, T, valid=jnp.arange(T)[None] < 50)
    stats = jax.jit(lambda x, W: loss.stats(router.route({"W": W}, {}, x, ctx)[0], ctx))
    of = lambda x, W: jax.device_get(stats(x, W))  # noqa: E731
    a, b = of(inputs(), leaves["W"]), of(inputs().at[:, 50:].set(9.0), leaves["W"])
    assert a == b and a["tokens"] == 50 and a["hinge"] > 0
    assert of(inputs(), leaves["W"][:2])["hinge"] == 0


def test_acceptance_8_load_loss_is_one_at_uniform_and_e_at_collapse():
    loss = LOSSES["balance"](**dict(small.config("ld_mole").losses.balance))
    ctx = small.context(1, T, valid=jnp.arange(T)[None] < 50)
    router = ROUTER(learned=False)

    @jax.jit
    def value(x, W):
        stats = loss.stats(router.route({"W": W}, {}, x, ctx)[0], ctx)
        return loss.value({"r": {"s": {"q": jax.tree.map(lambda v: v[None], stats)}}})

    x = jnp.ones((1, T, D))
    assert value(x, jnp.zeros((E, D))) == pytest.approx(1, abs=1e-5)
    assert value(x, jnp.zeros((E, D)).at[3].set(1.0)) == pytest.approx(E, abs=1e-5)
    W = made(router)[0]["W"]
    assert value(inputs(), W) == value(inputs().at[:, 50:].set(9.0), W)


def test_acceptance_9_one_mlp_a_width_whatever_the_depth_and_its_gradient_is_of_all_users():
    for layers in (2, 4):
        decoder = dataclasses.replace(small.DECODER, layers=layers)
        model = compile_model(small.config("ld_mole", **FEW), decoder)
        shared = jax.eval_shape(model.init_adapters, jax.random.key(0), small.base(decoder))["all"]["shared"]
        assert set(shared["lambda"]) == {"32", "48"}  # q reads D = 32, down 48
        assert sum(v.size for v in jax.tree.leaves(shared)) == sum(8 * (width + 2) + 1 for width in (32, 48))
    router, x, ctx = ROUTER(hidden=8, bias=0.0), inputs(), small.context(1, T)
    leaves, own = made(router)
    other = {"W": leaves["W"][::-1] * 2}

    def users(first, second):
        gates = [small.routed(router, w, s, x, ctx)[0].gates for w, s in ((leaves, first), (other, second))]
        return sum(jnp.sum(g * g) for g in gates)

    one = jax.jit(jax.grad(lambda s: users(s, s)))(own)
    first, second = jax.jit(jax.grad(users, (0, 1)))(own, own)
    jax.tree.map(lambda a, b, c: np.testing.assert_allclose(a, b + c, rtol=1e-4, atol=1e-5), one, first, second)


def test_acceptance_10_fresh_factors_change_nothing_and_one_expert_is_plain_lora():
    model, params, _, state = small.build("ld_mole", **FEW)
    fresh, data = fresh_adapters(model, jax.random.key(0), params), small.batch()
    run = lambda model, a, s: jax.jit(lambda a: model.hidden(params, a, s, data)[0])(a)  # noqa: E731
    np.testing.assert_array_equal(run(model, fresh, state), run(model.without_rules(), {}, {}))
    router = ROUTER(hidden=8, bias=0.0)
    leaves, shared = made(router)
    decision = small.routed(router, {"W": leaves["W"][:1]}, shared, inputs(), small.context(1, T))[0]
    np.testing.assert_array_equal(decision.gates, 1.0)


def test_the_reference_bias_starts_with_a_dead_hidden_layer_and_a_constant_lambda():
    """The specification's computation: log sigmoid(-2.5) + 0.99 = -1.59 for every token; with bias 0 it varies."""
    site = Site("q", 512, 512, (0,), E)
    x = jax.device_put(np.float32(rng(0).standard_normal((1, 200, 512))))
    for bias, spread in ((-2.5, (0, 1e-3)), (0.0, (0.05, 1))):
        router = ROUTER(hidden=64, bias=bias)
        lam = np.asarray(router.sparsity(router.init_shared(jax.random.key(0), (site,)), x))
        assert spread[0] <= lam.std() <= spread[1]
        if bias:
            np.testing.assert_allclose(lam.mean(), -1.589, atol=2e-3)


def test_router_and_mlp_read_the_dropped_input():
    router = ROUTER(hidden=8, bias=0.0)
    leaves, shared = made(router)
    changes = dict(key=jax.random.key(3), train=True, dropout=0.5)
    seen = small.routed(router, leaves, shared, inputs(), small.context(1, T, **changes))[0]
    plain = small.routed(router, leaves, shared, inputs(), small.context(1, T))[0]
    assert not np.allclose(seen.logits, plain.logits) and not np.allclose(seen.sparsity, plain.sparsity)
    off = ROUTER(hidden=8, bias=0.0, input_dropout=False)
    np.testing.assert_array_equal(
        small.routed(off, leaves, shared, inputs(), small.context(1, T, **changes))[0].gates, plain.gates
    )


def test_the_sparsity_loss_is_refused_beside_other_routers():
    config = small.config("dynamic_moe")
    with config.unlocked():
        config.losses = dict(sparsity=dict(weight=0.1))
    with pytest.raises(InputError, match="losses.sparsity: got a loss beside 'top_p'.*sparsegen"):
        schema.validate(config)
