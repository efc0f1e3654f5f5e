"""LoRA 2106.09685, rsLoRA 2312.03732, DoRA 2402.09353, LoRA+ 2402.12354, PiSSA 2404.02948: their acceptance list.

Items 1 to 6; 7 and 8 are VeRA's and AdaLoRA's. Item 2 is against the published equations, written out in float64.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from molora_jax import engines
from molora_jax.adapters import ADAPTERS
from molora_jax.adapters.dora import row_norm
from molora_jax.core import trees
from molora_jax.core.rules import Rule
from molora_jax.core.types import Context, Site
from molora_jax.optim.lora_plus import LoraPlus, scale_second
from molora_jax.placements import projection
from tests.acceptance.blocks import ALL, edit, model, noisy, output
from tests.battery.cases import Case, base, fresh_adapters, method

T, D_IN, D_OUT, R, ALPHA = 11, 20, 14, 4, 6.0
SITE = Site("up", D_IN, D_OUT, (0,), 1)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


W, X, BIAS = normal(0, D_IN, D_OUT), normal(1, T, D_IN), normal(2, D_OUT)


def leaves(adapter, *, random=True):
    made = jax.jit(lambda key: adapter.init_leaves(key, SITE, 0, base=W))(jax.random.key(0))
    if not random:
        return made
    return {k: v if k in ("A0", "B0") else v + 0.3 * normal(i + 5, *v.shape) for i, (k, v) in enumerate(made.items())}


def forward(adapter, p, x=X, bias=None):
    """The product's projection with one expert, without a router."""
    ids = jnp.ones((1, T), jnp.int32)
    ctx = Context(ids > 0, *[ids] * 4, base=jnp.asarray(W), site=SITE)
    rule = Rule("all", ("up",), (1,), adapter)
    return project(rule, p, ctx, x, bias)


def project(rule, p, ctx, x, bias=None):
    return engines.project(engines.ALONE, "up", W, bias, x, [projection.part(rule, p, {}, None, ctx, x)])[0]


def make(name, init="kaiming"):
    return ADAPTERS[name](rank=R, alpha=ALPHA, dropout=0.0, init=init)


@pytest.mark.parametrize(("name", "init", "atol"), [("lora", "kaiming", 0), ("rslora", "kaiming", 0),
                                                   ("dora", "kaiming", 2e-6), ("lora", "pissa", 1e-5),
                                                   ("dora", "pissa", 1e-5)])  # fmt: skip
def test_acceptance_1_start_leaves_the_function_unchanged(name, init, atol):
    p = leaves(make(name, init), random=False)
    np.testing.assert_allclose(forward(make(name, init), p), X @ W, atol=atol or 1e-6)
    made = model(ALL, 1, adapter=name, init=init)
    start = fresh_adapters(made, jax.random.key(0), base(made.config))
    frozen = output(made.without_rules(), {})
    np.testing.assert_allclose(output(made, start), frozen, atol=atol or 1e-6)


def test_acceptance_1_kaiming_bounds():
    A = np.asarray(make("lora").init_leaves(jax.random.key(1), dataclasses.replace(SITE, experts=200), 0)["A"])
    assert np.abs(A).max() <= D_IN**-0.5 and np.abs(A).max() > 0.99 * D_IN**-0.5
    np.testing.assert_allclose(A.var(), 1 / (3 * D_IN), rtol=0.05)


def equation(name, p):
    """The published weight `[D_out, D_in]` in float64, torch's layout."""
    W0 = W.T.astype(np.float64)
    s = ALPHA / (R**0.5 if name == "rslora" else R)
    A, B = np.asarray(p["A"][0], np.float64), np.asarray(p["B"][0], np.float64).T
    delta = s * B @ A
    if "A0" in p:
        delta = delta - s * np.asarray(p["B0"][0], np.float64).T @ np.asarray(p["A0"][0], np.float64)
    V = W0 + delta
    if name != "dora":
        return V
    return np.asarray(p["m"][0], np.float64)[:, None] * V / np.linalg.norm(V, axis=1, keepdims=True)


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
@pytest.mark.parametrize("name", ("lora", "rslora", "dora"))
def test_acceptance_2_values_are_the_published_equations(name, init):
    adapter = make(name, init)
    p = leaves(adapter)
    wanted = X @ equation(name, p).T
    np.testing.assert_allclose(forward(adapter, p), wanted, rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(forward(adapter, p, bias=BIAS), wanted + BIAS, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("rank", [1, 4, 9])
def test_acceptance_3_rslora_is_sqrt_r_times_lora(rank):
    lora, rslora = (ADAPTERS[n](rank=rank, alpha=ALPHA, dropout=0.0) for n in ("lora", "rslora"))
    p = leaves(lora)
    change, wider = (np.asarray(forward(a, p)) - X @ W for a in (lora, rslora))
    np.testing.assert_allclose(wider, rank**0.5 * change, rtol=1e-4, atol=1e-4)
    assert rslora.scale() == pytest.approx(rank**0.5 * lora.scale())


def test_acceptance_4_dora_gradients_and_row_norms():
    adapter = make("dora")
    p, dy = leaves(adapter), normal(7, T, D_OUT)
    g = jax.jit(jax.grad(lambda p: jnp.sum(forward(adapter, p) * dy)))(p)
    A, B = (np.asarray(p[k][0], np.float64) for k in "AB")
    s = adapter.scale()
    V = W + s * A.T @ B  # [D_in, D_out]
    norm = np.linalg.norm(V, axis=0)
    np.testing.assert_allclose(g["m"][0], ((X @ V / norm) * dy).sum(axis=0), rtol=1e-4, atol=1e-5)

    # the norm is a constant: B's gradient is that of LoRA with dy scaled by m / norm, with no term along V
    scaled = dy * np.asarray(p["m"][0]) / norm
    np.testing.assert_allclose(g["B"][0], s * (X @ A.T).T @ scaled, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(g["A"][0], s * (X.T @ (scaled @ B.T)).T, rtol=1e-4, atol=1e-4)
    through = jax.jit(jax.grad(lambda B: jnp.sum(row_norm(jnp.asarray(W), p["A"], B, s))))(p["B"])
    assert not np.any(through)

    merged = equation("dora", p)
    np.testing.assert_allclose(np.linalg.norm(merged, axis=1), np.abs(p["m"][0]), rtol=1e-6)
    np.testing.assert_allclose(row_norm(jnp.asarray(W), p["A"], p["B"], s)[0], norm, rtol=1e-5)
    negative = dict(p, m=-p["m"])
    np.testing.assert_allclose(np.linalg.norm(equation("dora", negative), axis=1), np.abs(p["m"][0]), rtol=1e-6)


def test_acceptance_4_the_norm_is_over_inputs():
    """Trap: an output row of W is a column of the kernel `[D_in, D_out]`."""
    m = make("dora").init_leaves(jax.random.key(0), SITE, 0, base=jnp.asarray(W))["m"]
    np.testing.assert_allclose(m[0], np.linalg.norm(W.T, axis=1), rtol=1e-6)


@pytest.mark.parametrize("ratio", [1.0, 16.0])
def test_acceptance_5_lora_plus_moves_b_ratio_times_as_far(ratio):
    """Under SGD the measured ratio of update to gradient is `ratio` for B and 1 for every other leaf."""
    q = {"A": normal(1, 2, 1, R, 5), "B": normal(2, 2, 1, R, 6), "m": normal(3, 2, 1, 6)}
    params = {"all": {"000-001": {"q": q, "router": {"q": {"W": normal(4, 2, 3, 5)}}}}}
    pairs = {("all/000-001/q/A", "all/000-001/q/B"): 2.0}
    optimizer = optax.chain(optax.sgd(0.1), scale_second(pairs, ratio))
    grads = jax.tree.map(lambda x: x + 1.0, params)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    for path, moved in flatten_dict(updates, sep="/").items():
        factor = ratio if path.endswith("/B") else 1.0
        np.testing.assert_allclose(moved / flatten_dict(grads, sep="/")[path], -0.1 * factor, rtol=1e-5, err_msg=path)


def test_acceptance_5_lora_plus_in_a_run_compiles_once_and_finds_every_b():
    """The real step: B moves 16 times as far as with AdamW from the same state; A and the routers as far."""
    moved, start = {}, {}
    for name in ("adamw", "lora_plus"):
        case = Case(method("mixlora", **{"optim.name": name}))
        start[name] = case.start()
        state = start[name]
        for _ in range(2):
            state, _, _ = case.run(state)
        assert case.step._cache_size() == 1
        one = case.run(case.start())[0]
        old, new = (flatten_dict(jax.device_get(s.adapters), sep="/") for s in (start[name], one))
        moved[name] = {path: new[path] - old[path] for path in old}
    for path, slow in moved["adamw"].items():
        ratio = 16.0 if path.endswith("/B") else 1.0
        atol = 2e-3 * np.abs(ratio * slow).max()  # a difference of near numbers
        np.testing.assert_allclose(moved["lora_plus"][path], ratio * slow, rtol=1e-3, atol=atol, err_msg=path)
    model = Case(method("mixlora")).model
    tree = jax.eval_shape(model.init_adapters, jax.random.key(0), Case(method("mixlora")).params)
    found = trees.pairs(model, tree)
    assert {B for _, B in found} == {p for p in flatten_dict(tree, sep="/") if p.endswith("/B")}
    assert all(A.rpartition("/")[0] == B.rpartition("/")[0] for A, B in found) and set(found.values()) == {2.0}
    assert LoraPlus().ratio == 16.0


@pytest.mark.parametrize("name", ["lora", "rslora"])
def test_acceptance_6_pissa_takes_the_principal_part(name):
    adapter = make(name, "pissa")
    p, s = leaves(adapter, random=False), adapter.scale()
    u, values, vt = np.linalg.svd(W.T.astype(np.float64), full_matrices=False)
    product = s * np.asarray(p["B"][0], np.float64).T @ np.asarray(p["A"][0], np.float64)
    np.testing.assert_allclose(product, (u[:, :R] * values[:R]) @ vt[:R], atol=1e-5)
    residual = np.linalg.svd(W.T - product, compute_uv=False)
    np.testing.assert_allclose(residual[: len(values) - R], values[R:], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(p["A"][0], axis=1) ** 2, values[:R] / s, rtol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(p["B"][0], axis=1) ** 2, values[:R] / s, rtol=1e-4)


def test_acceptance_6_pissa_trains_the_factors_and_never_their_start():
    """A0, B0 are saved, frozen, one copy for all experts; the change is exported as rank 2R: `[A; A0]`, `[B; -B0]`."""
    made = model(("q", "up"), 4, ("softmax_topk", dict(k=2)), init="pissa")
    adapters = noisy(made)
    trainable, fixed = trees.split(adapters, made.frozen_patterns())
    assert {p.rpartition("/")[2] for p in flatten_dict(fixed, sep="/")} == {"A0", "B0"}
    assert {p.rpartition("/")[2] for p in flatten_dict(trainable, sep="/")} == {"A", "B", "W"}
    assert flatten_dict(fixed, sep="/")["mix/000-000/q/A0"].shape[:2] == (1, 1)
    plain = dataclasses.replace(
        made, rules=(dataclasses.replace(made.rules[0], adapter=ADAPTERS["lora"](rank=6, alpha=12.0, dropout=0.0)),)
    )
    exported = edit(adapters)
    for leaves_ in (exported["mix"]["000-000"][s] for s in ("q", "up")):
        for leaf, sign in (("A", 1), ("B", -1)):
            start = sign * np.broadcast_to(leaves_.pop(leaf + "0"), leaves_[leaf].shape)
            leaves_[leaf] = np.concatenate([leaves_[leaf], start], axis=2)
    np.testing.assert_allclose(output(plain, exported), output(made, adapters), atol=1e-5)


def test_dropout_is_on_the_adapter_path_alone():
    """With B = 0 a dropped input changes nothing; with factors it does, and only in training."""
    adapter = dataclasses.replace(make("lora"), dropout=0.5)
    ids = jnp.ones((1, T), jnp.int32)
    ctx = Context(ids > 0, *[ids] * 4, base=jnp.asarray(W), site=SITE, key=jax.random.key(0), train=True)
    rule = Rule("all", ("up",), (1,), adapter)
    run = lambda p, ctx: project(rule, p, ctx, X)  # noqa: E731
    np.testing.assert_allclose(run(leaves(adapter, random=False), ctx), X @ W, atol=1e-5)
    p = leaves(adapter)
    assert np.abs(run(p, ctx) - run(p, ctx.replace(key=None))).max() > 0.1
    mean = np.mean([run(p, ctx.replace(key=jax.random.key(i))) for i in range(300)], axis=0)
    np.testing.assert_allclose(mean, run(p, ctx.replace(key=None)), atol=0.6)
