"""Factors read from the stack of all layers: the numbers of a layer's slice, without the slice."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import grouped_expand, grouped_lora, grouped_shrink, routed_ffn, tiles
from tests.kernels.common import decision, normal

L, T, D, E, K, R = 3, 20, 24, 7, 2, 5


def feed_forward(x, A, B, idx, gates, **how):
    z = jnp.ones((T, K, R)) * x[:, :1, None]
    mix, z_d = routed_ffn(x, x + 1, z, 2 * z, B, B, A, idx, gates, ~jnp.any(idx < E, axis=1), **how)
    return mix + z_d.sum((1, 2))[:, None]


def halves(x, A, B, idx, gates):
    return grouped_expand(grouped_shrink(x, A, idx), B, idx, gates, dtype=x.dtype)


def tiled_ffn(*args):
    return feed_forward(*args, implementation="tiled")


def dense_ffn(*args):
    return feed_forward(*args, implementation="dense")


def scanned(op, in_stack):
    """`loss(x, A, B [L, E, R, D], idx, gates)` of L layers."""

    def loss(x, A, B, idx, gates):
        whole = jax.lax.stop_gradient((A, B))

        def layer(x, xs):
            i, *own = xs
            if in_stack:
                own = [tiles.InStack(part, stack, i) for part, stack in zip(own, whole, strict=True)]
            return x + jnp.tanh(op(x, *own, idx, gates)), None

        layer = jax.checkpoint(layer, prevent_cse=False)
        return jnp.sum(jax.lax.scan(layer, x, (jnp.arange(L), A, B))[0] ** 2)

    return loss


def inputs(shared_A=False):
    rng = np.random.default_rng(0)
    idx, gates = decision(rng, T, E, K, "padded")
    A = normal(rng, L, 1 if shared_A else E, R, D)
    return [jnp.asarray(a) for a in (normal(rng, T, D), A, normal(rng, L, E, R, D), idx, gates)]


@pytest.mark.parametrize(
    "op, shared_A",
    [(grouped_lora, False), (halves, False), (tiled_ffn, False), (dense_ffn, False),
     (grouped_lora, True), (tiled_ffn, True), (dense_ffn, True)],
)  # fmt: skip
def test_values_and_gradients_are_those_of_the_slices(op, shared_A):
    args = inputs(shared_A)
    run = lambda in_stack: jax.jit(jax.value_and_grad(scanned(op, in_stack), (0, 1, 2, 4)))(*args)  # noqa: E731
    wanted = run(False)
    chex.assert_trees_all_equal(run(True), wanted)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(wanted))


@pytest.mark.parametrize("op", [grouped_lora, tiled_ffn])
def test_no_layer_is_copied_out_of_the_stack(op):
    """A slice of all of a layer's experts stands in the program with slices, and not here, forward or backward."""
    slices = []
    for in_stack in (False, True):
        text = jax.jit(jax.grad(scanned(op, in_stack), (0, 1, 2))).lower(*inputs()).compile().as_text()
        slices.append(len(re.findall(rf"f32\[(?:1,)?{E},{R},{D}\]\S* dynamic-slice\(", text)))
    assert slices[0] >= 2 and slices[1] == 0, slices
