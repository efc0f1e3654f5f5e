"""RandLoRA, arXiv 2502.00987: its acceptance list, and peft's logits. N products of rank R, d the smaller width."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from configs import common
from molora_jax import config as schema
from molora_jax.adapters.randlora import RandLora, from_peft, scaled
from molora_jax.adapters.vera import Vera
from molora_jax.backbones.sizes import base_shapes
from molora_jax.core import trees
from molora_jax.core.types import Context, Site
from molora_jax.engines.auto import refusal
from molora_jax.engines.base import Engine
from molora_jax.errors import InputError
from tests.acceptance.baselines import PEFT, base, logits, of
from tests.acceptance.blocks import ALL, model
from tests.battery.cases import SMALL
from tests.engines.problems import mesh

WIDER, NARROWER = Site("up", 10, 14, (0,), 2), Site("down", 14, 10, (0,), 2)  # D_in < D_out, D_in > D_out
EVERY = (WIDER, NARROWER, Site("k", 10, 5, (0,), 2))
either = pytest.mark.parametrize("site", [WIDER, NARROWER], ids=["up", "down"])


def adapter(**options):
    return RandLora(**dict(rank=3, alpha=6.0, dropout=0.0) | options)


def context(site):
    return Context(None, None, None, None, None, site=site)


def leaves(made, site, *, random=True):
    p = made.init_leaves(jax.random.key(0), site, 0)
    rng = np.random.default_rng(2)
    return {n: x + random * jax.device_put(np.float32(rng.standard_normal(x.shape))) for n, x in p.items()}


def change(made, p, site, shared=None):
    """`[E, D_in, D_out]`, the scale in it."""
    return _change(made, p, site, shared_by(made) if shared is None else shared)


@functools.cache
def shared_by(made):
    return jax.jit(lambda: made.init_shared(None, EVERY))()


@functools.partial(jax.jit, static_argnums=(0, 2))
def _change(made, p, site, shared):
    f = made.factors(p, shared, context(site))
    return made.scale() * jnp.einsum("erd,ero->edo", jnp.broadcast_to(f.A, (len(f.B), *f.A.shape[1:])), f.B)


def summed(made, p, site):
    """The paper's sum in float64, term by term."""
    shared = {n: np.asarray(x, np.float64) for n, x in shared_by(made).items()}
    (E, N, d), D = p["gamma"].shape, max(site.d_in, site.d_out)
    A, out = shared["basis_A"][:, :d], np.zeros((E, D, d))
    for e in range(E):
        for j in range(N):
            middle = np.diag(np.asarray(p["lambda"], np.float64)[e, j]) @ A @ np.diag(np.asarray(p["gamma"])[e, j])
            out[e] += made.alpha / made.rank * shared["basis_B"][j, :, :D].T @ middle
    return np.swapaxes(out, 1, 2) if site.d_in < site.d_out else out  # x W: [D_in, D_out]


@either
def test_acceptance_1_the_first_step_moves_lambda_alone(site):
    made = adapter()
    p = leaves(made, site, random=False)
    assert p["lambda"].shape == (2, 4, 3) and p["gamma"].shape == (2, 4, 10) and (p["gamma"] == np.float32(0.1)).all()
    assert not change(made, p, site).any()
    loss = jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(1 + change(made, p, site)))))
    g = loss(p)
    assert not g["gamma"].any() and g["lambda"].any(axis=(1, 2)).all()
    p = jax.tree.map(lambda x, g: x - 0.01 * g, p, g)
    assert loss(p)["gamma"].any(axis=(1, 2)).all()


@either
def test_acceptance_2_the_rank_is_full_once_the_gammas_differ(site):
    made = adapter()
    p = leaves(made, site)
    assert (np.linalg.matrix_rank(np.asarray(change(made, p, site), np.float64), tol=1e-3) == 10).all()
    equal = p | {"gamma": jnp.broadcast_to(p["gamma"][:, :1], p["gamma"].shape)}
    assert (np.linalg.matrix_rank(np.asarray(change(made, equal, site), np.float64), tol=1e-3) <= 3).all()


@either
def test_acceptance_3_n_times_d_plus_r_train_and_a_larger_r_trains_less(site):
    count = lambda R: trees.count(leaves(adapter(rank=R), site)) // 2  # noqa: E731
    assert [count(R) for R in (1, 3, 5, 10)] == [10 * 11, 4 * 13, 2 * 15, 1 * 20]


@either
def test_acceptance_4_the_stacked_form_is_the_sum(site):
    made = adapter()
    p = leaves(made, site)
    np.testing.assert_allclose(change(made, p, site), summed(made, p, site), rtol=1e-5, atol=1e-4)
    root = dataclasses.replace(made, normalise=True)
    np.testing.assert_allclose(change(root, p, site), summed(made, p, site) / 4**0.5, rtol=1e-5, atol=1e-4)


@either
def test_acceptance_4_gradients_are_those_of_autodiff(site):
    made = adapter()
    p, A = leaves(made, site), shared_by(made)["basis_A"]
    G = jax.device_put(np.float32(np.random.default_rng(3).standard_normal((2, 4, 3, 10))))
    own = jax.jit(jax.grad(lambda p: jnp.sum(G * scaled(A, p["lambda"], p["gamma"]))))(p)
    wanted = jax.jit(jax.grad(lambda p: jnp.sum(G * p["lambda"][..., None] * A * p["gamma"][:, :, None, :])))(p)
    for name in p:
        np.testing.assert_allclose(own[name], wanted[name], rtol=1e-5, atol=1e-5)


def test_acceptance_5_bases_are_of_all_layers_have_deviation_1_and_never_train():
    made = adapter()
    shared = made.init_shared(jax.random.key(0), EVERY)
    assert shared["basis_A"].shape == (3, 10) and shared["basis_B"].shape == (4, 3, 14)
    for basis in shared.values():
        np.testing.assert_allclose(jnp.std(basis), 1.0, rtol=1e-5)
    again = made.init_shared(jax.random.key(9), EVERY)
    jax.tree.map(np.testing.assert_array_equal, shared, again)
    assert np.abs(dataclasses.replace(made, seed=1).init_shared(None, EVERY)["basis_A"] - shared["basis_A"]).max() > 0.1
    f, g = (made.factors(leaves(made, s), shared, context(s)) for s in (WIDER, NARROWER))
    np.testing.assert_array_equal(f.B[0], g.A[0])
    whole = model(ALL, (2, 3), ("softmax_topk", dict(k=2)), adapter="randlora", decoder=SMALL)
    shapes = jax.eval_shape(whole.init_adapters, jax.random.key(0), base_shapes(whole.config))
    trainable, fixed = (flatten_dict(x, sep="/") for x in trees.split(shapes, whole.frozen_patterns()))
    assert set(fixed) == {"mix/shared/basis_A", "mix/shared/basis_B"}
    assert {path.rpartition("/")[2] for path in trainable} == {"lambda", "gamma", "W"}


@pytest.mark.parametrize(("basis", "zeros"), [("sparse", 2 / 3), ("very_sparse", 1 - 400**-0.5)])
def test_acceptance_6_sparse_bases(basis, zeros):
    square = Site("q", 400, 400, (0,), 1)
    shared = adapter(rank=100, basis=basis).init_shared(None, (square,))
    for x in map(np.asarray, shared.values()):
        assert len(np.unique(x)) == 3 and np.unique(x)[1] == 0 and -x.min() == x.max()
        assert abs((x == 0).mean() - zeros) < 0.01
        np.testing.assert_allclose(x.std(), 1.0, rtol=1e-4)


def test_acceptance_7_one_product_of_full_rank_is_vera():
    """Where D_in > D_out: y = gamma * (A^T (lambda * (B x))), VeRA with the bases in each other's places."""
    made, site = adapter(rank=10, alpha=10.0), NARROWER
    p, shared = leaves(made, site), made.init_shared(None, EVERY)
    assert p["lambda"].shape == (2, 1, 10)
    vera = Vera(rank=10).factors(
        {"d": p["lambda"][:, 0], "b": p["gamma"][:, 0]},
        {"basis_A": shared["basis_B"][0], "basis_B": shared["basis_A"]}, context(site),
    )  # fmt: skip
    wanted = jnp.einsum("rd,ero->edo", vera.A[0], vera.B)
    np.testing.assert_allclose(change(made, p, site, shared), wanted, rtol=1e-4, atol=1e-4)


def fitted(product, params, target, steps=400):
    """The relative error of the best of two rates of Adam after so many steps."""

    @jax.jit
    def run(params, rate):
        adam = optax.adam(1.0)
        error = lambda p: jnp.sum((product(p) - target) ** 2)  # noqa: E731

        def step(state, _):
            p, inner = state
            updates, inner = adam.update(jax.grad(error)(p), inner)
            return (jax.tree.map(lambda x, u: x + rate * u, p, updates), inner), None

        p = jax.lax.scan(step, (params, adam.init(params)), length=steps)[0][0]
        return jnp.sqrt(error(p) / jnp.sum(target**2))

    return min(float(run(params, rate)) for rate in (0.003, 0.01, 0.03))


@pytest.mark.parametrize("spectrum", ["flat", "decaying"])
def test_acceptance_8_it_fits_flat_spectra_better_than_lora_and_decaying_ones_worse(spectrum):
    D, rng = 32, np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.standard_normal((D, D)))[0] for _ in range(2))
    values = np.ones(D) if spectrum == "flat" else 0.3 ** np.arange(D)
    target = jnp.asarray((u * values) @ v, jnp.float32)
    square, made = Site("q", D, D, (0,), 1), adapter(rank=8, alpha=1.0)
    p = made.init_leaves(None, square, 0)
    shared = made.init_shared(None, (square,))
    ours = fitted(lambda p: change(made, p, square, shared)[0], p, target)
    pair = {"A": jax.device_put(np.float32(rng.standard_normal((3, D)) / D**0.5)), "B": jnp.zeros((3, D))}
    assert trees.count(p) == 160 < trees.count(pair) == 192
    lora = fitted(lambda p: p["A"].T @ p["B"], pair, target)
    assert ours < lora if spectrum == "flat" else lora < 0.2 * ours, (ours, lora)


def test_pefts_logits_in_its_own_order():
    made = adapter(order="peft")
    sites = [Site(name, *base()[0].dims(name), (0, 1), 1) for name in ALL]
    layers = []
    for layer in (0, 1):
        lambdas, gammas = ({s: of("randlora", layer, s, f"randlora_{n}") for s in ALL} for n in ("lambda", "gamma"))
        shared, own = from_peft(made, sites, PEFT["randlora/randlora_A"], PEFT["randlora/randlora_B"], lambdas, gammas)
        layers.append(own)
    own = jax.tree.map(lambda *x: jnp.stack([jnp.asarray(y) for y in x]), *layers)
    got = logits("randlora", ALL, own.__getitem__, shared, rank=3, alpha=6.0, order="peft")
    np.testing.assert_allclose(got, PEFT["randlora/logits"], atol=1e-4)
    other = logits("randlora", ALL, own.__getitem__, shared, rank=3, alpha=6.0)
    assert np.abs(other - PEFT["randlora/logits"]).max() > 0.1, "the order of the pairs matters"


def test_where_a_low_rank_is_needed_it_is_refused_with_the_reason():
    config = common.get_config()
    config.method.rules = dict(all=common.rule("ffn", adapter=common.adapter("randlora")))
    with pytest.raises(InputError, match="an inner width near D are as large as what W_d"):
        schema.validate(config)
    config.method.rules.all.placement = dict(name="chain")
    with pytest.raises(InputError, match="a dense layer of its own"):
        schema.validate(config)
    made = model(("q",), 4, ("softmax_topk", dict(k=2)), adapter="randlora")
    on = Engine("all_to_all", mesh(expert=2))
    assert refusal(made, on) == ""
    assert "no narrower than the token itself" in refusal(made, dataclasses.replace(on, rank_space=True))
