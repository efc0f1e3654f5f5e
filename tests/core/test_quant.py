"""Kernels in 8 and 4 bits: the codes against bitsandbytes', the bytes against the formula, products and gradients."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import moe_ffn, tiles
from kernels_pallas.quantised import NF4
from molora_jax.core import quant
from molora_jax.core.lowrank import frozen_linear
from molora_jax.errors import InputError

FIXTURE = pathlib.Path(__file__).parents[1] / "fixtures" / "nf4.npz"


def packed(W, form):
    out = quant.empty(W.shape, form, W.dtype)
    quant.quantise(W, out)
    return out


def kernels(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_nf4_is_that_of_bitsandbytes():
    theirs = np.load(FIXTURE)
    W = packed(theirs["W"].T, "nf4")
    both = W.arrays["codes"]
    codes = np.stack([both >> 4, both & 15], axis=1).reshape(theirs["W"].T.shape)
    np.testing.assert_array_equal(codes.T, theirs["codes"])
    absmax = W.arrays["absmax"] * W.arrays["step"] + W.arrays["mean"]
    spread = np.abs(theirs["absmax"] - theirs["absmax"].mean()).max()
    np.testing.assert_allclose(absmax.T, theirs["absmax"], rtol=0, atol=0.5 / 127 * spread * 1.001)
    exact = np.array(NF4, np.float32)[theirs["codes"]] * np.repeat(theirs["absmax"], 64, axis=1)
    ours, twice = (np.sqrt(np.mean((x - exact) ** 2)) for x in (np.asarray(quant.dense(W)).T, theirs["twice"]))
    assert 0 < ours < twice  # what the second quantisation costs


@pytest.mark.parametrize("shape", [(3, 128, 96), (2, 4, 100, 64), (64, 48)])
@pytest.mark.parametrize("form", quant.FORMS)
def test_bytes_are_the_formula_and_errors_are_bounded(form, shape):
    W = kernels(*shape)
    out, again = packed(W, form), packed(W, form)
    assert out.shape == shape and out.nbytes == quant.num_bytes(shape, form) == sum(
        a.nbytes for a in out.arrays.values()
    )
    for name, array in out.arrays.items():
        np.testing.assert_array_equal(array, again.arrays[name])
    error = np.abs(np.asarray(quant.dense(out)) - W)
    most = np.abs(W).max(axis=-2, keepdims=True)
    assert (error <= most * (1.3 / 255 if form == "int8" else 0.16)).all()  # NF4's widest gap is 0.304 wide
    assert error.mean() < (0.005 if form == "int8" else 0.08)
    one = quant.dense(out[(0,) * (len(shape) - 2)])
    np.testing.assert_array_equal(one, np.asarray(quant.dense(out))[(0,) * (len(shape) - 2)])


@pytest.mark.parametrize("form", quant.FORMS)
def test_zeros_stay_zeros(form):
    W = np.zeros((128, 8), np.float32)
    W[:, 1] = 1.0
    found = np.asarray(quant.dense(packed(W, form)))
    assert (found[:, 0] == 0).all() and np.isfinite(found).all()
    np.testing.assert_allclose(found[:, 1], 1.0, rtol=1e-2)


def test_an_odd_width_is_refused():
    with pytest.raises(InputError, match="even widths"):
        quant.empty((33, 8), "nf4", np.float32, where="blocks/q/kernel")
    assert quant.empty((33, 8), "int8", np.float32).shape == (33, 8)


@pytest.mark.parametrize("ways", [1, 2, 4])
def test_finer_blocks_are_the_same_kernel_in_whole_shards(ways):
    W = packed(kernels(3, 96, 8), "nf4")  # 64 and 32 rows
    fine = quant.finer(W, ways)
    np.testing.assert_array_equal(quant.dense(fine), quant.dense(W))
    rows = 96 // ways

    def shard(a, i):
        return a[:, i * a.shape[1] // ways : (i + 1) * a.shape[1] // ways] if a.shape[1] > 1 else a

    for i in range(ways):
        own = fine.map(lambda a, i=i: shard(a, i))
        np.testing.assert_array_equal(quant.dense(own), np.asarray(quant.dense(W))[:, i * rows : (i + 1) * rows])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("form", quant.FORMS)
def test_the_product_and_its_gradient_are_those_of_the_dense_kernel(form, dtype):
    W, x, dy = packed(kernels(64, 24), form), kernels(5, 64, seed=1).astype(dtype), kernels(5, 24, seed=2).astype(dtype)
    (y, back), (y_dense, back_dense) = (jax.vjp(lambda x, W=W: frozen_linear(W, x), x) for W in (W, quant.dense(W)))
    np.testing.assert_array_equal(y, y_dense)
    assert back(dy)[0].dtype == dtype
    np.testing.assert_allclose(
        np.asarray(back(dy)[0], np.float32), np.asarray(back_dense(dy)[0], np.float32),
        rtol=1e-5 if dtype == jnp.float32 else 1e-2, atol=1e-5 if dtype == jnp.float32 else 1e-2,
    )  # fmt: skip


@pytest.mark.parametrize("implementation", ["tiled", "ragged", "reference"])
@pytest.mark.parametrize("form", quant.FORMS)
def test_experts_are_read_one_by_one_from_their_codes(form, implementation):
    L, E, D, F, T, K = 2, 3, 16, 8, 5, 2
    stacks = [packed(kernels(L, E, *shape, seed=s), form) for s, shape in enumerate([(D, F), (D, F), (F, D)])]
    x, gates = kernels(T, D, seed=4), np.abs(kernels(T, K, seed=5))
    idx = np.array([[0, 1], [2, 0], [1, 2], [0, 3], [1, 0]], np.int32)

    def out(x, dense):
        of = [quant.dense(W) for W in stacks] if dense else stacks
        return moe_ffn(
            x, *(tiles.InStack(None, W, jnp.int32(1)) for W in of), None, idx, gates, implementation=implementation
        )[0]

    (y, back), (wanted, dense_back) = (jax.vjp(lambda x, d=d: out(x, d), x) for d in (False, True))
    for a, b in ((y, wanted), (back(jnp.ones_like(y))[0], dense_back(jnp.ones_like(y))[0])):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_int8_holds_what_a_file_of_four_bits_says():
    rng = np.random.default_rng(0)
    d, m = (rng.uniform(0.01, 0.02, (4, 1, 8)).astype(np.float16).astype(np.float32) for _ in range(2))
    codes = rng.integers(0, 16, (4, 32, 8))
    codes[:, 0], codes[:, 1] = 0, 15  # Q4_1 puts its ends at a block's least and greatest weight
    W = (d * codes - 8 * m).astype(np.float32).reshape(128, 8)  # d q + m by 32
    error = np.abs(np.asarray(quant.dense(packed(W, "int8"))) - W)
    assert error.max() < 0.2 * (W.reshape(4, 32, 8).max(axis=1) - W.reshape(4, 32, 8).min(axis=1)).max() / 255
