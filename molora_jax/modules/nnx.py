"""The same layers in Flax NNX: thin modules that hold a Linen module's variables and call it.

Adapter (an nnx.Param)   factors and routers        Frozen        what an adapter never trains
RouterState              without a gradient         Routing       what was decided in the last call
"""

from typing import Any

import flax.linen as nn
import jax
from flax import nnx
from flax.core import unfreeze

from molora_jax.adapters import Lora
from molora_jax.config.fields import wrong
from molora_jax.modules import lora
from molora_jax.modules import sown as sown_lib
from molora_jax.modules.attach import init_adapters


class Base(nnx.Variable):
    """The parameters of a Linen model."""


class Adapter(nnx.Param):
    """What trains: `nnx.value_and_grad(loss, argnums=nnx.DiffState(0, mj.nnx.Adapter))`."""


class Frozen(nnx.Variable):
    """What an adapter never trains."""


class RouterState(nnx.Variable):
    """Changed by `update_routers`, once a step."""


class Routing(nnx.Intermediate):
    """What the routers decided in the last call."""


LORA = Lora()
KINDS = {"params": Base, "adapters": Adapter, "frozen": Frozen, "router_state": RouterState}


class Bridged(nnx.Module):
    """Variables of a Linen module, and calls of it. `model.train()` turns dropout on, `model.eval()` off."""

    def _hold(self, linen: nn.Module, variables: dict, rngs: nnx.Rngs):
        self.linen, self.rngs, self.deterministic = linen, rngs.fork(), True
        for name, kind in KINDS.items():
            setattr(self, name, nnx.data(jax.tree.map(kind, unfreeze(variables.get(name, {})))))
        self.routing = Routing({})

    def _call(self, *args, **kwargs):
        held = {name: getattr(self, name) for name in KINDS}
        values = jax.tree.map(lambda v: v[...], held, is_leaf=lambda v: isinstance(v, nnx.Variable))
        rngs = {} if self.deterministic else {"dropout": self.rngs.dropout()}
        y, sown = self.linen.apply(values, *args, rngs=rngs, mutable=["routing"], **kwargs)
        self.routing = Routing(unfreeze(sown).get("routing", {}))
        return y


class FromLinen(Bridged):
    """A Linen module of ours (`mj.attach(...)`) as an NNX module with the same call.

    >>> import flax.linen as nn, jax, molora_jax as mj
    >>> from flax import nnx
    >>> linen = mj.attach(nn.Dense(4), [dict(sites="*", experts=4, adapter=mj.Lora(), router=mj.SoftmaxTopK(k=2))])
    >>> x = jax.numpy.ones((3, 8))
    >>> model = mj.nnx.FromLinen(linen, x, rngs=nnx.Rngs(0))
    >>> model(x).shape, float(mj.balance(mj.nnx.sown(model))) > 0
    ((3, 4), True)
    """

    def __init__(self, linen: nn.Module, *args, rngs: nnx.Rngs, params: dict | None = None, **kwargs):
        """Args:
        args, kwargs: of a call, for shapes. params: the model's own, in place of fresh ones.
        """
        if not isinstance(linen, nn.Module):
            got, fix = f"a {type(linen).__name__}", "An NNX module holds its layers itself: mj.nnx.RoutedLoRA at each."
            raise wrong("linen", got, "a flax.linen Module such as mj.attach(model, rules)", fix)
        key = rngs.params()
        if params is None:
            variables = jax.jit(lambda key: linen.init(key, *args, **kwargs))(key)
        else:
            variables = init_adapters(linen, key, params, *args, **kwargs)
        self._hold(linen, variables, rngs)

    def __call__(self, *args, **kwargs) -> Any:
        return self._call(*args, **kwargs)


class RoutedLoRA(Bridged):
    """An `nnx.Linear` with a mixture of LoRA experts; its kernel and bias stay its own.

    >>> import jax, molora_jax as mj
    >>> from flax import nnx
    >>> layer = mj.nnx.RoutedLoRA(
    ...     nnx.Linear(8, 16, rngs=nnx.Rngs(0)), experts=4, adapter=mj.Lora(rank=2), router=mj.SoftmaxTopK(k=2),
    ...     rngs=nnx.Rngs(1))
    >>> layer(jax.numpy.ones((2, 5, 8))).shape
    (2, 5, 16)
    """

    def __init__(
        self, linear: nnx.Linear, *, experts=1, adapter=LORA, router=None, engine="replicate", mesh=None, rngs: nnx.Rngs
    ):  # fmt: skip
        if not isinstance(linear, nnx.Linear):
            got = f"the class {linear.__name__}" if isinstance(linear, type) else f"a {type(linear).__name__}"
            fix = "Layers of other kernels stay as they are; experts stand at linear layers [D_in, D_out]."
            raise wrong("linear", got, "an nnx.Linear", fix)
        linen = lora.RoutedLoRA(linear.out_features, experts, adapter, router, engine, mesh)
        self.linear = linear
        x = jax.numpy.zeros((1, 1, linear.in_features))
        self._hold(linen, linen.init(rngs.params(), x, **self._kernel()), rngs)

    def _kernel(self) -> dict:
        bias = self.linear.bias
        return {"kernel": self.linear.kernel[...], "bias": None if bias is None else bias[...]}

    def __call__(self, x: jax.Array, *, valid=None) -> jax.Array:
        """`x [..., D_in]` -> `[..., D_out]`; `valid` as of the Linen module."""
        return self._call(x, valid=valid, train=not self.deterministic, **self._kernel())


def _bridged(model: nnx.Module):
    for path, module in nnx.iter_modules(model):
        if isinstance(module, Bridged):
            yield path, module


def sown(model: nnx.Module) -> dict:
    """What the routers of a model decided in its last call, for `mj.balance` and the like."""
    tree: dict = {}
    for path, module in _bridged(model):
        here = tree
        for name in path:
            here = here.setdefault(str(name), {})
        here |= module.routing.get_value()
    return {"routing": tree}


def update_routers(model: nnx.Module) -> None:
    """Every router's own update on the last call, once a step, in place (`mj.update_routers`)."""
    for _, module in _bridged(model):
        values = jax.tree.map(lambda v: v[...], module.router_state, is_leaf=lambda v: isinstance(v, nnx.Variable))
        if not values:
            continue
        new = sown_lib.update_routers(values, {"routing": module.routing.get_value()})
        for old, value in zip(
            jax.tree.leaves(module.router_state, is_leaf=lambda v: isinstance(v, nnx.Variable)), jax.tree.leaves(new),
            strict=True,
        ):  # fmt: skip
            old[...] = value
