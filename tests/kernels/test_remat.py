"""Under `jax.checkpoint` a loop over tiles is run again only where the policy says so."""

import re

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas import grouped_lora, routed_ffn
from molora_jax.backbones.stack import REMAT

T, D, E, K, R = 12, 16, 4, 2, 3


def product(x, A, B, idx, gates):
    return grouped_lora(x, A, B, idx, gates, implementation="tiled")


def feed_forward(x, A, B, idx, gates):
    z = jnp.ones((T, K, R))
    mix, z_d = routed_ffn(x, x, z, z, B, B, A, idx, gates, 1 - gates.sum(1), implementation="tiled")
    return mix + z_d.sum((1, 2))[:, None]


@pytest.mark.parametrize("op", [product, feed_forward])
@pytest.mark.parametrize("remat, again", [("none", False), ("dots", False), ("full", True)])
def test_the_policy_decides_whether_a_loop_runs_again(op, remat, again):
    x, idx, gates = jnp.ones((T, D)), jnp.broadcast_to(jnp.arange(K), (T, K)), jnp.full((T, K), 0.5)
    A, B = jnp.ones((2, 3, E, R, D))

    def loss(x, A, B):
        layer = jax.checkpoint(lambda x, A, B: jnp.sin(op(x, A, B, idx, gates)), policy=REMAT[remat], prevent_cse=False)
        return jax.lax.scan(lambda x, one: (layer(x, *one), None), x, (A, B))[0].sum()

    text = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, A, B).compile().as_text()
    assert bool(re.search(r'rematted_computation/[^"]*while/body/', text)) == again
