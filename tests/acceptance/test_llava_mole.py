"""LLaVA-MoLE: the acceptance list of its specification, item by item (the numbers are the list's)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from molora_jax import engines
from molora_jax.losses import LOSSES
from molora_jax.placements import projection
from molora_jax.routers import ROUTERS
from tests.acceptance import small

TOP1 = ROUTERS["top1"]
BATCH = small.batch()
SEGMENT = "000-001"


def outputs(model, params, adapters, state):
    return jax.jit(lambda a: model.hidden(params, a, state, BATCH)[0])(adapters)


def same_experts(adapters):
    """Every expert a copy of expert 0."""
    for site in ("gate", "up", "down"):
        leaves = adapters["ffn"][SEGMENT][site]
        adapters["ffn"][SEGMENT][site] = {n: np.repeat(x[:, :1], x.shape[1], axis=1) for n, x in leaves.items()}
    return adapters


def test_acceptance_1_one_expert_is_plain_lora():
    model, params, adapters, state = small.build("llava_mole", method__rules__ffn__experts="1")
    plain = small.build("lora", method__rules__all__adapter__rank=32, method__rules__all__adapter__alpha=64.0)[0]
    parts = {n: v for rule in ("attn", "ffn") for n, v in adapters[rule][SEGMENT].items() if n != "router"}
    keep = BATCH["segment_ids"] > 0  # padding has no expert
    got, want = outputs(model, params, adapters, state), outputs(plain, params, {"all": {SEGMENT: parts}}, {})
    np.testing.assert_array_equal(got[keep], want[keep])


def test_acceptance_2_equal_experts_make_the_router_irrelevant():
    model, params, adapters, state = small.build("llava_mole")
    dense = small.build("llava_mole", method__rules__ffn__router__dense=True)[0]
    adapters = same_experts(adapters)
    want = outputs(model, params, adapters, state)
    other = jax.tree.map(lambda x: x, adapters)
    other["ffn"][SEGMENT]["router"]["ffn"] = jax.tree.map(
        lambda x: 3 - 5 * x, adapters["ffn"][SEGMENT]["router"]["ffn"]
    )
    for m, a in ((model, other), (dense, adapters), (dense, other)):
        np.testing.assert_allclose(outputs(m, params, a, state), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("option", ["", "dense", "gated"])
def test_acceptance_3_the_language_model_gives_the_sparse_router_exactly_no_gradient(option):
    changes = {f"method__rules__ffn__router__{option}": True} if option else {}
    changes["method__rules__attn__sites"] = "q"
    model, params, adapters, state = small.build("llava_mole", **changes)
    g = small.lm_gradient(model, params, adapters, state, BATCH)["ffn"][SEGMENT]
    router = np.concatenate([np.ravel(x) for x in jax.tree.leaves(g["router"])])
    assert (np.abs(router).max() > 1e-6) if option else (router == 0).all()
    assert all(np.abs(g[site]["B"]).max() > 0 for site in ("gate", "up", "down"))


@pytest.mark.parametrize("dense", [False, True])
def test_acceptance_4_with_zero_B_the_output_is_the_frozen_models(dense):
    model, params, adapters, state = small.build("llava_mole", method__rules__ffn__router__dense=dense)
    zero = jax.tree_util.tree_map_with_path(lambda path, x: 0 * x if path[-1].key == "B" else x, adapters)
    np.testing.assert_allclose(
        outputs(model, params, zero, state), outputs(model.without_rules(), params, {}, {}), rtol=1e-6, atol=1e-6
    )


@functools.partial(jax.jit, static_argnames=("dense", "max_segments"))
def balance(z, dense=False, **changes):
    """The loss of `configs/llava_mole.py` on logits `[layers, B, S, E]`."""
    options = dict(small.config("llava_mole").losses.balance)
    loss, W = LOSSES["balance"](**options), {"W": jnp.eye(z.shape[-1])}
    ctx = small.context(z.shape[1], z.shape[2], **changes)
    sums = [loss.stats(TOP1(bias=False, dense=dense).route(W, {}, one, ctx)[0], ctx) for one in z]
    return loss.value({"ffn": {SEGMENT: {"ffn": jax.tree.map(lambda *x: jnp.stack(x), *sums)}}})


@pytest.mark.parametrize("dense", [False, True])
def test_acceptance_5_balance_is_one_over_E_at_uniform_and_one_at_collapse(dense):
    tie = 1e-7 * np.random.default_rng(0).standard_normal((2, 3, 6, 4))  # any argmax, p uniform
    np.testing.assert_allclose(balance(jnp.asarray(tie, jnp.float32), dense), 1 / 4, rtol=1e-5)
    collapse = np.zeros((2, 3, 6, 4), np.float32)
    collapse[..., 2] = 40.0
    np.testing.assert_allclose(balance(collapse, dense), 1.0, rtol=1e-5)
    opposite = np.stack([collapse[0], np.roll(collapse[1], 1, axis=-1)])  # layers are pooled: even use of two experts
    np.testing.assert_allclose(balance(opposite, dense), 0.5, rtol=1e-5)


@pytest.mark.parametrize("dense", [False, True])
def test_acceptance_5_the_gradient_is_that_of_p_alone(dense):
    z = jax.device_put(np.float32(np.random.default_rng(1).standard_normal((1, 1, 6, 4))))
    count = np.eye(4)[np.argmax(z, -1)].mean((0, 1, 2))
    of_p = jax.jit(jax.value_and_grad(lambda z: jnp.sum(count * jax.nn.softmax(z).mean((0, 1, 2)))))
    wanted, want = of_p(z)
    value, got = jax.jit(jax.value_and_grad(balance), static_argnums=1)(z, dense)
    np.testing.assert_allclose(value, wanted, rtol=1e-6)
    np.testing.assert_allclose(got, want, atol=1e-7)
    assert np.abs(got).max() > 1e-3


def test_acceptance_5_examples_are_averaged_not_joined():
    z = np.zeros((1, 1, 6, 4), np.float32)
    z[0, 0, :3, 0] = z[0, 0, 3:, 1] = 40.0
    packed = np.array([[1, 1, 1, 2, 2, 2]])
    np.testing.assert_allclose(balance(z, segment_ids=packed, max_segments=2), 1.0, rtol=1e-5)
    np.testing.assert_allclose(balance(z), 0.5, rtol=1e-5)


def test_acceptance_6_a_token_moves_its_own_choice_alone_and_the_projections_share_it():
    model, params, adapters, state = small.build("llava_mole")
    first = small.gates(model, params, adapters, state, BATCH)["ffn"][SEGMENT]
    assert list(first) == ["ffn"], "one decision for gate, up and down"
    gates = np.asarray(first["ffn"])
    valid = BATCH["segment_ids"] > 0
    assert set(np.unique(gates)) == {0.0, 1.0} and (gates.sum(-1) == valid).all()
    x = np.random.default_rng(0).standard_normal((2, 5, 32)).astype(np.float32)  # layer 0: no attention before it
    leaves = jax.tree.map(lambda w: w[0], adapters["ffn"][SEGMENT]["router"]["ffn"])
    pick = lambda x: np.asarray(small.routed(TOP1(), leaves, {}, jnp.asarray(x), small.context(2, 5))[0].selected)  # noqa: E731
    before, moved = pick(x), x.copy()
    moved[0, 2] = -moved[0, 2]
    same = np.ones((2, 5), bool)
    same[0, 2] = False
    after = pick(moved)
    np.testing.assert_array_equal(before[same], after[same])
    assert (before[0, 2] != after[0, 2]).any()


def projected(E, T, dense=False):
    """The config's routed projection `up` as the model runs it, of `x [T, D]`, and x."""
    changes = {"method__rules__ffn__router__dense": dense, "method__rules__ffn__experts": str(E)}
    model, _, adapters, _ = small.build("llava_mole", **changes)
    (rule,) = [r for r in model.rules if r.name == "ffn"]
    own = jax.tree.map(lambda w: w[0], adapters["ffn"][SEGMENT])
    ctx, W = small.context(1, T), jnp.zeros((own["up"]["A"].shape[-1], own["up"]["B"].shape[-1]))

    def run(x):
        decision = small.routed(rule.router, own["router"]["ffn"], {}, x[None], ctx)[0]
        part = projection.part(rule, own["up"], {}, decision, ctx, x)
        return engines.project(engines.ALONE, "up", W, None, x, [part])[0]

    return run, jax.device_put(np.float32(np.random.default_rng(E).standard_normal((T, len(W)))))


def test_acceptance_7_a_token_works_for_one_expert_and_a_dense_one_for_all(monkeypatch):
    """Sparse: the rows that its grouped product visits are T whatever E, but for a tenth of padding. Dense: FLOPs."""
    T = 8192
    for E in (2, 4, 8, 16):
        (visited,) = small.rows_visited(monkeypatch, *projected(E, T))
        assert T <= visited <= 1.1 * T, (E, visited)
    flops = {}
    for E in (2, 4, 8):
        run, x = projected(E, T, dense=True)
        assert small.rows_visited(monkeypatch, run, x) == [], "one product with all experts, which XLA counts whole"
        flops[E] = jax.jit(run).lower(x).compile().cost_analysis()["flops"]
    assert abs((flops[8] - flops[4]) / (flops[4] - flops[2]) - 2) < 0.1  # what is not the experts' falls out


def test_acceptance_7_whole_ffn_experts_are_the_same_sparse_function():
    """With one expert of weight 1, routed projections and a routed FFN (which has a grouped form) agree."""
    model, params, adapters, state = small.build("llava_mole")
    whole = small.build("llava_mole", method__rules__ffn__sites="ffn")[0]
    np.testing.assert_allclose(
        outputs(whole, params, adapters, state), outputs(model, params, adapters, state), rtol=2e-5, atol=2e-5
    )


def test_acceptance_8_padding_does_not_change_the_balance_loss():
    model, params, adapters, state = small.build("llava_mole")

    def value(data):
        stats = small.lm_loss(model, params, adapters, state, data)[1]["ffn"]
        loss = dict(model.losses)["balance"]
        return loss.value({"ffn": {s: {"ffn": v["ffn"]["losses"]["balance"]} for s, v in stats.items() if v}})

    longer = {n: np.pad(x, ((0, 0), (0, 7))) for n, x in BATCH.items()}
    longer["tokens"][BATCH["segment_ids"].shape[0] // 2 :, -7:] = 9
    np.testing.assert_allclose(value(longer), value(BATCH), rtol=1e-6)
