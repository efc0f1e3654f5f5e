"""HydraLoRA: the acceptance list of its specification, item by item (the numbers are the list's).

One routed projection as the model runs it: `router.route`, then the engine's product. T tokens, N B-matrices, R rank.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from molora_jax.adapters import ADAPTERS
from molora_jax.core.types import Site
from molora_jax.routers import ROUTERS
from tests.acceptance import small

T, D, OUT, N, R = 7, 16, 24, 3, 4
DENSE = ROUTERS["softmax_topk"](k=0, init="kaiming")
SHARED = ADAPTERS["lora_shared_a"](rank=R, alpha=8.0, dropout=0.0)
SCALE = 2.0


def normal(*shape, seed=0):
    return jax.device_put(np.float32(np.random.default_rng(seed).standard_normal(shape)))


X, PROBE = normal(T, D), normal(T, OUT, seed=1)  # the loss is sum(PROBE * y), so dL/dy is PROBE


def leaves_of(n=N, seed=2):
    A, B, W = normal(1, R, D, seed=seed), normal(n, R, OUT, seed=seed + 1), normal(n, D, seed=seed + 2)
    return {"A": A / 4, "B": B, "W": W}


def decide(W, x, **changes):
    return small.routed(DENSE, {"W": W}, {}, x[None], small.context(1, len(x), **changes))[0]


def hydra(p, x, adapter=SHARED):
    return small.change(adapter, {"A": p["A"], "B": p["B"]}, decide(p["W"], x).gates[0], x)


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradient(form, p, x):
    return form(p, x), jax.grad(lambda p, x: jnp.sum(PROBE * form(p, x)), argnums=(0, 1))(p, x)


def near(got, wanted, atol=2e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=atol), got, wanted)


def loop(p, x):
    g = jax.nn.softmax(x @ p["W"].T)
    return SCALE * sum(g[:, i : i + 1] * (x @ p["A"][0].T @ p["B"][i]) for i in range(len(p["B"])))


def stacked(p, x):
    g, z = jax.nn.softmax(x @ p["W"].T), x @ p["A"][0].T
    return SCALE * jnp.einsum("tn,tr->tnr", g, z).reshape(len(x), -1) @ p["B"].reshape(-1, OUT)


def by_token(p, x):
    B = jnp.einsum("tn,nro->tro", jax.nn.softmax(x @ p["W"].T), p["B"])
    return SCALE * jax.vmap(lambda x, B: B.T @ (p["A"][0] @ x))(x, B)


def plain(A, B, x):
    return SCALE * x @ A.T @ B


def test_acceptance_1_loop_stacked_and_token_form_agree_in_value_and_all_gradients():
    p = leaves_of()
    got = value_and_gradient(hydra, p, X)
    for form in (loop, stacked, by_token):
        near(got, value_and_gradient(form, p, X))


def test_acceptance_2_one_B_is_plain_lora_for_any_router():
    for seed in (0, 1):
        p = leaves_of(1) | {"W": 5 * normal(1, D, seed=seed)}
        y, (g, _) = value_and_gradient(hydra, p, X)
        near(y, plain(p["A"][0], p["B"][0], X))
        assert not np.asarray(g["W"]).any()


def test_acceptance_3_equal_Bs_are_plain_lora_and_give_the_router_no_gradient():
    p = leaves_of()
    usual = value_and_gradient(hydra, p, X)[1][0]["W"]
    p["B"] = jnp.repeat(p["B"][:1], N, axis=0)
    y, (g, _) = value_and_gradient(hydra, p, X)
    near(y, plain(p["A"][0], p["B"][0], X))
    np.testing.assert_allclose(g["W"], 0, atol=1e-6 * np.abs(usual).max())


def fresh():
    site = Site("up", D, OUT, (0,), N)
    p = SHARED.init_leaves(jax.random.key(0), site, 0) | DENSE.init_leaves(jax.random.key(1), site, 0)
    bound = D**-0.5  # kaiming-uniform with a = sqrt(5)
    for name in ("A", "W"):
        assert 0.8 * bound < np.abs(p[name]).max() <= bound
    return p


def test_acceptance_4_the_start_is_the_identity_and_moves_B_alone():
    p = fresh()
    y, (g, _) = value_and_gradient(hydra, p, X)
    assert not np.asarray(y).any() and not np.asarray(g["A"]).any() and not np.asarray(g["W"]).any()
    gates, z = jax.nn.softmax(X @ p["W"].T), X @ p["A"][0].T
    near(g["B"], SCALE * jnp.einsum("tn,tr,to->nro", gates, z, PROBE))


RULES = {"sgd": (optax.sgd(0.1), 1 / N), "adam": (optax.adam(1e-3, eps=1e-12), 1.0)}


@pytest.mark.parametrize("rule, share", RULES.values(), ids=RULES)
def test_acceptance_5_a_router_of_zeros_never_leaves_lora(rule, share):
    def moved(form, p, steps):
        state = rule.init(p)
        for _ in range(steps):
            updates, state = rule.update(value_and_gradient(form, p, X)[1][0], state)
            p = optax.apply_updates(p, updates)
        return p

    start = leaves_of() | {"W": jnp.zeros((N, D))}
    start["B"] = jnp.repeat(start["B"][:1], N, axis=0)
    after = moved(hydra, start, 1)
    lora = moved(hydra, leaves_of(1) | {"B": start["B"][:1]}, 1)
    step = lambda p: np.asarray(p["B"] - start["B"][: len(p["B"])]).mean(0)  # noqa: E731
    np.testing.assert_allclose(step(after), share * step(lora), rtol=2e-3, atol=2e-6)
    spread = lambda p: np.abs(p["B"] - p["B"][:1]).max()  # noqa: E731
    size = np.abs(step(after)).max()
    assert spread(moved(hydra, start, 3)) < 1e-2 * size, "equal B's stay equal"
    assert spread(moved(hydra, start | {"W": leaves_of()["W"]}, 3)) > 0.1 * size, "a random router tells them apart"


def test_acceptance_6_gates_are_positive_and_sum_to_one():
    decision = decide(leaves_of()["W"], X)
    np.testing.assert_allclose(decision.gates.sum(-1), 1, rtol=1e-6)
    assert decision.gates.min() > 0 and decision.selected.all()


def test_acceptance_6_gates_do_not_depend_on_the_dropout_mask():
    """Of the FFN's entry in a model of one layer, whose input no adapter has changed."""
    model, params, adapters, state = small.build("hydralora", layers=1, method__rules__ffn__adapter__dropout=0.5)
    seen = [
        small.gates(model, params, adapters, state, small.batch(), train=train, key=jax.random.key(7))["ffn"]["000-000"]
        for train in (False, True)
    ]
    for site in ("gate", "up"):
        np.testing.assert_array_equal(seen[0][site], seen[1][site])
    assert np.abs(seen[0]["down"] - seen[1]["down"]).max() > 1e-4, "dropout is on: what enters `down` has changed"


@pytest.mark.parametrize("rank, n, adapter, router", [(8, 3, 24.97e6, 1.84e6), (4, 4, 15.83e6, 2.46e6)])
def test_acceptance_7_the_parameter_count_with_the_router_is_the_formulas(rank, n, adapter, router):
    """Of the FFN projections of LLaMA-2-7B; the list's totals are of 32 layers."""
    total = np.zeros(2)
    for name, d_in, d_out in (("gate", 4096, 11008), ("up", 4096, 11008), ("down", 11008, 4096)):
        site = Site(name, d_in, d_out, (0,), n)
        members = ADAPTERS["lora_shared_a"](rank=rank), DENSE
        shapes = [
            jax.eval_shape(functools.partial(m.init_leaves, site=site, layer=0), jax.random.key(0)) for m in members
        ]
        count = [sum(x.size for x in jax.tree.leaves(tree)) for tree in shapes]
        assert sum(count) == rank * d_in + n * rank * d_out + n * d_in
        total += count
    np.testing.assert_allclose(32 * total, [adapter, router], rtol=2e-3)


def test_acceptance_8_it_is_the_dense_mixture_of_loramoe_with_tied_As():
    p = leaves_of()
    tied = p | {"A": jnp.repeat(p["A"], N, axis=0)}
    y, (g, gx) = value_and_gradient(hydra, p, X)
    y_tied, (g_tied, gx_tied) = value_and_gradient(functools.partial(hydra, adapter=small.lora(R, 8.0)), tied, X)
    near((y, gx), (y_tied, gx_tied))
    near(g, g_tied | {"A": g_tied["A"].sum(0, keepdims=True)})
    ours, theirs = (small.config(name).method.rules["ffn"] for name in ("hydralora", "loramoe"))
    assert dict(ours.router) == dict(theirs.router), "the same router"


def test_trap_the_language_model_version_has_no_loss_of_its_own():
    config = small.config("hydralora")
    assert not dict(config.losses)
    rule = config.method.rules["ffn"]
    assert (rule.experts, rule.adapter.alpha / rule.adapter.rank, rule.router.k) == ("4", 8.0, 0)
