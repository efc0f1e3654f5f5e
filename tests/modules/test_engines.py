"""Modules on a mesh: value and every gradient equal the einsum of one device, whatever the engine."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import molora_jax as mj
from molora_jax.engines import common
from molora_jax.errors import InputError
from tests.modules.oracle import D, E, F, K, R, init, mixture, normal, random_leaves

MADE = dict(experts=E, adapter=mj.Lora(rank=R, alpha=8.0, dropout=0.0), router=mj.SoftmaxTopK(k=K))


@pytest.fixture(autouse=True)
def nan_buffers(monkeypatch):
    monkeypatch.setattr(common, "FILL", float("nan"))


def mesh(**sizes):
    return Mesh(np.array(jax.devices()[: np.prod(list(sizes.values()))]).reshape(*sizes.values()), tuple(sizes))


def close(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        largest = max(1.0, float(np.abs(np.asarray(y)).max(initial=0.0)))  # what cancels keeps its terms' error
        np.testing.assert_allclose(x, y, atol=1e-6 * largest + 1e-4, rtol=1e-4)


@pytest.mark.parametrize("name, sizes", [
    ("replicate", dict(data=8)), ("gather", dict(expert=4)), ("all_to_all", dict(expert=4, data=2)),
    ("ragged_all_to_all", dict(data=2, expert=2)),
], ids=str)  # fmt: skip
def test_a_layer_equals_the_einsum(name, sizes):
    x, W, bias, weight = normal(0, 4, 4, D), normal(1, D, F), normal(2, F), normal(7, 4, 4, F)
    one = mj.RoutedLoRA(F, **MADE, engine=name, mesh=mesh(**sizes))
    adapters = random_leaves(init(mj.RoutedLoRA(F, **MADE), x, kernel=W)["adapters"])
    loss = lambda f: lambda a, x, W: (lambda y: (jnp.sum(weight * y), y))(f(a, x, W))  # noqa: E731
    ours = loss(lambda a, x, W: one.apply({"adapters": a}, x, kernel=W, bias=bias))
    run = lambda f: jax.jit(jax.value_and_grad(f, (0, 1, 2), has_aux=True))(adapters, x, W)  # noqa: E731
    close(run(ours), run(loss(lambda a, x, W: mixture(x, W, bias, a))))


@pytest.mark.parametrize("name", ["gather", "all_to_all"])
def test_the_ffn_and_an_attached_model_equal_one_device(name):
    import flax.linen as nn

    x = normal(0, 4, 4, D)
    kernels = dict(gate=normal(1, D, F), up=normal(2, D, F), down=normal(3, F, D))
    make = lambda **on: mj.RoutedFFN(**MADE, **on)  # noqa: E731
    adapters = random_leaves(jax.jit(make().init)(jax.random.key(0), x, **kernels)["adapters"])
    run = lambda one: jax.jit(jax.value_and_grad(  # noqa: E731
        lambda a: jnp.sum(one.apply({"adapters": a}, x, **kernels) ** 2)))(adapters)  # fmt: skip
    on = dict(engine=name, mesh=mesh(expert=4))
    close(run(make(**on)), run(make()))

    model = nn.Sequential([nn.Dense(F), nn.relu, nn.Dense(D)])
    attach = lambda **on: mj.attach(model, [dict(sites="*", **MADE)], **on)  # noqa: E731
    variables = random_leaves(jax.jit(attach().init)(jax.random.key(0), x))
    run = lambda one: jax.jit(jax.value_and_grad(  # noqa: E731
        lambda v: jnp.sum(one.apply(v, x) ** 2)))(variables)  # fmt: skip
    close(run(attach(**on)), run(attach()))


@pytest.mark.parametrize("placed", [False, True])
@pytest.mark.parametrize("name", ["replicate", "gather", "all_to_all"])
def test_under_a_mesh_of_the_callers_own(name, placed):
    """`jax.set_mesh` with fewer axes than the layer's: value and gradient are those without it."""
    axes = (AxisType.Auto, AxisType.Auto)
    own = jax.make_mesh((2, 4), ("data", "expert"), axis_types=axes)
    x, W = normal(0, 4, 4, D), normal(1, D, F)
    make = lambda **on: mj.RoutedLoRA(F, **MADE, **on)  # noqa: E731
    adapters = random_leaves(init(make(), x, kernel=W)["adapters"])
    run = lambda one: jax.jit(jax.value_and_grad(  # noqa: E731
        lambda a, x: jnp.sum(one.apply({"adapters": a}, x, kernel=W) ** 2), (0, 1)))  # fmt: skip
    expected = run(make())(adapters, x)
    with jax.set_mesh(own):
        x = jax.device_put(x, NamedSharding(own, PartitionSpec("data", "expert"))) if placed else x
        close(run(make(engine=name, mesh=own))(adapters, x), expected)


def test_explicit_axes_are_refused_by_name():
    """The default of `jax.make_mesh`: of what is split over them jax knows no gradient in here."""
    own = jax.make_mesh((4,), ("expert",), devices=jax.devices()[:4], axis_types=(AxisType.Explicit,))
    x, W = normal(0, 4, 4, D), normal(1, D, F)
    one, there = mj.RoutedLoRA(F, **MADE), mj.RoutedLoRA(F, **MADE, engine="all_to_all", mesh=own)
    variables = jax.jit(one.init)(jax.random.key(0), x, kernel=W)
    whole = jax.jit(one.apply)(variables, x, kernel=W)
    close(jax.jit(there.apply)(variables, x, kernel=W), whole)  # nothing is split over the mesh outside
    split = jax.device_put(x, NamedSharding(own, PartitionSpec("expert")))
    for layer in (one, there):
        with pytest.raises(InputError, match="x: got an array that is split over the explicit axis expert.*Auto"):
            jax.jit(layer.apply)(variables, split, kernel=W)
    leaves = jax.device_put(variables, NamedSharding(own, PartitionSpec("expert")))
    with pytest.raises(InputError, match="variables.'adapters'.: .* split over the explicit axis expert"):
        jax.jit(there.apply)(leaves, x, kernel=W)
    with jax.set_mesh(own), pytest.raises(InputError, match="the mesh of jax.set_mesh: got explicit axes"):
        jax.jit(there.apply)(variables, x, kernel=W)


def test_a_mesh_or_an_adapter_that_does_not_fit_is_refused():
    x, W = normal(0, 4, D), normal(1, D, F)
    with pytest.raises(InputError, match="axes rows.*expected axes among data"):
        mj.RoutedLoRA(F, **MADE, engine="gather", mesh=mesh(rows=4))
    one = mj.RoutedLoRA(F, **MADE | dict(adapter=mj.Dora(rank=R)), engine="all_to_all", mesh=mesh(expert=4))
    with pytest.raises(InputError, match="gather or replicate.*row or column factors"):
        jax.eval_shape(one.init, jax.random.key(0), x, kernel=W)


def test_what_a_capacity_drops_is_counted():
    x, W = normal(0, 64, D), normal(1, D, F)
    whole = mj.RoutedLoRA(F, **MADE, engine="all_to_all", mesh=mesh(expert=4)).made().engine.mesh
    one = mj.RoutedLoRA(F, **MADE, engine=mj.Engine("all_to_all", whole, capacity=0.25))
    variables = jax.jit(one.init)(jax.random.key(0), x, kernel=W)
    metrics = jax.jit(lambda v: mj.routing_metrics(one.apply(v, x, kernel=W, mutable=["routing"])[1]))(variables)
    assert 0.5 < float(metrics[""]["dropped_share"]) < 1
