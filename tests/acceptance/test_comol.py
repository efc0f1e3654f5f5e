"""CoMoL: the acceptance list of its specification, item by item (the numbers are the list's)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from molora_jax import config as schema
from molora_jax.adapters import ADAPTERS
from molora_jax.backbones.compile import compile_model
from molora_jax.backbones.families import TINY
from molora_jax.backbones.sizes import num_trainable
from molora_jax.core import lowrank
from molora_jax.core.types import Site
from molora_jax.errors import InputError
from molora_jax.routers import ROUTERS
from tests.acceptance import small
from tests.battery.cases import fresh_adapters

E, R, D_IN, D_OUT, T = 4, 3, 16, 12, 7
SITE = Site("q", D_IN, D_OUT, (0,), E, (E,))
X = np.random.default_rng(1).standard_normal((T, D_IN))
G = np.random.default_rng(2).dirichlet(np.ones(E), T)
FEW = dict(method__rules__all__sites="down")


def adapter(rank=R, alpha=6.0, **options):
    return ADAPTERS["comol"](rank=rank, alpha=alpha, dropout=0.0, **options)


def leaves(seed=0, experts=E):
    rng = np.random.default_rng(seed)
    shapes = dict(A=(1, R, D_IN), B=(1, R, D_OUT), core=(experts, R, R))
    return {name: rng.standard_normal(shape) / 2 for name, shape in shapes.items()}


def change(made, p, gates, x=X):
    single = lambda v: jnp.asarray(v, jnp.float32)  # noqa: E731
    return np.asarray(small.change(made, jax.tree.map(single, p), single(gates), single(x)))


def merged(p, g, x):
    """The core of each token first: z^T M(x), then B."""
    M = jnp.einsum("te,erq->trq", g, p["core"])
    return 2.0 * jnp.einsum("tq,qo->to", jnp.einsum("tr,trq->tq", x @ p["A"][0].T, M), p["B"][0])


def mixed(p, g, x):
    """Every core applied, then the gates."""
    return 2.0 * jnp.einsum("te,tr,erq,qo->to", g, x @ p["A"][0].T, p["core"], p["B"][0])


def tied(p, g, x):
    """A loop over E LoRAs whose B is B M^T."""
    return sum(2.0 * g[:, e : e + 1] * (x @ p["A"][0].T @ (p["B"][0].T @ p["core"][e].T).T) for e in range(E))


def test_acceptance_1_three_forms_agree_in_value_and_gradient_and_the_product_is_one_of_them():
    p, probe = leaves(), np.random.default_rng(3).standard_normal((T, D_OUT))
    with jax.enable_x64(True):
        found = {}
        for form in (merged, mixed, tied, live):
            of = jax.jit(jax.value_and_grad(lambda p, g, x, form=form: jnp.sum(probe * form(p, g, x)), (0, 1, 2)))
            found[form.__name__] = of(jax.tree.map(jnp.asarray, p), jnp.asarray(G), jnp.asarray(X))
        for name in ("mixed", "tied"):
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), *map(found.get, ("merged", name))
            )
    np.testing.assert_allclose(found["live"][0], found["merged"][0], rtol=1e-5)  # float32 inside
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found["live"], found["merged"])


def live(p, g, x):
    f = adapter().factors(p, {}, small.context(1, T)).replace(scale=adapter().scale())
    return lowrank.low_rank(x, f, g)


def test_acceptance_2_identity_cores_are_plain_lora_and_one_expert_is_one_core():
    p = leaves() | {"core": np.broadcast_to(np.eye(R), (E, R, R))}
    plain = 2.0 * X @ p["A"][0].T @ p["B"][0]
    for gates in (G, np.eye(E)[[1] * T]):
        np.testing.assert_allclose(change(adapter(), p, gates), plain, atol=1e-4)
    one = leaves(experts=1)
    wanted = 2.0 * X @ one["A"][0].T @ (one["B"][0].T @ one["core"][0].T).T
    np.testing.assert_allclose(change(adapter(), one, np.ones((T, 1))), wanted, atol=1e-4)


def test_acceptance_3_equal_cores_do_not_depend_on_the_router():
    p = leaves()
    p["core"] = np.broadcast_to(p["core"][:1], (E, R, R))
    np.testing.assert_allclose(change(adapter(), p, G), change(adapter(), p, np.full((T, E), 1 / E)), atol=1e-5)
    router, f32 = ROUTERS["core_space"](), jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), p)
    V = jax.device_put(np.float32(np.random.default_rng(4).standard_normal((E, R))))
    ctx, x = small.context(1, T), X[None]

    def loss(V):
        gates = small.routed(router, {"W": V}, {}, router.input_of(jnp.asarray(x, jnp.float32), f32, ctx), ctx)[0].gates
        return jnp.sum(small.change(adapter(), f32, gates[0], jnp.asarray(X, jnp.float32)) ** 2)

    value, of_router = jax.jit(jax.value_and_grad(loss))(V)
    np.testing.assert_allclose(of_router, 0, atol=1e-5 * float(value))


def test_acceptance_4_fresh_factors_change_nothing_and_only_b_learns():
    model, params, _, state = small.build("comol", **FEW)
    fresh, data = fresh_adapters(model, jax.random.key(0), params), small.batch()
    loss = lambda model, a: small.lm_loss(model, params, a, state, data)[0]  # noqa: E731
    assert float(loss(model, fresh)) == float(small.lm_loss(model.without_rules(), params, {}, {}, data)[0])
    g = small.lm_gradient(model, params, fresh, state, data)["all"]["000-001"]
    assert {name for name, v in g["down"].items() if np.asarray(v).any()} == {"B"}
    assert not np.asarray(g["router"]["down"]["W"]).any()
    core = np.asarray(fresh["all"]["000-001"]["down"]["core"])
    assert 0.9 / 4 < np.abs(core).max() <= 1 / 4 and not np.allclose(core[:, 0], core[:, 1])


def test_acceptance_5_hydralora_with_b_times_the_core_is_the_same_function():
    p = leaves()
    hydra = {"A": p["A"], "B": np.einsum("erq,qo->ero", p["core"], p["B"][0])}  # B_e = B M_e^T, rank-major
    shared = ADAPTERS["lora_shared_a"](rank=R, alpha=6.0, dropout=0.0)
    np.testing.assert_allclose(change(adapter(), p, G), change(shared, hydra, G), atol=1e-4)


def test_acceptance_6_parameter_counts_of_qwen3_8b():
    widths = dict(width=4096, ffn_width=12288, heads=32, kv_heads=8, head_dim=128, layers=36, vocab=64)
    decoder = dataclasses.replace(TINY, **widths)
    for router, millions in ((dict(name="core_space"), 24.97), (dict(name="softmax_topk", k=0), 29.09)):
        config = small.config("comol", method__rules__all__experts="4")
        with config.unlocked():
            config.method.rules.all.router = router
        assert num_trainable(compile_model(config, decoder)) / 1e6 == pytest.approx(millions, abs=0.005)


def test_acceptance_7_equal_projections_get_equal_gates():
    router, ctx = ROUTERS["core_space"](), small.context(1, T)
    p = jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), leaves())
    V = jax.device_put(np.float32(np.random.default_rng(4).standard_normal((E, R))))
    null = np.linalg.svd(leaves()["A"][0])[2][R:]  # directions that A does not see

    def gates(x):
        z = router.input_of(jnp.asarray(x[None], jnp.float32), p, ctx)
        return small.routed(router, {"W": V}, {}, z, ctx)[0].gates

    np.testing.assert_allclose(gates(X + 3 * null[0]), gates(X), atol=1e-5)
    assert not np.allclose(gates(X + leaves()["A"][0, 0]), gates(X), atol=1e-2)
    np.testing.assert_allclose(gates(X).sum(-1), 1, rtol=1e-6)


def test_acceptance_7_the_router_reads_the_projection_of_the_adapters_dropped_input():
    router, key = ROUTERS["core_space"](), jax.random.key(3)
    p, x = jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), leaves()), jnp.asarray(X, jnp.float32)
    seen = lowrank.dropped(x, lowrank.dropout(key, 0.5), jnp.arange(T))  # as placements/projection.py does
    z = router.input_of(x[None], p, small.context(1, T, key=key, train=True, dropout=0.5))
    np.testing.assert_allclose(z[0], seen @ p["A"][0].T, atol=1e-5)


def test_acceptance_8_no_buffer_holds_a_core_a_token():
    """Shapes of every intermediate value, forward and backward, at T=4096, r=16, E=8: none has T E r^2 numbers."""
    T, r, experts = 4096, 16, 8
    made = adapter(rank=r)
    site = Site("q", D_IN, D_OUT, (0,), experts)
    p = jax.eval_shape(lambda: made.init_leaves(jax.random.key(0), site, 0))
    f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    of = jax.jit(jax.grad(lambda p, g, x: jnp.sum(small.change.__wrapped__(made, p, g, x) ** 2), (0, 1, 2)))
    most = max(largest(jax.make_jaxpr(of)(p, f32(T, experts), f32(T, D_IN)).jaxpr))
    assert T * experts * r <= most < T * experts * r * r


def largest(jaxpr):
    for equation in jaxpr.eqns:
        yield from (v.aval.size for v in equation.outvars)
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from largest(inner)


def test_acceptance_9_with_constant_gates_it_is_one_lora():
    p, g = leaves(), G[:1]
    export = {"A": p["A"], "B": np.einsum("erq,qo->ro", g[0][:, None, None] * p["core"], p["B"][0])[None]}
    plain = ADAPTERS["lora"](rank=R, alpha=6.0, dropout=0.0)
    constant = np.broadcast_to(g, (T, E))
    np.testing.assert_allclose(change(adapter(), p, constant), change(plain, export, np.ones((T, 1))), atol=1e-4)


def test_identity_cores_start_near_the_identity():
    core = adapter(cores="identity", noise=0.01).init_leaves(jax.random.key(0), SITE, 0)["core"]
    np.testing.assert_allclose(core, np.broadcast_to(np.eye(R), core.shape), atol=0.05)
    assert np.ptp(np.asarray(core), axis=0).min() > 0


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            dict(method__rules__all__adapter=dict(name="lora", rank=4, alpha=4.0, dropout=0.0)),
            "adapter.name: got 'lora'",
        ),
        (dict(method__rules__all__router=dict(name="core_space", share="attn")), "router.share: got 'attn'"),
        (dict(method__rules__all__sites="ffn"), "sites: got 'ffn'"),
    ],
)
def test_a_router_of_the_core_space_needs_one_a(changes, told):
    config = small.config("comol")
    with config.unlocked():
        for path, value in changes.items():
            setattr(config.method.rules.all, path.rpartition("__")[2], value)
    with pytest.raises(InputError, match=told):
        schema.validate(config)
