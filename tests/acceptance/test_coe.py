"""The acceptance list of Chain-of-Experts, on LoRA experts beside a frozen feed-forward block."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from molora_jax.core import routing as routing_math
from molora_jax.core.trees import count
from molora_jax.errors import InputError
from molora_jax.placements import chain as placement
from molora_jax.placements.chain import chain
from molora_jax.training.step import loss_sums, update_routers
from tests.acceptance import helpers, small
from tests.acceptance.helpers import SMALL, batch, build, gradient, hidden, randomised, run

E, R, D = 4, 3, SMALL.width
ONE = dataclasses.replace(SMALL, layers=1)
PASSES = ("pass0", "pass1")


def rule(iterations=2, *, k=1, experts="4", renormalise=False, adapter=None, router=True, share="site", **more):
    place = dict(name="chain", iterations=iterations, gating="independent", residual="inner", nonlinearity="none")
    found = dict(name="softmax_topk", k=k, share=share, renormalise=renormalise, init="kaiming")
    return dict(
        mix=common.rule(
            "ffn", experts=experts, adapter=adapter or common.adapter(rank=R, alpha=6.0, dropout=0.0),
            router=found if router else None, placement=place | more,
        )
    )  # fmt: skip


BALANCE = dict(balance=common.balance(weight=1e-3, over="site", reduce="sum", per_example=True))


@functools.partial(jax.jit, static_argnames=("C", "k", "phi", "residual", "scale"))
def passes_by_hand(leaves, x, C, k, *, W=None, phi=lambda a: a, residual="inner", scale=2.0):
    """z(C) - z(0) with every expert applied to every token; `leaves` of one layer, `x [..., D]`."""
    z = x
    for t in range(C):
        U = leaves["router"][f"pass{t}"]["W"] if W is None else W
        probs = jax.nn.softmax(z @ U.T)
        g = jnp.where(routing_math.top_k(probs, k), probs, 0.0)
        a = phi(jnp.einsum("...d,erd->...er", z, leaves["ffn"]["A"]))
        out = scale * jnp.einsum("...e,...er,ero->...o", g, a, leaves["ffn"]["B"])
        z = out + (z if residual == "inner" else 0.0)
    return z - x if residual == "inner" else z


def block_output(model, params, adapters, monkeypatch):
    """The normed input x, the frozen FFN's output and the block's, of a decoder of one layer."""
    from molora_jax.backbones.layer import Layer

    seen, plain = [], Layer.feed_forward
    with monkeypatch.context() as patch:

        def spy(self, x, weights, act):
            out = plain(self, x, weights, act)
            jax.debug.callback(lambda *a: seen.append(tuple(map(np.asarray, a))), x, out)
            return out

        patch.setattr(Layer, "feed_forward", spy)
        jax.block_until_ready(jax.jit(lambda p, a: model.hidden(p, a, {}, batch())[0])(params, adapters))
        jax.effects_barrier()
    (x, out), = seen  # fmt: skip
    W = jax.tree.map(lambda w: w[0], params["blocks"])
    act = x @ W["gate"]["kernel"]
    return x, (jax.nn.silu(act) * (x @ W["up"]["kernel"])) @ W["down"]["kernel"], out


@pytest.mark.parametrize("C", [1, 2])
def test_acceptance_1_one_pass_is_the_plain_mixture_and_two_compose(C, monkeypatch):
    model, params, adapters = build(rule(C, k=2), decoder=ONE)
    adapters = randomised(adapters)
    x, frozen, out = block_output(model, params, adapters, monkeypatch)
    leaves = jax.tree.map(lambda w: w[0], adapters["mix"]["000-000"])
    keep = batch()["segment_ids"] > 0
    wanted = (frozen + passes_by_hand(leaves, x, C, 2))[keep]
    largest = np.abs(wanted).max()
    np.testing.assert_allclose(out[keep], wanted, rtol=0, atol=1e-6 * largest)
    np.testing.assert_allclose(out[~keep], frozen[~keep], rtol=0, atol=1e-6 * largest)  # padding has no expert


def test_acceptance_1_one_pass_is_exact_to_the_bit():
    x, out = jnp.array([1e8, 1.0]), jnp.array([1.0, 1e-9])
    np.testing.assert_array_equal(chain(x, lambda t, z: out, 1), out)  # carried as z it would be rounded away


def test_acceptance_1_parameters_grow_by_a_router_a_pass():
    kinds = ("independent", "shared", "once")
    sizes = {(C, kind): count(build(rule(C, gating=kind))[2]) for C in (1, 3) for kind in kinds}
    one = SMALL.layers * (E * 2 * R * D + E * D)
    assert sizes[1, "independent"] == sizes[1, "shared"] == one
    assert sizes[3, "independent"] == one + SMALL.layers * 2 * E * D
    assert sizes[3, "shared"] == sizes[3, "once"] == one


def test_acceptance_2_the_first_router_learns_through_the_second_pass():
    leaves = {"ffn": {n: 0.5 * jax.random.normal(jax.random.key(i), (E, R, D)) for i, n in enumerate("AB")}}
    x = jax.random.normal(jax.random.key(2), (6, D))
    U = jax.random.normal(jax.random.key(3), (2, E, D))

    def second(U1, cut):
        outs = []

        def experts(t, z):
            z = jax.lax.stop_gradient(z) if cut and t else z
            one = {"ffn": leaves["ffn"], "router": {"pass0": {"W": U1 if t == 0 else U[1]}}}
            outs.append(passes_by_hand(one, z, 1, 1))
            return outs[-1]

        chain(x, experts, 2)
        return jnp.sum(outs[1] ** 2)

    slope = jax.jit(jax.grad(second), static_argnums=1)
    assert np.abs(slope(U[0], False)).max() > 1e-3
    np.testing.assert_array_equal(slope(U[0], True), 0.0)
    model, params, adapters = build(rule())
    _, grads = gradient(model, params, randomised(adapters), batch())
    for scope in PASSES:
        assert (np.abs(grads["mix"]["000-002"]["router"][scope]["W"]).reshape(3, -1).max(axis=1) > 0).all()


def test_acceptance_3_an_expert_of_both_passes_gets_the_sum_of_both_gradients():
    model, params, adapters = build(rule(experts="1", router=False), decoder=ONE)
    adapters = randomised(adapters)
    leaves = jax.tree.map(lambda w: w[0], adapters["mix"]["000-000"]["ffn"])
    x = jax.random.normal(jax.random.key(2), (6, D))

    def apart(first, second):
        two = [first, second]
        return jnp.sum(chain(x, lambda t, z: 2.0 * z @ two[t]["A"][0].T @ two[t]["B"][0], 2) ** 2)

    def tied(one):
        return jnp.sum(placement.apply(model.rules[0], one, {}, small.context(1, 6), x[None], lambda t, z: None) ** 2)

    each = jax.jit(jax.grad(apart, (0, 1)))(leaves, leaves)
    assert all((np.abs(g["B"]) > 0).any() for g in each)
    both = jax.jit(jax.grad(tied))(leaves)
    for name in "AB":
        np.testing.assert_allclose(both[name], each[0][name] + each[1][name], rtol=1e-4)


@pytest.mark.parametrize("residual", ["inner", "outer"])
def test_acceptance_4_silent_experts_change_nothing(residual, tmp_path):
    model, params, adapters = build(rule(residual=residual), train=dict(init_from=str(tmp_path)))
    start, alone = hidden(model, params, adapters, batch()), hidden(model.without_rules(), params, {}, batch())
    np.testing.assert_array_equal(start, alone)
    x = jnp.ones((3, D))
    np.testing.assert_array_equal(chain(x, lambda t, z: 0 * z, 2, residual), 0 * x)  # y = x + d, never 2 x


@pytest.mark.parametrize("gating", ["independent", "shared", "once"])
def test_acceptance_5_a_balance_term_for_each_pass_and_layer(gating):
    model, params, adapters = build(rule(gating=gating), BALANCE)
    for scope in adapters["mix"]["000-002"]["router"].values():
        scope["W"] = 0 * scope["W"]  # uniform probabilities: perfect balance whatever is chosen
    _, sums, _ = run(model, params, adapters, batch())
    loss = dict(model.losses)["balance"]
    assert set(sums["mix"]["000-002"]) == set(PASSES)
    value = loss.value(loss_sums(sums, "balance"))
    np.testing.assert_allclose(value, 2 * SMALL.layers, rtol=1e-5)
    np.testing.assert_allclose(loss.weight * value / SMALL.layers, 2 * 1e-3, rtol=1e-5)  # C times the coefficient


def test_acceptance_6_cost_is_that_of_one_pass_with_C_times_K(monkeypatch):
    """Of the chain as it runs: rows that its grouped products visit (XLA counts a loop of them once)."""
    T = 4096
    adapter = common.adapter(rank=8, alpha=16.0, dropout=0.0)
    x, ctx = jax.random.normal(jax.random.key(2), (1, T, D)), small.context(1, T)

    def rows(C, K):
        model, _, adapters = build(rule(C, k=K, experts="16", adapter=adapter), decoder=ONE)
        mix, leaves = model.rules[0], jax.tree.map(lambda w: w[0], randomised(adapters)["mix"]["000-000"])
        decide = lambda t, z: mix.router.route(leaves["router"][f"pass{t}"], {}, z, ctx)[0]  # noqa: E731
        run = lambda x: placement.apply(mix, leaves["ffn"], {}, ctx, x, decide)  # noqa: E731
        return small.rows_visited(monkeypatch, run, x)

    two, one, half = rows(2, 1), rows(1, 2), rows(1, 1)
    assert [len(found) for found in (two, one, half)] == [2, 1, 1], "a grouped product a pass"
    assert abs(sum(two) - sum(one)) < 0.1 * sum(one), (two, one)
    assert sum(one) > 1.8 * sum(half) and min(half) >= T
    # the product's own statistics say the same: K slots a token and pass
    for C, K in ((2, 1), (1, 2)):
        model, params, adapters = build(rule(C, k=K))
        _, sums, _ = run(model, params, adapters, batch())
        slots = sum(np.asarray(s["expert_load"]["slots"]) for s in sums["mix"]["000-002"].values())
        np.testing.assert_array_equal(slots, 2 * (batch()["segment_ids"] > 0).sum())


@pytest.mark.parametrize("change", [dict(gating="shared"), dict(gating="once"), dict(nonlinearity="silu")])
def test_variants_by_hand(change, monkeypatch):
    model, params, adapters = build(rule(2, k=2, **change), decoder=ONE)
    adapters = randomised(adapters)
    x, frozen, out = block_output(model, params, adapters, monkeypatch)
    leaves = jax.tree.map(lambda w: w[0], adapters["mix"]["000-000"])
    W = None
    if "gating" in change:
        assert set(leaves["router"]) == {"pass0"}
        W = leaves["router"]["pass0"]["W"]
    if change == dict(gating="once"):
        p = jax.nn.softmax(x @ W.T)
        g = jnp.where(routing_math.top_k(p, 2), p, 0.0)
        step = lambda z: z + 2.0 * jnp.einsum("bse,bsd,erd,ero->bso", g, z, leaves["ffn"]["A"], leaves["ffn"]["B"])  # noqa: E731
        wanted = step(step(x)) - x
    else:
        phi = jax.nn.silu if "nonlinearity" in change else lambda a: a
        wanted = passes_by_hand(leaves, x, 2, 2, W=W, phi=phi)
    keep = batch()["segment_ids"] > 0
    np.testing.assert_allclose((out - frozen)[keep], wanted[keep], rtol=1e-4, atol=1e-5)


def test_a_shared_routers_state_sees_all_passes():
    from molora_jax.routers import softmax_topk

    @dataclasses.dataclass(frozen=True)
    class Counting(softmax_topk.SoftmaxTopK):
        def init_state(self, site):
            return {"seen": jnp.zeros(())}

        def route(self, p, shared, x, ctx):
            decision, carry, _ = super().route(p, shared, x, ctx)
            return decision, carry, {"tokens": jnp.sum(decision.valid), "last": jnp.float32(ctx.iteration)}

        def update(self, state, sums):
            return {"seen": state["seen"] + sums["tokens"]}

    for gating, scopes, times in (("shared", ["pass0"], 2), ("independent", list(PASSES), 1)):
        model, params, adapters = build(rule(gating=gating))
        mix = dataclasses.replace(model.rules[0], router=Counting(k=1, renormalise=False))
        model = dataclasses.replace(model, rules=(mix,))
        state = model.init_router_state()
        assert list(state["mix"]["000-002"]["router"]) == scopes
        _, sums, _ = run(model, params, adapters, batch(), state)
        parts = {"mix": {"000-002": {k: v["router"] for k, v in sums["mix"]["000-002"].items()}}}
        new = update_routers(model, state, parts)["mix"]["000-002"]["router"]
        tokens = (batch()["segment_ids"] > 0).sum()
        assert all((np.asarray(s["seen"]) == times * tokens).all() for s in new.values())


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: rule(iterations=0), "placement.iterations"),
        (lambda: rule(gating="both"), "placement.gating"),
        (lambda: rule(residual="outer"), "placement.residual"),
        (lambda: rule(share="model"), "router.share"),
        (lambda: rule(adapter=common.adapter("dora")), "adapter.name"),
        (lambda: rule(adapter=common.adapter(init="pissa")), "adapter.init"),
        (lambda: rule(name="ffn"), "placement.name"),
        (lambda: dict(mix=rule()["mix"] | dict(sites="q")), "sites"),
    ],
)
def test_what_does_not_fit_is_refused(make, field):
    with pytest.raises(InputError, match=f"method.rules.mix.{field}"):
        helpers.rules_config(make())


# ---- the paper's core claim on its own small problem ---------------------------------------------------------------


def composed_task(seed, n=1024, d=16, tags=4):
    """Vector v with two tags a, b; target R'_b R_a v with random rotations."""
    keys = jax.random.split(jax.random.key(seed), 4)
    turn = lambda k: jax.vmap(lambda k: jnp.linalg.qr(jax.random.normal(k, (d, d)))[0])(jax.random.split(k, tags))  # noqa: E731
    first, second = turn(keys[0]), turn(keys[1])
    v, ab = jax.random.normal(keys[2], (n, d)), jax.random.randint(keys[3], (n, 2), 0, tags)
    y = jnp.einsum("nij,nj->ni", second[ab[:, 1]], jnp.einsum("nij,nj->ni", first[ab[:, 0]], v))
    hot = jax.nn.one_hot(ab, tags).reshape(n, -1)
    return jnp.concatenate([v, hot], axis=1), y


@pytest.mark.slow
def test_experiment_two_passes_beat_the_mixture_of_equal_compute():
    """Linear experts on the whole stream, routers that read the tags in it (pass 1 may change them for pass 2)."""
    import optax

    d = 16

    @functools.partial(jax.jit, static_argnames=("C", "K", "E", "shared"))
    def mse(seed, *, C, K, E, shared=False):
        x, y = composed_task(seed)
        W = x.shape[1]
        keys = jax.random.split(jax.random.key(seed + 100), 2)
        theta = {"U": jax.random.normal(keys[0], (C, E, W)) * W**-0.5, "M": 0.1 * jax.random.normal(keys[1], (E, W, W))}
        tags = jnp.arange(W) >= d

        def loss(theta):
            def experts(t, z):
                p = jax.nn.softmax(jnp.where(tags, x if shared else z, 0.0) @ theta["U"][0 if shared else t].T)
                g = jnp.where(routing_math.top_k(p, K), p, 0.0)
                return jnp.einsum("ne,eio,no->ni", g, theta["M"], z)

            return jnp.mean(((x + chain(x, experts, C))[:, :d] - y) ** 2)

        optimizer = optax.adam(1e-2)

        def step(loop, _):
            theta, state = loop
            value, g = jax.value_and_grad(loss)(theta)
            updates, state = optimizer.update(g, state)
            return (optax.apply_updates(theta, updates), state), value

        _, values = jax.lax.scan(step, (theta, optimizer.init(theta)), length=4000)
        return jnp.mean(values[-100:])

    mean = lambda **setting: float(np.mean([mse(s, **setting) for s in range(3)]))  # noqa: E731
    moe, coe = mean(C=1, K=2, E=8), mean(C=2, K=1, E=8)
    assert coe * 3 < moe, (coe, moe)
    assert mean(C=2, K=1, E=8, shared=True) > 2 * coe
