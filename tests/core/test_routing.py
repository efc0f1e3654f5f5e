"""Selections, slots, masks and statistics of expert load, against loops in numpy."""

import dataclasses
import functools
import itertools
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from molora_jax.config import outside
from molora_jax.core import lowrank, routing
from molora_jax.core.types import Context, Factors, Site
from molora_jax.routers import ROUTERS
from molora_jax.routers.base import Router

# whose input is what the site's own A makes of a token has tests of its own (acceptance/test_mora_cl)
ALONE = [name for name in ROUTERS if name != "self_activated"]
# with fewer experts: shorter codes, fewer hidden units, another threshold at the start
COUNTING = ("dselect_k", "sigmoid_threshold", "controlled_threshold")
SHAPES = st.sampled_from([(4, 1), (4, 2), (4, 5), (4, 9)])  # a few, because every shape is compiled
scores = hnp.arrays(np.float32, SHAPES, elements=st.sampled_from([-2.0, -1.0, 0.0, 0.25, 0.5, 1.0]))


def test_logits_are_products_in_float32_on_every_device():
    """By default a GPU would multiply in TF32 and a TPU in bfloat16, which flip near-ties."""
    text = str(jax.make_jaxpr(routing.logits)(jnp.ones((8, 16)), jnp.ones((2, 3, 16), jnp.bfloat16)))
    assert "dot_general" in text and "HIGHEST" in text


def context(valid, **more):
    valid = jnp.asarray(valid)
    zeros = jnp.zeros(valid.shape, jnp.int32)
    return Context(valid, zeros, zeros, zeros, zeros, **{"tokens": zeros + jnp.arange(valid.shape[1])} | more)


def made(name, experts, d_in, /, **options):
    """`(router, leaves, shared)` of a router by itself; what trains is drawn from N(0, 1), so that experts differ."""
    router = ROUTERS[name](**options)
    site = Site("q", d_in, d_in, (0,), experts)
    begin = lambda: (router.init_leaves(jax.random.key(4), site, 0), router.init_shared(jax.random.key(5), (site,)))  # noqa: E731
    leaves, tree = jax.tree.flatten(jax.eval_shape(begin))
    if not all(jnp.issubdtype(v.dtype, jnp.floating) for v in leaves):  # codes are not drawn anew
        leaves = jax.tree.leaves(begin())
    rng = np.random.default_rng(1)
    return router, *jax.tree.unflatten(tree, [
        jnp.asarray(rng.standard_normal(v.shape), v.dtype) if jnp.issubdtype(v.dtype, jnp.floating) else v
        for v in leaves
    ])  # fmt: skip


def decide(router, leaves, shared, x, ctx):
    """A router's decision at the start of its state and its carry."""
    site = Site("q", x.shape[-1], x.shape[-1], (0,), ctx.allowed.shape[-1] if ctx.allowed is not None else 6)
    if router.INPUT:
        x = router.base_features(shared, x, ctx)
    ctx = ctx.replace(site=site, state=router.init_state(site), carry=router.init_carry(*x.shape[:2]))
    return router.route(leaves, shared, x, ctx)[0]


def expert_axes(router, width):
    """The axis of each leaf that grows with the experts, -1 where none does."""
    few, many = (
        jax.eval_shape(lambda E=E: router.init_leaves(jax.random.key(0), Site("q", width, width, (0,), E), 0))
        for E in (4, 5)
    )
    return jax.tree.map(lambda a, b: next((i for i, n in enumerate(a.shape) if n != b.shape[i]), -1), few, many)


@settings(max_examples=60)
@given(scores, st.sampled_from([1, 2, 4, 5, 8]))
def test_top_k_takes_the_largest_and_the_lower_index_of_a_tie(score, k):
    wanted = np.zeros(score.shape, bool)
    for row, out in zip(score, wanted, strict=True):
        out[sorted(range(len(row)), key=lambda i: (-row[i], i))[:k]] = True
    np.testing.assert_array_equal(routing.top_k(jnp.asarray(score), k), wanted)


@settings(max_examples=100)
@given(hnp.arrays(np.float32, SHAPES, elements=st.sampled_from([1.0, 2.0, 3.0, 5.0, 8.0])),
       st.sampled_from([0.0, 0.25, 0.5, 0.9, 1.0, 1.5]))  # fmt: skip
def test_top_p_is_the_shortest_prefix_past_p(weight, p):
    """A sum that meets p is decided by its last bit, so the sums compared with p are added up the same way here."""
    probs = (weight / weight.sum(axis=1, keepdims=True)).astype(np.float32)
    got = np.asarray(routing.top_p(jnp.asarray(probs), p))
    orders = [sorted(range(len(row)), key=lambda i: (-row[i], i)) for row in probs]
    ranked = np.take_along_axis(probs, np.array(orders), axis=1)
    sums = np.asarray(jnp.cumsum(jnp.asarray(ranked), axis=1))
    np.testing.assert_allclose(sums, np.cumsum(ranked, axis=1, dtype=np.float64), rtol=1e-6)
    for row, order, before, out in zip(probs, orders, sums - ranked, got, strict=True):
        kept = []
        for i, mass in zip(order, before, strict=True):
            if p < 1 and mass > np.float32(p):  # those ahead have passed p already
                break
            kept.append(i)
        assert sorted(kept) == list(np.flatnonzero(out)), (row, p)
        assert out.any() and (p < 1 or out.all())


def test_top_p_at_a_tie_one_step_before_the_crossing():
    """0.3 + 0.3 + 0.2 + 0.1 is 0.9 or a bit beside it: four or five experts, and never another one of them."""
    probs = np.array([0.3, 0.1, 0.3, 0.1, 0.2], np.float32)
    kept = np.flatnonzero(routing.top_p(jnp.asarray(probs)[None], 0.9)[0]).tolist()
    assert kept in ([0, 1, 2, 4], [0, 1, 2, 3, 4])
    for p, wanted in ((0.89, [0, 1, 2, 4]), (0.91, [0, 1, 2, 3, 4]), (0.59, [0, 2]), (0.61, [0, 2, 4])):
        assert np.flatnonzero(routing.top_p(jnp.asarray(probs)[None], p)[0]).tolist() == wanted


@pytest.mark.parametrize("k_max", [2, 3, 5])
def test_slots_pick_by_selection_not_by_gate(k_max):
    """Gates may be negative, or 0 at a selected expert; padding has no slot."""
    gates = np.array([[[0.0, -2.0, 0.0, 0.0, 3.0], [0.0, 0.0, 0.0, 0.0, 0.0], [9.0, 0.0, 0.0, 0.0, 0.0]]], np.float32)
    selected = np.array([[[0, 1, 0, 0, 1], [1, 0, 1, 0, 0], [1, 0, 0, 0, 0]]], bool)
    made = routing.finish(
        jnp.asarray(gates), jnp.asarray(selected), gates, gates, context([[True, True, False]]), k_max=k_max
    )
    idx, w = map(np.asarray, routing.slots(made))
    assert idx.shape == w.shape == (3, k_max) and idx.dtype == np.int32
    found = [{int(i): float(g) for i, g in zip(*row, strict=True) if i < 5} for row in zip(idx, w, strict=True)]
    assert found == [{1: -2.0, 4: 3.0}, {0: 0.0, 2: 0.0}, {}]
    assert (w[idx == 5] == 0).all()


@pytest.mark.parametrize("name", [name for name in ALONE if name not in COUNTING])
@pytest.mark.parametrize("shape", ["E", "BE"])
def test_allowed_experts_take_all_of_the_probability(name, shape):
    """Shutting out an expert equals a router that does not have it; its weights get no gradient."""
    B, S, D, E = 2, 5, 8, 6
    x = jax.random.normal(jax.random.key(0), (B, S, D))
    allowed = np.array([1, 0, 1, 1, 0, 1], bool)
    keep = np.flatnonzero(allowed)
    masked = context(np.ones((B, S), bool), allowed=jnp.asarray(allowed if shape == "E" else np.tile(allowed, (B, 1))))
    small = context(np.ones((B, S), bool), allowed=jnp.ones(len(keep), bool))
    probe = jnp.sin(jnp.arange(E))
    router, leaves, shared = made(name, E, D)
    axes = expert_axes(router, D)

    def kept(tree, which=keep):
        return jax.tree.map(lambda v, axis: v if axis < 0 else jnp.take(v, which, axis=axis), tree, axes)

    def weighted(leaves, ctx, probe):
        decision = decide(router, leaves, shared, x, ctx)
        return jnp.sum(decision.gates * probe), decision

    both = jax.jit(jax.value_and_grad(weighted, has_aux=True))
    (_, whole), g = both(leaves, masked, probe)
    (_, few), g_few = both(kept(leaves), small, probe[keep])
    for field in ("gates", "selected", "probs"):
        np.testing.assert_allclose(getattr(whole, field)[..., keep], getattr(few, field), atol=1e-6)
        assert not np.any(getattr(whole, field)[..., ~allowed])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), kept(g), g_few)
    shut = kept(g, np.flatnonzero(~allowed))
    jax.tree.map(lambda v, axis: np.testing.assert_array_equal(v, 0) if axis >= 0 else None, shut, axes)


@pytest.mark.parametrize("name", ALONE)
def test_an_example_without_any_expert_takes_the_base_and_stays_finite(name):
    x, ctx = jnp.ones((1, 3, 4)), context(np.ones((1, 3), bool), allowed=jnp.zeros((1, 5), bool))
    options = {"renormalise": True} if hasattr(ROUTERS[name], "renormalise") else {}
    router, leaves, shared = made(name, 5, 4, **options)

    def total(leaves):
        decision = decide(router, leaves, shared, x, ctx)
        return jnp.sum(decision.gates), decision

    (value, decision), g = jax.jit(jax.value_and_grad(total, has_aux=True))(leaves)
    assert value == 0 and not np.any(decision.selected)
    assert all(np.isfinite(v).all() for v in jax.tree.leaves(g))


def variants(name):
    """The options of a router: its defaults, each of its fields at other values, and pairs of these with a choice."""
    cls, choices, numbers = ROUTERS[name], [], []
    common, limits = {field.name for field in dataclasses.fields(Router)}, outside.limits(cls)
    for field in (field for field in dataclasses.fields(cls) if field.name not in common):
        if field.type is bool or typing.get_origin(field.type) is typing.Literal:
            values = (False, True) if field.type is bool else typing.get_args(field.type)
            choices += [{field.name: value} for value in values if value != field.default]
        elif field.type is float or field.type is int and field.default <= 8:  # beyond is a width: a compile a value
            lowest = 0 if field.default == 0 else 1 if field.type is int else None
            low, high, *_ = limits.get(field.name, (lowest, None))
            values = (0.5, 2.0) if field.type is float else (0, 1, 2)
            fit = [v for v in values if (low is None or v >= low) and (high is None or v <= high)]
            numbers += [{field.name: value} for value in fit if value != field.default]
    pairs = [a | b for a, b in itertools.product(choices, [*choices, *numbers]) if a.keys() != b.keys()]
    return [{}, *choices, *numbers, *pairs]


@pytest.mark.parametrize("name", ALONE)
def test_a_router_that_says_its_gates_sum_to_one_is_right(name, request):
    """With any options, with padding, some or all experts shut out, and cold logits: a bool base_gate is the rest.

    Of a router with many options an ordinary run leaves out the later pairs of them.
    """
    x = jax.random.normal(jax.random.key(0), (2, 5, 8))
    valid = np.array([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]], bool)
    for options in variants(name)[: None if request.config.getoption("--all") else 6]:
        router, leaves, shared = made(name, 6, 8, **options)
        for allowed in (None, np.arange(6) < 3, np.array([[1, 0, 1, 1, 1, 1], [0] * 6], bool)):
            said = set()
            for scale in (0.0, 1.0, 50.0):
                scaled = jax.tree.map(lambda v, scale=scale: scale * v, leaves)
                decision = decide(router, scaled, shared, x, context(valid, allowed=allowed))
                said.add(decision.base_gate is not None and decision.base_gate.dtype == bool)
                if decision.base_gate is not None and decision.base_gate.dtype == bool:
                    left = 1 - decision.gates.sum(-1)
                    np.testing.assert_allclose(decision.base_gate, left, atol=1e-5, err_msg=f"{name} {options}")
            assert len(said) == 1, "what a router says depends on its options alone"


SAID = [
    ("softmax_topk", dict(), True),
    ("softmax_topk", dict(k=0, renormalise=False), True),
    ("softmax_topk", dict(k=2, renormalise=False), False),
    ("top1", dict(), True),
    ("top1", dict(gated=True), False),
    ("top1", dict(dense=True), True),
    ("top_p", dict(), False),
    ("top_p", dict(renormalise=True), True),
    ("top_p", dict(renormalise=True, max_experts=1), True),
    ("recurrent", dict(), False),
    ("recurrent", dict(renormalise=True), True),
    ("x_lora", dict(), True),
    ("x_lora", dict(mix="raw"), False),
    ("x_lora", dict(mix="softmax_topk", top_k=2), True),
    ("x_lora", dict(top_k=2), False),
    ("x_lora", dict(gain=2.0), False),
    ("entropy_hybrid", dict(), False),
    ("sigmoid_topk", dict(), False),
]


@pytest.mark.parametrize(("name", "options", "said"), SAID, ids=str)
def test_routers_say_where_a_routed_ffn_needs_no_hidden_state_of_the_base(name, options, said):
    """What these lines say was measured (docs/performance.md); a router that is not among them need not be."""
    router, leaves, shared = made(name, 6, 8, **options)
    decision = decide(router, leaves, shared, jnp.ones((1, 2, 8)), context(np.ones((1, 2), bool)))
    assert (decision.base_gate is not None and decision.base_gate.dtype == bool) == said


def test_a_base_keeps_its_dtype_and_is_one_at_padding():
    probs, valid = jnp.full((1, 2, 3), 0.2), np.array([[1, 0]], bool)
    for base, dtype in ((jnp.zeros((1, 2), bool), bool), (jnp.full((1, 2), 0.5), jnp.float32)):
        made = routing.finish(probs, probs > 0, probs, probs, context(valid), k_max=3, base=base)
        assert made.base_gate.dtype == dtype and made.base_gate[0, 1] == 1 and made.base_gate[0, 0] == base[0, 0]
    with pytest.raises(AssertionError, match="sum to one"):
        routing.finish(probs, probs > 0, probs, probs, context(valid), k_max=3, base=base, sums_to_one=True)


@pytest.mark.parametrize("name", ALONE)
def test_padding_is_never_routed_nor_counted(name):
    x = jax.random.normal(jax.random.key(0), (2, 4, 8))
    valid = np.array([[1, 1, 1, 0], [1, 0, 0, 0]], bool)
    decision = jax.jit(functools.partial(decide, *made(name, 6, 8)))(x, context(valid))
    gates, selected = np.asarray(decision.gates), np.asarray(decision.selected)
    assert not np.any(gates[~valid]) and not np.any(selected[~valid])
    total = routing.sums(decision)
    assert total["tokens"] == 4 and total["slots"] == selected.sum() == total["count"].sum()
    assert total["top1"].sum() == 4
    np.testing.assert_allclose(total["prob"], np.asarray(decision.probs)[valid].sum(axis=0), rtol=1e-6)


def test_load_of_hand_made_sums():
    total = dict(tokens=10.0, slots=20.0, entropy=5.0, clipped=5.0,
                 count=np.array([12.0, 6.0, 2.0, 0.0]), top1=np.array([7.0, 3.0, 0.0, 0.0]))  # fmt: skip
    wanted = dict(load_max_over_mean=2.4, entropy=0.5, top1_share=0.7, active_experts=2.0, clipped_share=0.2)
    got = routing.expert_load({k: jnp.asarray(v) for k, v in total.items()})
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-6)


def test_router_is_float32_whatever_the_base():
    """Two experts whose logits differ by less than a bfloat16 step: the larger is chosen."""
    x = jnp.ones((1, 1, 2), jnp.bfloat16)
    z = routing.logits(jnp.array([[100.0, 0.0], [100.0, 0.01]]), x)
    assert z.dtype == jnp.float32 and int(jnp.argmax(z)) == 1
    np.testing.assert_array_equal(routing.top_k(routing.softmax(z), 1)[0, 0], [False, True])


def test_jitter_is_for_training_alone():
    router, x = ROUTERS["softmax_topk"](jitter=0.5), jax.random.normal(jax.random.key(0), (1, 6, 8))
    p = {"W": jax.random.normal(jax.random.key(1), (4, 8))}
    ones = np.ones((1, 6), bool)
    train = router.route(p, {}, x, context(ones, train=True, key=jax.random.key(2)))[0]
    serve = router.route(p, {}, x, context(ones, key=jax.random.key(2)))[0]
    still = ROUTERS["softmax_topk"]().route(p, {}, x, context(ones))[0]
    np.testing.assert_array_equal(serve.logits, still.logits)
    assert np.abs(train.logits - still.logits).max() > 0.01


def test_clipped_counts_what_max_experts_cut():
    x, p = jax.random.normal(jax.random.key(0), (2, 50, 8)), {"W": jax.random.normal(jax.random.key(1), (6, 8))}
    ctx = context(np.ones((2, 50), bool))
    free = ROUTERS["top_p"](p=0.9).route(p, {}, x, ctx)[0]
    cut = ROUTERS["top_p"](p=0.9, max_experts=2).route(p, {}, x, ctx)[0]
    wanted = np.asarray(free.selected).sum(-1)
    np.testing.assert_array_equal(cut.clipped, np.maximum(wanted - 2, 0))
    assert cut.k_max == 2 and np.asarray(cut.selected).sum(-1).max() == 2
    assert int(np.asarray(cut.clipped).sum()) > 0
    closed = context(np.ones((2, 50), bool), allowed=jnp.array([1, 1, 1, 0, 0, 0], bool))
    made = ROUTERS["top_p"](p=1.0, max_experts=2).route(p, {}, x, closed)[0]
    np.testing.assert_array_equal(made.clipped, np.ones((2, 50)), err_msg="shut-out experts are not wanted")


def test_shapes_that_do_not_fit_are_named():
    """Public functions say which shape they got, where numpy's rules would have broadcast it."""
    x, factors = jnp.ones((5, 8)), Factors(A=jnp.ones((3, 2, 8)), B=jnp.ones((3, 2, 4)))
    with pytest.raises(AssertionError, match=r"\(5, 1\)"):
        lowrank.low_rank(x, factors, jnp.ones((5, 1)))
    with pytest.raises(AssertionError, match=r"\(3, 2, 8\)"):
        lowrank.low_rank(jnp.ones((5, 1)), factors, jnp.ones((5, 3)))
    with pytest.raises(AssertionError, match=r"\(3, 1\)"):
        routing.logits(jnp.ones((3, 1)), jnp.ones((2, 4, 8)))
