"""DeepSeekMoE: the acceptance list of its specification, item by item (the numbers are the list's)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import molora_jax as mj
from molora_jax import sharding
from molora_jax.backbones.compile import compile_model
from molora_jax.backbones.families import SMOLLM2
from molora_jax.backbones.sizes import num_trainable
from molora_jax.core import routing
from molora_jax.core.types import Site
from molora_jax.losses import LOSSES
from molora_jax.routers import ROUTERS
from tests.acceptance import small

BIASED = ROUTERS["biased_topk"]
T, D, E, K = 12, 16, 8, 2
EXPERT = dict(name="balance", weight=3e-3, reduce="sum")
DEVICE = dict(name="device_balance", weight=0.05, groups=4)


def spread(tokens=T, experts=E, k=K):
    """Every expert equally often."""
    return (np.arange(tokens)[:, None] * k + np.arange(k)) % experts


def decision(z, chosen, **changes):
    """Of logits `z [T, E]` with these experts `chosen [T, K]`, whatever the logits would choose."""
    ctx = small.context(1, len(z), **changes)
    probs = routing.softmax(z[None], ctx.allowed)
    selected = jax.nn.one_hot(chosen, z.shape[-1], dtype=bool).any(axis=-2)[None]
    made = routing.finish(jnp.where(selected, probs, 0), selected, z[None], probs, ctx, k_max=chosen.shape[-1])
    return made, ctx


def value(loss, z, chosen, **changes):
    """The loss without its weight, of one router."""
    return _value(LOSSES[loss["name"]](**{k: v for k, v in loss.items() if k != "name"}), z, chosen, changes)


@functools.partial(jax.jit, static_argnums=0)
def _value(member, z, chosen, changes):
    stats = jax.tree.map(lambda x: x[None], member.stats(*decision(z, chosen, **changes)))
    return member.value({"r": {"000-000": {"ffn": stats}}})


def logits(experts=E, seed=0):
    return jax.device_put(np.float32(np.random.default_rng(seed).standard_normal((T, experts))))


def test_acceptance_1_cutting_experts_keeps_parameters_total_and_active():
    whole = dict(method__rules__routed__experts="7", method__rules__routed__adapter__rank=16,
                 method__rules__routed__adapter__alpha=32.0, method__rules__routed__router__k=1)  # fmt: skip
    fine, coarse = (compile_model(small.config("deepseek_moe", **c), SMOLLM2) for c in ({}, whole))
    routers = [30 * experts * 576 for experts in (28, 7)]
    assert num_trainable(fine) - routers[0] == num_trainable(coarse) - routers[1] == 30 * 8 * 16 * 3 * (576 + 1536)
    ranks = [sum(r.adapter.rank * (r.router.k if r.router else 1) for r in m.rules) for m in (fine, coarse)]
    assert ranks == [32, 32], "active: 2 of 8 experts of rank 16"
    assert {r.adapter.scale() for m in (fine, coarse) for r in m.rules} == {2.0}, "one scale for all granularities"


def test_acceptance_2_losses_are_one_at_balance_and_grow_with_concentration():
    flat, one = jnp.zeros((T, E)), np.tile([0, 1], (T, 1))
    for loss in (EXPERT, DEVICE):
        assert float(value(loss, flat, spread())) == pytest.approx(1, abs=1e-6)
        assert float(value(loss, flat, one)) == pytest.approx(1, abs=1e-6), "uniform s: whatever the choices are"
    ends = {"balance": E / K, "device_balance": 4.0}  # experts 0 and 1 are one of the four groups
    for loss in (EXPERT, DEVICE):
        grown = [float(value(loss, c * (flat.at[:, :K].set(1.0)), one)) for c in (0, 1, 3, 30)]
        assert np.all(np.diff(grown) > 0) and grown[-1] == pytest.approx(ends[loss["name"]], rel=1e-5)
    padded = jnp.arange(T)[None] < 8  # the last four tokens are padding: nobody counts them
    for loss in (EXPERT, DEVICE):
        whole = value(loss, logits().at[8:].set(9.0), spread(), valid=padded)
        member = LOSSES[loss["name"]](**{k: v for k, v in loss.items() if k != "name"})
        np.testing.assert_allclose(whole, _value(member, logits()[:8], spread()[:8], {}), rtol=1e-6)


def test_acceptance_2_layers_are_added_up():
    for loss in (EXPERT, DEVICE):
        member = LOSSES[loss["name"]](**{k: v for k, v in loss.items() if k != "name"})
        one = jax.jit(lambda z, chosen, member=member: member.stats(*decision(z, chosen)))(jnp.zeros((T, E)), spread())
        sums = jax.tree.map(lambda x: np.stack([x] * 3), one)
        assert float(member.value({"r": {"000-002": {"ffn": sums}}})) == pytest.approx(3, abs=1e-5)


@pytest.mark.parametrize("loss", [EXPERT, DEVICE], ids=lambda x: x["name"])
def test_acceptance_3_the_gradient_comes_through_p_alone(loss):
    """Against central differences of the formula in float64, with the counts held."""
    z, chosen = logits(), np.argsort(-np.asarray(logits()), axis=-1)[:, :K]
    f = np.bincount(chosen.reshape(-1), minlength=E) * E / (K * T)
    size = 1 if loss is EXPERT else E // 4
    f = np.repeat(f.reshape(-1, size).mean(1), size)

    def at_fixed_counts(z):
        e = np.exp(z - z.max(-1, keepdims=True))
        return (f * (e / e.sum(-1, keepdims=True)).mean(0)).sum()

    z64, wanted = np.asarray(z, np.float64), np.zeros((T, E))
    for at in np.ndindex(T, E):
        step = np.zeros((T, E))
        step[at] = 1e-5
        wanted[at] = (at_fixed_counts(z64 + step) - at_fixed_counts(z64 - step)) / 2e-5
    np.testing.assert_allclose(value(loss, z, chosen), at_fixed_counts(z64), rtol=1e-5)
    np.testing.assert_allclose(jax.jit(jax.grad(lambda z: value(loss, z, chosen)))(z), wanted, atol=1e-6)


def test_acceptance_4_groups_of_one_are_experts_and_one_group_is_a_constant():
    z, chosen = logits(), np.tile([1, 4], (T, 1))
    np.testing.assert_allclose(value(DEVICE | dict(groups=E), z, chosen), value(EXPERT, z, chosen), rtol=1e-5)
    one, gradient = jax.value_and_grad(lambda z: value(DEVICE | dict(groups=1), z, chosen))(z)
    assert float(one) == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(gradient, 0, atol=1e-7)


def test_acceptance_4_groups_follow_the_devices_and_count_who_may_be_chosen():
    """Seven experts over four devices: two each, the last device one. A shut-out expert has no part in the sizes."""
    z, chosen = logits(7), spread(experts=7)
    f = np.bincount(chosen.reshape(-1), minlength=7) * 7 / (K * T)
    P = np.asarray(jax.nn.softmax(z)).mean(0)
    groups = ([0, 1], [2, 3], [4, 5], [6])
    np.testing.assert_allclose(value(DEVICE, z, chosen), sum(f[g].mean() * P[g].sum() for g in groups), rtol=1e-5)
    seven = value(DEVICE, z, chosen)
    shut = value(DEVICE, jnp.pad(z, ((0, 0), (0, 1))), chosen, allowed=jnp.arange(8) < 7)
    np.testing.assert_allclose(shut, seven, rtol=1e-5)


@functools.cache
def built():
    return small.build("deepseek_moe", method__rules__routed__experts="6")


def hidden(adapters, model=None, **more):
    made, params, _, state = built()
    return jax.jit((model or made).hidden)(params, adapters, state, small.batch() | more)[0]


def test_acceptance_5_without_gates_the_shared_experts_are_left():
    model, params, adapters, state = built()
    alone = model.__class__(model.config, tuple(r for r in model.rules if r.name == "shared"), (), "dots", 2)
    silent = hidden(adapters, allowed=jnp.zeros(6, bool))
    keep = small.batch()["segment_ids"] > 0
    shared = jax.jit(alone.hidden)(params, {"shared": adapters["shared"]}, {}, small.batch())[0]
    np.testing.assert_allclose(silent[keep], shared[keep], atol=1e-5)
    assert np.abs((hidden(adapters) - silent)[keep]).max() > 1e-2, "the routed experts matter otherwise"


def test_acceptance_5_shared_experts_are_one_of_their_rank():
    leaves, x = small.factors(4, 3), jax.device_put(np.float32(np.random.default_rng(1).standard_normal((T, D))))
    four = small.change(small.lora(3, 6.0), leaves, jnp.ones((T, 4)), x)
    joined = {name: leaf.reshape(1, 12, -1) for name, leaf in leaves.items()}
    np.testing.assert_allclose(small.change(small.lora(12, 24.0), joined, jnp.ones((T, 1)), x), four, atol=1e-5)


def route(router, W, x, b=None, **changes):
    state = router.init_state(Site("ffn", D, D, (0,), len(W))) if b is None else {"b": jnp.asarray(b, jnp.float32)}
    decided, _, sums = small.routed(router, {"W": W}, {}, x[None], small.context(1, len(x), state=state, **changes))
    return decided, sums


def inputs():
    rng = np.random.default_rng(4)
    normal = lambda *shape: jax.device_put(np.float32(rng.standard_normal(shape)))  # noqa: E731
    return normal(E, D) / 2, normal(T, D)


def test_acceptance_6_gates_sum_to_less_than_one_unless_renormalised():
    W, x = inputs()
    p = jax.nn.softmax(x @ W.T)
    for k in (1, K, E):
        gates = route(BIASED(k=k), W, x)[0].gates[0]
        kept = jnp.sort(p, axis=-1)[:, E - k :]
        np.testing.assert_allclose(
            jnp.sort(gates, axis=-1)[:, E - k :], kept, atol=1e-6, err_msg="softmax before top k"
        )
        assert (gates.sum(-1) < 1).all() == (k < E)
        renormalised = route(BIASED(k=k, renormalise=True), W, x)[0].gates[0]
        np.testing.assert_allclose(renormalised.sum(-1), 1, atol=1e-6)


def test_acceptance_6_permuting_experts_with_their_centroids_changes_nothing():
    (W, x), leaves, order = inputs(), small.factors(E, 3, D), np.random.default_rng(5).permutation(E)
    change = lambda W, leaves: small.change(small.lora(3, 6.0), leaves, route(BIASED(k=K), W, x)[0].gates[0], x)  # noqa: E731
    moved = change(W[order], {name: leaf[order] for name, leaf in leaves.items()})
    np.testing.assert_allclose(moved, change(W, leaves), atol=1e-5)


def test_acceptance_7_experts_on_eight_devices_equal_one():
    """Outputs, both losses and every gradient; tokens travel over four devices, rows are split over two."""
    mesh = sharding.make_mesh(dict(data=2, fsdp=1, expert=4, tensor=1))
    rng = np.random.default_rng(6)
    x, kernel = (jax.device_put(np.float32(rng.standard_normal(shape))) for shape in ((8, 3, D), (D, 24)))
    valid = jnp.ones((8, 3), bool).at[0, 1:].set(False)
    options = dict(experts=E, adapter=mj.Lora(rank=2, dropout=0.0), router=mj.BiasedTopK(k=K))
    one, eight = (mj.RoutedLoRA(24, **options, **on) for on in ({}, dict(engine="all_to_all", mesh=mesh)))
    start = one.init(jax.random.key(0), x, kernel=kernel)
    adapters = jax.tree.map(lambda v: jnp.asarray(rng.standard_normal(v.shape) / 4, v.dtype), start["adapters"])

    def objective(layer, adapters, x):
        variables = {"adapters": adapters, "router_state": start["router_state"]}
        y, sown = layer.apply(variables, x, kernel=kernel, valid=valid, mutable=["routing"])
        losses = [mj.routing_loss(sown, {k: v for k, v in loss.items() if k != "weight"}) for loss in (EXPERT, DEVICE)]
        return jnp.sum(jnp.sin(y) * valid[..., None]) + sum(losses), (y, losses)

    run = lambda layer: jax.jit(  # noqa: E731
        jax.value_and_grad(functools.partial(objective, layer), (0, 1), has_aux=True)
    )(adapters, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5), run(eight), run(one))


def test_the_bias_moves_choices_and_never_gates():
    W, x = inputs()
    b = np.zeros(E)
    b[3] = 9.0
    decided, sums = route(BIASED(k=K, bias_rate=0.1), W, x, b)
    p = np.asarray(jax.nn.softmax(x @ W.T))
    assert decided.selected[0, :, 3].all()
    np.testing.assert_allclose(decided.gates[0], np.where(decided.selected[0], p, 0), atol=1e-6)
    updated = BIASED(k=K, bias_rate=0.1).update({"b": jnp.asarray(b)}, sums)["b"] - b
    count = np.asarray(sums["count"])
    np.testing.assert_allclose(updated, 0.1 * np.sign(K * T / E - count), atol=1e-6)
    gradient = jax.jit(jax.grad(lambda b: jnp.sum(route(BIASED(k=K), W, x, b)[0].gates ** 2)))(
        jnp.asarray(b, jnp.float32)
    )
    np.testing.assert_array_equal(gradient, 0)


def test_the_bias_balances_a_skewed_router_without_a_loss():
    W, x = inputs()
    W = W.at[0].set(0).at[0, 0].set(4.0)
    x = x.at[:, 0].set(2.0)  # expert 0 is everybody's favourite
    for score in ("softmax", "sigmoid"):
        router = BIASED(k=1, score=score, bias_rate=0.02)
        step = jax.jit(lambda b, r=router: (lambda d, s: (r.update({"b": b}, s)["b"], s["count"]))(*route(r, W, x, b)))
        b = jnp.zeros(E)
        first = step(b)[1]
        seen = []
        for _ in range(150):
            b, count = step(b)
            seen.append(count)
        assert float(first[0]) == T and np.mean(seen[-50:], axis=0).max() < 0.5 * T
