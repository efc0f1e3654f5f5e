"""`moe_ffn` against einsums: values and every gradient, own and shared factors, in a stack of layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import moe_ffn, tiles
from kernels_pallas.moe_ffn import tiled

T, D, F, E, K, R, L = 23, 12, 20, 5, 2, 3, 3


def problem(shared=(), seed=0):
    rng = np.random.default_rng(seed)
    n = lambda *s: jnp.asarray(rng.standard_normal(s).astype(np.float32)) * 0.5  # noqa: E731
    idx = np.stack([rng.permutation(E)[:K] for _ in range(T)]).astype(np.int32)
    idx[3], idx[7, 1] = E, E  # padding, and a token with one expert
    kernels = n(L, E, D, F), n(L, E, D, F), n(L, E, F, D)
    B = [n(1 if name in shared else E, R, F) for name in ("B_g", "B_u", "A_d")]
    mask = jnp.asarray((rng.random((T, F)) > 0.3) / 0.7, jnp.float32)
    return n(T, D), kernels, (n(T, K, R), n(T, K, R), *B), jnp.asarray(idx), jnp.abs(n(T, K)), mask


def close(found, wanted):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("shared", "activation"),
    [((), "silu"), (("B_g", "B_u"), "gelu"), (("B_g", "B_u", "A_d"), "silu"), ((), "clamped")], ids=str,
)  # fmt: skip
def test_values_and_gradients(shared, activation):
    """The clamped one with biases, wide enough that both clamps act."""
    x, kernels, low, idx, gates, mask = problem(shared)
    biases = None
    if activation == "clamped":
        draw = np.random.default_rng(2).standard_normal
        biases = [
            jnp.asarray(draw((L, E, width)).astype(np.float32)) * size for width, size in ((F, 6), (F, 6), (D, 1))
        ]
    rng = np.random.default_rng(1)
    dy, dz = rng.standard_normal((T, D)).astype(np.float32), rng.standard_normal((T, K, R)).astype(np.float32)

    def run(name, in_stack):
        def loss(x, low, gates):
            W = [tiles.InStack(None, w, jnp.int32(1)) if in_stack else w[1] for w in kernels]
            b = biases and [tiles.InStack(None, w, jnp.int32(1)) if in_stack else w[1] for w in biases]
            y, z = moe_ffn(x, *W, low, idx, gates, activation=activation, mask=mask, bias=b, implementation=name)
            return jnp.sum(y * dy) + jnp.sum(z * dz), (y, z)

        with jax.default_matmul_precision("highest"):
            return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(x, low, gates)

    wanted = run("reference", False)
    close(run("tiled", True), wanted)
    close(run("tiled", False), wanted)
    close(run("ragged", True), wanted)


def test_the_frozen_block_alone():
    x, kernels, _, idx, gates, _ = problem()

    def run(name):
        W = [w[2] for w in kernels]
        return jax.jit(
            jax.value_and_grad(lambda x, g: jnp.sum(moe_ffn(x, *W, None, idx, g, implementation=name)[0] ** 2), (0, 1))
        )(x, gates)

    with jax.default_matmul_precision("highest"):
        wanted = run("reference")
        close(run("tiled"), wanted)
        close(run("ragged"), wanted)


def test_no_layer_is_copied_out_of_the_stack():
    """The compiled program holds no array of a layer's kernels, forward or backward."""
    x, kernels, low, idx, gates, _ = problem()

    def loss(x, low, kernels, layer):
        y, z = tiled.moe_ffn(x, *(tiles.InStack(None, w, layer) for w in kernels), low, idx, gates)
        return jnp.sum(y) + jnp.sum(z)

    text = jax.jit(jax.grad(loss, (0, 1))).lower(x, low, kernels, jnp.int32(1)).compile().as_text()
    assert f"f32[{L},{E},{D},{F}]" in text
    for shape in ((E, D, F), (1, E, D, F), (E, F, D), (1, E, F, D)):
        assert f"f32[{','.join(map(str, shape))}]" not in text, shape
