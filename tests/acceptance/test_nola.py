"""NOLA, arXiv 2310.02556: its acceptance list. k, l numbers of random matrices, R rank."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from molora_jax.adapters.nola import OF_A, OF_B, OFFSET, Nola
from molora_jax.core import random_bases, trees
from molora_jax.core.types import Context, Site
from molora_jax.errors import InputError
from molora_jax.runs.bases import check_bases
from tests.acceptance.blocks import model, noisy, output
from tests.battery.cases import ROOT, SMALL, base

SITE = Site("q", 20, 14, (0,), 3)
CTX = Context(None, None, None, None, None, site=SITE)
SMALL_NOLA = dict(bases_A=10, bases_B=7, chunk=4)


def adapter(**options):
    return Nola(**dict(rank=3, alpha=6.0, dropout=0.0, **SMALL_NOLA) | options)


@functools.partial(jax.jit, static_argnums=0)
def factors(made, p):
    return made.factors(p, {}, CTX)


def fresh(made, seed=0):
    return made.init_leaves(jax.random.key(seed), SITE, 0)


def moved(made, seed=0):
    """Leaves with coefficients away from 0."""
    p = fresh(made, seed)
    rng = np.random.default_rng(4)
    return p | {name: jax.device_put(np.float32(rng.standard_normal(p[name].shape))) for name in ("alpha", "beta")}


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def drawn(seed, n, width, stream):
    return random_bases.uniform(seed, jnp.arange(n), width, stream=stream)


def bases(p, made):
    """`(A_off [R, D_in], A_i [k, R, D_in], B_j [l, R, D_out])`, float64, all of them at once."""
    seed, R = p["seed"][0], made.rank
    of = lambda n, width, stream: np.asarray(  # noqa: E731
        drawn(seed, n, R * width, stream), np.float64
    ).reshape(n, R, width)
    return of(1, 20, OFFSET)[0] / 20**0.5, of(made.bases_A, 20, OF_A), of(made.bases_B, 14, OF_B)


@pytest.mark.parametrize("change", [{}, dict(rank=8), dict(bases_A=1, bases_B=1)])
def test_acceptance_1_k_plus_l_train_whatever_rank_and_widths_are(change):
    for site in (SITE, Site("down", 48, 7, (0,), 3)):
        made = adapter(**change)
        own = {n: x for n, x in made.init_leaves(jax.random.key(0), site, 0).items() if n not in made.FROZEN}
        assert sum(x.size for x in own.values()) == 3 * (made.bases_A + made.bases_B)


def test_acceptance_2_the_first_step_moves_beta_alone():
    made, X = adapter(), np.random.default_rng(6).standard_normal((11, 20)).astype(np.float32)
    p = fresh(made)
    assert not p["alpha"].any() and not p["beta"].any()
    f = factors(made, p)
    assert not f.B.any() and 0.9 * 20**-0.5 < np.abs(f.A).max() <= 20**-0.5

    def loss(own):
        f = factors(made, p | own)
        return jnp.sum(jnp.sin(1 + jnp.einsum("td,erd,ero->teo", X, f.A, f.B)))

    own = {name: p[name] for name in ("alpha", "beta")}
    slope = jax.jit(jax.grad(loss))
    own = jax.tree.map(lambda x, g: x - 0.1 * g, own, slope(own))
    assert not own["alpha"].any() and np.abs(own["beta"]).all()
    assert np.abs(slope(own)["alpha"]).all(), "from the second step on alpha moves too"


@pytest.mark.parametrize("options", [{}, dict(normalise=False, offset=False)])
def test_acceptance_3_values_and_gradients_are_those_of_bases_that_are_there(options):
    made = adapter(**options)
    p = moved(made)
    offset, A_i, B_j = bases(p, made)
    root = (10**-0.5, 7**-0.5) if made.normalise else (1.0, 1.0)
    alpha, beta = (np.asarray(p[n], np.float64) for n in ("alpha", "beta"))
    f = factors(made, p)
    wanted_A = made.offset * offset + root[0] * np.einsum("ek,krd->erd", alpha, A_i)
    np.testing.assert_allclose(f.A, wanted_A, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(f.B, root[1] * np.einsum("ek,kro->ero", beta, B_j), rtol=1e-5, atol=1e-5)
    rng = np.random.default_rng(5)
    G_A, G_B = (rng.standard_normal(x.shape).astype(np.float32) for x in (f.A, f.B))

    def through(alpha, beta):
        f = factors(made, p | {"alpha": alpha, "beta": beta})
        return jnp.sum(f.A * G_A) + jnp.sum(f.B * G_B)

    got = jax.jit(jax.grad(through, argnums=(0, 1)))(p["alpha"], p["beta"])
    np.testing.assert_allclose(got[0], root[0] * np.einsum("erd,krd->ek", G_A, A_i), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got[1], root[1] * np.einsum("ero,kro->ek", G_B, B_j), rtol=1e-5, atol=1e-5)


REBUILD = """
import sys, jax, numpy as np
from tests.acceptance.test_nola import CTX, adapter
saved = dict(np.load(sys.argv[1]))
f = adapter().factors(saved, {}, CTX)
np.savez(sys.argv[2], A=f.A, B=f.B)
"""


@pytest.mark.slow  # a process of its own
def test_acceptance_4_seed_and_coefficients_give_the_same_bits_in_another_process(tmp_path):
    p, made = moved(adapter()), adapter()
    f = factors(made, p)
    np.savez(tmp_path / "saved.npz", **p)
    files = [str(tmp_path / name) for name in ("saved.npz", "again.npz")]
    subprocess.run([sys.executable, "-c", REBUILD, *files], cwd=ROOT, check=True)
    again = np.load(files[1])
    np.testing.assert_array_equal(again["A"], f.A)
    np.testing.assert_array_equal(again["B"], f.B)


def test_acceptance_4_bases_that_are_made_otherwise_are_refused():
    made = model(("q", "down"), 2, ("softmax_topk", dict(k=1)), adapter="nola", **SMALL_NOLA)
    adapters = jax.device_get(noisy(made))
    check_bases(made.rules, adapters, where="workdir", of="a run")
    adapters["mix"]["000-000"]["down"]["check"] = adapters["mix"]["000-000"]["down"]["check"] + 1
    with pytest.raises(InputError, match="random bases at mix/000-000/down"):
        check_bases(made.rules, adapters, where="workdir", of="a run")


def test_acceptance_5_memory_does_not_grow_with_the_number_of_matrices():
    """Of the compiled gradient; and no leaf is as large as one matrix."""

    def temporary(k):
        made, wide = adapter(rank=4, bases_A=k, bases_B=k, chunk=16), Site("q", 256, 256, (0,), 1)
        p = made.init_leaves(jax.random.key(0), wide, 0)
        assert max(x.size for x in p.values()) == k < 4 * 256 * 16

        def loss(own, seed):
            f = made.factors(own | {"seed": seed}, {}, CTX.replace(site=wide))
            return jnp.sum(f.A**2) + jnp.sum(f.B**2)

        own = {name: p[name] for name in ("alpha", "beta")}
        return jax.jit(jax.grad(loss)).lower(own, p["seed"]).compile().memory_analysis().temp_size_in_bytes

    few, many, matrix = temporary(64), temporary(1024), 4 * 256 * 4
    assert many - few < 16 * matrix, (few, many)  # the coefficients and their sums, not 960 matrices
    assert many < 60 * matrix


def test_acceptance_6_a_merged_model_is_the_adapters():
    made = model(("q", "down"), 1, adapter="nola", **SMALL_NOLA)
    adapters = noisy(made)
    params = dict(base(made.config))
    params["blocks"] = dict(params["blocks"])
    for site in ("q", "down"):
        p = jax.tree.map(lambda x: x[0], adapters["mix"]["000-000"][site])
        f = made.rules[0].adapter.factors(p, {}, CTX.replace(site=Site(site, *made.config.dims(site), (0,), 1)))
        change = made.rules[0].adapter.scale() * np.einsum("erd,ero->do", f.A, f.B)
        params["blocks"][site] = {"kernel": params["blocks"][site]["kernel"] + change[None]}
    merged = output(made.without_rules(), {}, params=params)
    assert np.abs(output(made, adapters) - output(made.without_rules(), {})).max() > 0.01
    np.testing.assert_allclose(output(made, adapters), merged, atol=1e-5)


def test_acceptance_7_the_rank_is_that_of_the_factors():
    for k in (1, 10):
        made = adapter(bases_A=k, bases_B=k)
        p = moved(made)
        assert p["alpha"].shape == p["beta"].shape == (3, k)
        f = factors(made, p)
        for e in range(3):
            assert np.linalg.matrix_rank(np.asarray(f.A[e]).T @ np.asarray(f.B[e]), tol=1e-4) <= made.rank


def test_experts_share_the_bases_and_layers_do_if_they_are_told():
    router = ("softmax_topk", dict(k=2))
    for share in (False, True):
        made = model(("q", "down"), 3, router, adapter="nola", decoder=SMALL, share_basis=share, **SMALL_NOLA)
        trainable, fixed = (flatten_dict(x, sep="/") for x in trees.split(noisy(made), made.frozen_patterns()))
        assert {path.rpartition("/")[2] for path in trainable} == {"alpha", "beta", "W"}
        seeds = {path: np.asarray(x) for path, x in fixed.items() if path.endswith("/seed")}
        assert {path.split("/")[1] for path in seeds} == {"shared" if share else "000-001"}
        apart = len({int(x) for leaf in seeds.values() for x in leaf.reshape(-1)})
        assert apart == (2 if share else 4)
        assert sum(x.size for x in fixed.values()) == 5 * apart, "seeds and checks alone are frozen"
    tied = adapter()
    p = fresh(tied)
    p = p | {"alpha": p["alpha"] + 1, "beta": p["beta"] + 1}
    f = tied.factors(p, {}, CTX)
    np.testing.assert_array_equal(f.A[0], f.A[2])
