"""RMoE: the acceptance list of its specification, item by item (the numbers are the list's)."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from molora_jax.core.trees import count
from molora_jax.core.types import Site
from molora_jax.losses import LOSSES
from molora_jax.routers import ROUTERS
from molora_jax.routers.recurrent import gru
from tests.acceptance import small

RECURRENT = ROUTERS["recurrent"]
BATCH = small.batch()


def cell(P, seed=0):
    return RECURRENT(hidden=P).init_shared(jax.random.key(seed), ())


@jax.jit
def step(shared, x, h):
    return gru(x, h, shared["gru_W"], shared["gru_U"], shared["gru_b"], shared["gru_c"])


def two_layers(router, x, *, P=6, E=4, seed=0):
    """Decisions of two routed layers that read the same `x [B, S, D]`, with their leaves."""
    keys = jax.random.split(jax.random.key(seed), 3)
    site = Site("ffn", x.shape[-1], x.shape[-1], (0, 1), E)
    leaves = [router.init_leaves(k, site, 0) for k in keys[:2]]
    return leaves, cell(P, seed)


def run(router, leaves, shared, x):
    carry, out = router.init_carry(*x.shape[:2]), []
    for p in leaves:
        decision, carry, _ = small.routed(router, p, shared, x, small.context(*x.shape[:2], carry=carry))
        out.append(decision)
    return out, carry


def inputs(batch=2, length=5, D=8, seed=0):
    return jax.device_put(np.float32(np.random.default_rng(seed).standard_normal((batch, length, D))))


def test_acceptance_1_the_cell_is_the_standard_gru():
    """Reset after the recurrent product: by the formula in float64, and as `flax.linen.GRUCell` (4 biases)."""
    P, shared = 7, cell(7)
    rng = np.random.default_rng(0)
    x, h = rng.standard_normal((2, 3, P)), rng.standard_normal((2, 3, P))
    W, U, b, c = (np.asarray(shared[f"gru_{n}"], np.float64) for n in "WUbc")
    sigmoid = lambda a: 1 / (1 + np.exp(-a))  # noqa: E731
    for state in (h, 0 * h):
        s = sigmoid(x @ W[0].T + b[0] + state @ U[0].T + c[0])
        z = sigmoid(x @ W[1].T + b[1] + state @ U[1].T + c[1])
        n = np.tanh(x @ W[2].T + b[2] + s * (state @ U[2].T + c[2]))
        got = step(shared, jnp.asarray(x, jnp.float32), jnp.asarray(state, jnp.float32))
        np.testing.assert_allclose(got, (1 - z) * n + z * state, atol=1e-6)
    tree = {f"i{g}": {"kernel": W[i].T, "bias": b[i]} for i, g in enumerate("rzn")}
    tree |= {f"h{g}": {"kernel": U[i].T} for i, g in enumerate("rzn")}
    tree["ir"]["bias"], tree["iz"]["bias"], tree["hn"]["bias"] = b[0] + c[0], b[1] + c[1], c[2]
    want = nn.GRUCell(P).apply({"params": jax.tree.map(jnp.float32, tree)}, jnp.float32(h), jnp.float32(x))[1]
    np.testing.assert_allclose(step(shared, jnp.float32(x), jnp.float32(h)), want, atol=1e-6)


def test_acceptance_1_the_first_layer_starts_from_zero():
    router, x = RECURRENT(hidden=6), inputs()
    leaves, shared = two_layers(router, x)
    projected = jnp.einsum("bsd,pd->bsp", x, leaves[0]["proj"])
    want = step(shared, projected, jnp.zeros_like(projected)) @ leaves[0]["W"].T
    np.testing.assert_allclose(run(router, leaves, shared, x)[0][0].logits, want, atol=1e-6)


@pytest.mark.parametrize("mode", ["full", "detach", "np"])
def test_acceptance_2_the_second_layers_loss_reaches_the_first_projection(mode):
    """In the model: layer 0's experts are silent (B = 0), so its routing matters through the recurrent state alone.

    On routed projections, where a silent expert's gate has a gradient of exactly 0 (a routed FFN's has rounding).
    """
    model, params, adapters, state = small.build(
        "rmoe", method__rules__ffn__router__mode=mode, method__rules__ffn__sites="gate,down"
    )
    for site in ("gate", "down"):
        B = np.array(adapters["ffn"]["000-001"][site]["B"])
        B[0] = 0
        adapters["ffn"]["000-001"][site]["B"] = B
    g = small.lm_gradient(model, params, adapters, state, BATCH)["ffn"]
    proj = np.abs(g["000-001"]["router"]["ffn"]["proj"]).max(axis=(1, 2))
    assert proj[1] > 0
    assert proj[0] > 0 if mode == "full" else proj[0] == 0
    assert (np.abs(g["shared"]["gru_U"]).max() > 0) == (mode != "np")


def test_acceptance_3_tokens_are_independent():
    router, x = RECURRENT(hidden=6), inputs(1, 9)
    leaves, shared = two_layers(router, x)
    order = np.random.default_rng(1).permutation(9)
    (a, h), (b, h_moved) = run(router, leaves, shared, x), run(router, leaves, shared, x[:, order])
    np.testing.assert_allclose(h[:, order], h_moved, atol=1e-6)
    for one, two in zip(a, b, strict=True):
        np.testing.assert_allclose(one.gates[:, order], two.gates, atol=1e-6)
    c, h_changed = run(router, leaves, shared, x.at[0, 4].add(3.0))
    keep = np.arange(9) != 4
    np.testing.assert_array_equal(h[:, keep], h_changed[:, keep])
    for one, two in zip(a, c, strict=True):
        np.testing.assert_array_equal(one.gates[:, keep], two.gates[:, keep])
    assert np.abs(h[:, 4] - h_changed[:, 4]).max() > 1e-3


def routers_parameters(layers, width, P, E):
    """Leaves of the router of an FFN rule on a decoder of this shape."""
    router = RECURRENT(hidden=P)
    site = Site("ffn", width, width, tuple(range(layers)), E)
    one = jax.eval_shape(lambda key: router.init_leaves(key, site, 0), jax.random.key(0))
    shared = jax.eval_shape(router.init_shared, jax.random.key(0), ())
    return layers * count(one) + count(shared)


def test_acceptance_4_parameters():
    assert routers_parameters(8, 352, 128, 16) - 8 * 352 * 16 == 430_848
    for L, D, P, E in ((8, 352, 128, 16), (24, 1280, 128, 16), (30, 576, 128, 8)):
        assert routers_parameters(L, D, P, E) == L * P * D + 6 * P * P + 6 * P + L * P * E
    assert abs(routers_parameters(24, 1280, 128, 16) - 24 * 1280 * 16 - 3.6e6) < 0.05e6


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_acceptance_4_one_gru_whatever_the_depth(layers):
    _, _, adapters, _ = small.build("rmoe", layers=layers)
    shapes = {name: leaf.shape for name, leaf in adapters["ffn"]["shared"].items()}
    assert shapes == dict(gru_W=(3, 128, 128), gru_U=(3, 128, 128), gru_b=(3, 128), gru_c=(3, 128))
    assert adapters["ffn"][f"000-{layers - 1:03d}"]["router"]["ffn"]["proj"].shape == (layers, 128, 32)


def test_acceptance_4_segments_share_the_gru_and_the_state_passes_between_them():
    """Two segments of unequal expert counts equal one router run layer by layer."""
    model, params, adapters, state = small.build("rmoe", method__rules__ffn__experts="4|6")
    assert [s.name for s in model.segments] == ["000-000", "001-001"]
    alone = jax.tree.map(lambda x: x, adapters)
    alone["ffn"]["000-000"]["router"]["ffn"]["proj"] = -alone["ffn"]["000-000"]["router"]["ffn"]["proj"]
    for site in ("gate", "up", "down"):  # silent, so that only the state carries the change on
        for tree in (adapters, alone):
            tree["ffn"]["000-000"][site]["B"] = 0 * tree["ffn"]["000-000"][site]["B"]
    a, b = (small.gates(model, params, t, state, BATCH)["ffn"]["001-001"]["ffn"] for t in (adapters, alone))
    assert np.abs(a - b).max() > 1e-3


def test_acceptance_5_decoding_a_token_at_a_time_gives_the_same_routes():
    model, params, adapters, state = small.build("rmoe")
    rows = np.arange(small.B)
    whole = dict(BATCH, segment_ids=np.ones((small.B, small.S), np.int32),
                 positions=np.arange(small.S)[None].repeat(small.B, 0).astype(np.int32))  # fmt: skip
    want = small.gates(model, params, adapters, state, whole)["ffn"]["000-001"]["ffn"]

    @jax.jit
    def advance(kv, t, token):
        at = jnp.full((small.B, 1), t)
        data = dict(tokens=token, segment_ids=jnp.ones_like(token), positions=at)
        mask = (jnp.arange(small.S) <= t)[None, None, None].repeat(small.B, 0)
        write = lambda buffer, new: buffer.at[rows, t].set(new[:, 0])  # noqa: E731
        _, _, kv, gates = model.hidden(params, adapters, state, data, mask=mask, cache=(kv, write), collect=True)
        return kv, gates["ffn"]["000-001"]["ffn"]

    kv, got = model.init_cache(small.B, small.S, jnp.float32), []
    for t in range(small.S):
        kv, gates = advance(kv, t, whole["tokens"][:, t : t + 1])
        got.append(gates)
    got = np.concatenate(got, axis=2)
    np.testing.assert_array_equal(got > 0, want > 0)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_acceptance_6_one_layer_needs_no_state():
    full, params, adapters, state = small.build("rmoe", layers=1)
    for mode in ("np", "detach"):
        other = small.build("rmoe", layers=1, method__rules__ffn__router__mode=mode)[0]
        a, b = (small.lm_gradient(m, params, adapters, state, BATCH) for m in (full, other))
        jax.tree.map(np.testing.assert_array_equal, a, b)


def test_padding_and_other_placements_carry_the_state_too():
    for changes in ({"sites": "gate,up,down"}, {"sites": "q,v"}, {"sites": "q,v", "router__share": "model"}):
        share = changes.pop("router__share", "site")
        model, params, adapters, state = small.build(
            "rmoe", method__rules__ffn__sites=changes["sites"], method__rules__ffn__router__share=share
        )
        for gates in jax.tree.leaves(small.gates(model, params, adapters, state, BATCH)):
            assert not gates[:, BATCH["segment_ids"] == 0].any()
            assert ((gates[:, BATCH["segment_ids"] > 0] > 0).sum(-1) == 2).all()


def test_gates_are_plain_or_renormalised():
    x = inputs()
    plain = RECURRENT(hidden=6)
    leaves, shared = two_layers(plain, x)
    a = run(plain, leaves, shared, x)[0][1]
    b = run(dataclasses.replace(plain, renormalise=True), leaves, shared, x)[0][1]
    np.testing.assert_allclose(a.gates, np.where(a.selected, a.probs, 0), atol=1e-7)
    np.testing.assert_allclose(b.gates.sum(-1), 1, rtol=1e-6)


# ---- the paper's core claim on its own small problem ---------------------------------------------------------------


def erased_tag(key, turns, n=128):
    """Layer 1 reads v and its tag a, layer 2 v alone; the target of layer 2 is R_a v, with rotations `[tags, d, d]`."""
    tags, d, _ = turns.shape
    v, a = jax.random.normal(key, (n, d)), jax.random.randint(jax.random.fold_in(key, 1), (n,), 0, tags)
    seen = jnp.concatenate([v, 3.0 * jax.nn.one_hot(a, tags)], axis=1)
    return seen, seen.at[:, d:].set(0.0), jnp.einsum("nij,nj->ni", turns[a], v)


def erased_tag_mse(router, seed, d=12, D=16, E=4, steps=3000):
    """Of layer 2 after training on fresh batches, and the least of any router that reads layer 2's input alone.

    Layer 1's experts are 0, layer 2's are linear. With the paper's balance loss, which the specification's run does not
    mention: without it two tags shared an expert for good in two of three seeds (full 0.000, 0.217, 0.220; detach
    0.419, 0.217, 0.410).
    """
    site, loss = Site("ffn", D, D, (0, 1), E), LOSSES["balance"](over="site", reduce="sum")
    keys = jax.random.split(jax.random.key(seed), 6)
    turns = jax.vmap(lambda k: jnp.linalg.qr(jax.random.normal(k, (d, d)))[0])(jax.random.split(keys[0], E))
    theta = {
        "layers": [router.init_leaves(k, site, 0) for k in keys[1:3]],
        "shared": router.init_shared(keys[3], ()),
        "M": 0.1 * jax.random.normal(keys[4], (E, D, d)),
    }
    optimizer = optax.adam(1e-2)

    def objective(theta, key):
        *inputs, y = erased_tag(key, turns)
        carry, ctx = router.init_carry(1, len(y)), small.context(1, len(y))
        for p, x in zip(theta["layers"], inputs, strict=True):
            decision, carry, _ = router.route(p, theta["shared"], x[None], ctx.replace(carry=carry))
        error = jnp.mean((jnp.einsum("ne,nd,edo->no", decision.gates[0], inputs[1], theta["M"]) - y) ** 2)
        sums = jax.tree.map(lambda value: value[None], loss.stats(decision, ctx))
        return error + 0.01 * loss.value({"r": {"001-001": {"ffn": sums}}}), error

    def step(loop, key):
        theta, state = loop
        (_, error), g = jax.value_and_grad(objective, has_aux=True)(theta, key)
        updates, state = optimizer.update(g, state)
        return (optax.apply_updates(theta, updates), state), error

    _, errors = jax.lax.scan(step, (theta, optimizer.init(theta)), jax.random.split(keys[5], steps))
    return jnp.mean(errors[-100:]), 1 - jnp.sum(turns.mean(0) ** 2) / d


@pytest.mark.slow
def test_experiment_only_a_recurrent_router_knows_what_a_former_layer_saw():
    """Measured (3 seeds): full 0.000 each; detach 0.396, 0.242, 0.000; np 0.648, 0.731, 0.716; linear 0.658, 0.731,
    0.716, where nothing that reads v alone can pass 0.642, 0.733, 0.712.

    The specification's 0.74 is of its own rotations: the least is 1 - |mean R|^2 / d of these.
    """
    routers = {mode: RECURRENT(k=1, hidden=16, mode=mode) for mode in ("full", "detach", "np")}
    routers["linear"] = ROUTERS["softmax_topk"](k=1, renormalise=False)
    found = {}
    for name, router in routers.items():
        train = jax.jit(lambda seed, router=router: erased_tag_mse(router, seed))
        found[name] = np.array([train(seed) for seed in range(3)])  # [seed, (error, least)]
    full, detach = found["full"][:, 0], found["detach"][:, 0]
    assert (full < 0.02).all() and (full <= detach).all(), found
    for name in ("linear", "np"):
        error, least = found[name].T
        assert (error > least - 0.02).all() and (error > 0.6).all(), found
