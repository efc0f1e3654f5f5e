"""Quantised kernels in an engine's region: every shard has its codes and scales, whatever axis they are split over."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from molora_jax import engines, sharding
from molora_jax.core import quant
from molora_jax.core.types import Routing
from molora_jax.engines import Engine
from molora_jax.placements import base_experts


def packed(form, *shape, seed=0):
    W = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    out = quant.empty(shape, form, np.float32)
    quant.quantise(W, out)
    return out


def mesh(**sizes):
    return sharding.local_mesh(sizes)


@pytest.mark.parametrize(("site", "rows"), [("q", 192), ("down", 192), ("down", 512)])
@pytest.mark.parametrize("form", quant.FORMS)
def test_a_projection_on_eight_devices(form, site, rows):
    """192 rows in four shards of 48: blocks of 32 and 64 end elsewhere, so they are cut finer."""
    W, x = packed(form, rows, 32), np.random.default_rng(1).standard_normal((16, rows)).astype(np.float32)
    on = Engine("replicate", mesh(fsdp=2, tensor=4))
    dy, kernel = np.cos(np.arange(16.0 * 32, dtype=np.float32)).reshape(16, 32), np.asarray(quant.dense(W))

    @jax.jit
    def both(x, W):
        y, back = jax.vjp(lambda x: engines.project(on, site, W, None, x, [])[0], x)
        return y, back(dy)[0]

    y, dx = both(x, W)
    np.testing.assert_allclose(y, x @ kernel, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(dx, dy @ kernel.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("engine", ["replicate", "all_to_all"])
@pytest.mark.parametrize("form", quant.FORMS)
def test_experts_on_eight_devices(form, engine):
    E, D, F, T = 4, 64, 192, 16
    dims = dict(gate=(D, F), up=(D, F), down=(F, D))
    kernels = {site: packed(form, E, *own, seed=i) for i, (site, own) in enumerate(dims.items())}
    rng = np.random.default_rng(3)
    x, z = rng.standard_normal((T, D)).astype(np.float32), jnp.asarray(rng.standard_normal((1, T, E)), jnp.float32)
    selected = z >= jnp.sort(z, axis=-1)[..., -2:-1]
    gates = jnp.where(selected, jax.nn.softmax(z), 0.0)
    routing = Routing(gates, selected, z, jax.nn.softmax(z), jnp.ones((1, T), bool), k_max=2)

    def out(x, kernels, on):
        part = base_experts.part(kernels, routing, "silu", E)
        return engines.meet(on, base_experts.Experts(), {"x": x}, [part])[0]

    dense = {site: quant.dense(W) for site, W in kernels.items()}
    wanted = jax.jit(lambda x: out(x, dense, Engine()))(x)
    on = Engine(engine, mesh(expert=4, tensor=2))
    np.testing.assert_allclose(jax.jit(lambda x, W: out(x, W, on))(x, kernels), wanted, rtol=1e-3, atol=1e-3)
