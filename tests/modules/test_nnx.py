"""The NNX bridge: values equal to Linen, gradients of the adapters alone, router updates in place."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import molora_jax as mj
from molora_jax.errors import InputError
from tests.modules.foreign import AXES, Stacked
from tests.modules.oracle import D, E, F, K, R, call, normal

X = normal(0, 2, 5, D)
MADE = dict(experts=E, adapter=mj.Lora(rank=R, dropout=0.5), router=mj.SigmoidTopK(k=K, bias_rate=0.5))


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first = mj.nnx.RoutedLoRA(nnx.Linear(D, F, rngs=rngs), **MADE, rngs=rngs)
        self.last = nnx.Linear(F, 1, rngs=rngs)

    def __call__(self, x):
        return self.last(jax.nn.relu(self.first(x)))


def test_a_layer_equals_linen_and_trains():
    net = Net(nnx.Rngs(0))
    linen = mj.RoutedLoRA(F, **MADE)
    for leaf in jax.tree.leaves(net.first.adapters, is_leaf=lambda v: isinstance(v, nnx.Variable)):
        leaf[...] = leaf[...] + 0.1 * normal(3, *leaf[...].shape)
    values = lambda tree: jax.tree.map(  # noqa: E731
        lambda v: v[...], tree, is_leaf=lambda v: isinstance(v, nnx.Variable)
    )
    variables = {"adapters": values(net.first.adapters), "router_state": values(net.first.router_state)}
    linear = net.first.linear
    expected, sown = call(linen, variables, X, kernel=linear.kernel[...], bias=linear.bias[...], mutable=["routing"])
    first = nnx.jit(lambda net, x: net.first(x))
    np.testing.assert_allclose(first(net, X), expected, atol=1e-6)
    own = nnx.jit(lambda net: mj.balance(mj.nnx.sown(net)))(net)
    np.testing.assert_allclose(own, jax.jit(mj.balance)(sown), rtol=1e-6)

    optimizer = nnx.Optimizer(net, optax.sgd(0.01), wrt=mj.nnx.Adapter)

    @nnx.jit
    def step(net, optimizer, x):
        def loss(net):
            return jnp.mean((net(x) - 1) ** 2) + 0.01 * mj.balance(mj.nnx.sown(net))

        value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, mj.nnx.Adapter))(net)
        optimizer.update(net, grads)
        mj.nnx.update_routers(net)
        return value

    kernel, A = np.asarray(linear.kernel[...]), np.asarray(net.first.adapters["A"][...])
    losses = [float(step(net, optimizer, X)) for _ in range(4)]
    assert losses[-1] < losses[0]
    assert np.array_equal(kernel, linear.kernel[...]) and not np.array_equal(A, net.first.adapters["A"][...])
    bias = np.asarray(net.first.router_state["b"][...])
    assert np.abs(bias).max() > 0
    assert np.array_equal(first(net, X), first(net, X))
    net.train()
    assert not np.array_equal(first(net, X), first(net, X)), "dropout"


def test_a_linen_model_with_its_checkpoint():
    model = Stacked(axes=AXES)
    params = jax.jit(model.init)(jax.random.key(5), X)["params"]
    linen = mj.attach(model, [dict(sites="*/up", **MADE)])
    bridged = mj.nnx.FromLinen(linen, X, rngs=nnx.Rngs(0), params=params)
    np.testing.assert_allclose(bridged(X), model.apply({"params": params}, X), atol=1e-5)
    before = bridged.router_state["layers"]["up"]["rule0"]["b"][...]
    mj.nnx.update_routers(bridged)
    assert before.shape == (2, E) and not np.array_equal(
        before, bridged.router_state["layers"]["up"]["rule0"]["b"][...]
    )


def test_what_is_no_linear_layer_is_named():
    rngs = nnx.Rngs(0)
    for wrong, words in (
        (nnx.Conv(D, F, (3,), rngs=rngs), "linear: got a Conv; expected an nnx.Linear"),
        (nnx.Linear, "linear: got the class Linear"),
    ):
        with pytest.raises(InputError, match=words):
            mj.nnx.RoutedLoRA(wrong, **MADE, rngs=rngs)
    with pytest.raises(InputError, match="linen: got a Linear; .*mj.nnx.RoutedLoRA at each"):
        mj.nnx.FromLinen(nnx.Linear(D, F, rngs=rngs), X, rngs=rngs)
