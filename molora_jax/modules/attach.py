"""`attach`: adapters at the Dense layers of somebody's Linen model, whose `params` stay as they are.

The model is called as before, under `nn.intercept_methods`: where a Dense layer has made its product, the experts of
the rules that name its path add their change of it (the placement `projection`, under any engine). Their leaves lie at
`adapters/<path of the Dense>/<rule>/...`.
"""

import dataclasses
import functools
import inspect
import threading
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import numpy as np

from molora_jax.config.fields import wrong
from molora_jax.core.types import Array
from molora_jax.modules import rules as rules_lib
from molora_jax.modules.members import engine_of
from molora_jax.modules.walk import Walk

OWN = ("adapters", "frozen", "router_state")
SWITCHES = {  # names by which a model's call or field says whether it trains, and whether True means that it does
    "train": True, "training": True, "is_training": True, "is_train": True,
    "deterministic": False, "inference": False, "is_inference": False, "eval": False, "is_eval": False,
}  # fmt: skip


def attach(
    module: nn.Module, rules, *, valid: Callable | None = None, train: Callable | None = None, engine="replicate",
    mesh=None,
) -> nn.Module:  # fmt: skip
    """A module that is called as `module` is, with experts at the Dense layers that the rules name.

    Its `params` are the model's own, so a checkpoint of the model fits; `adapters` (and `router_state`, `frozen`) are
    beside them. nn.Dense and nn.DenseGeneral are covered, under nn.remat and (with entries in its `variable_axes`)
    nn.scan too; kernels that a module multiplies by itself are not.

    Args:
      rules: a list of `dict(sites="*/mlp/*", experts=4, adapter=mj.Lora(), router=mj.SoftmaxTopK())`, or a dict of
        them by name. `sites` are patterns of paths by commas (`mj.sites(module, x)` lists the paths).
      valid: `(the call's arguments) -> bool array`, True at tokens, False at padding; of the leading axes of the
        layers' inputs. None: all are tokens.
      train: `(the call's arguments) -> bool`, whether dropout is on. None: what an argument of the call says that is
        named as in `SWITCHES` (`train`, `is_training`, `deterministic`, ...), else a field of the module of such a name
        (as `nn.merge_param` has it), else whether there is an rng named dropout.
      engine, mesh: as of `mj.RoutedLoRA`.

    Raises:
      InputError: rules that are wrong; when variables are made, a pattern that matches no Dense layer.

    >>> import flax.linen as nn, jax, molora_jax as mj
    >>> model = nn.Sequential([nn.Dense(32), nn.relu, nn.Dense(4)])
    >>> routed = mj.attach(model, [dict(sites="layers_0", experts=4, adapter=mj.Lora(), router=mj.SoftmaxTopK(k=2))])
    >>> x = jax.random.normal(jax.random.key(0), (3, 8))
    >>> variables = routed.init(jax.random.key(1), x)
    >>> sorted(variables["params"]), sorted(variables["adapters"]["layers_0"]["rule0"])
    (['layers_0', 'layers_2'], ['A', 'B', 'router'])
    >>> bool((routed.apply(variables, x) == model.apply({"params": variables["params"]}, x)).all())
    True
    """
    if not isinstance(module, nn.Module):
        got, fix = f"a {type(module).__name__}", "mj.nnx has the bridge from Flax NNX."
        if isinstance(module, type):
            got, fix = f"the class {module.__name__}", f"Make one of it: {module.__name__}(...)."
        raise wrong("module", got, "a flax.linen Module", fix)
    for name, value, such in (("valid", valid, "lambda x, mask: mask"), ("train", train, "lambda x, train: train")):
        if value is not None and not callable(value):
            fix = f"It is asked at every call: {name}={such}, for a model that is called so."
            raise wrong(name, f"a {type(value).__name__}", "a function of the model's arguments", fix)
    if module.scope is not None:
        fix = f"Inside a module's __call__, write {type(module).__name__}(..., parent=None)."
        raise wrong("module", f"the bound module {'/'.join(module.path)}", "a module that is not bound yet", fix)
    return _attached(module, rules_lib.read(rules, engine_of(engine, mesh), None), valid, train)


def init_adapters(module: nn.Module, key: Array, params: dict, *args, **kwargs) -> dict:
    """Fresh `adapters` (and `router_state`, `frozen`) for `params` that are there: a checkpoint's.

    Starts that read the base (`init="pissa"`, `mj.Dora`) read these. The arguments are those of a call.

    Returns:
      `{"params": params, "adapters": ..., ...}`, to be passed to `module.apply`.

    >>> import flax.linen as nn, jax, molora_jax as mj
    >>> model, x = nn.Dense(4), jax.numpy.ones((3, 8))
    >>> params = model.init(jax.random.key(0), x)["params"]
    >>> routed = mj.attach(model, [dict(sites="*", adapter=mj.Lora(init="pissa", rank=2))])
    >>> sorted(mj.init_adapters(routed, jax.random.key(1), params, x))
    ['adapters', 'frozen', 'params']
    """
    make = lambda key, params: module.apply(  # noqa: E731
        {"params": params}, *args, rngs={"params": key}, mutable=list(OWN), **kwargs
    )[1]
    return {"params": params, **jax.jit(make)(key, params)}


class Sites(NamedTuple):
    """`covered`: path of a Dense layer -> `(D_in, D_out)`. `not_covered`: path of a kernel that is multiplied
    otherwise -> what it belongs to."""

    covered: dict[str, tuple[int, int]]
    not_covered: dict[str, str]


def sites(module: nn.Module, *args, **kwargs) -> Sites:
    """The Dense layers that `attach` may name, by path; the arguments are those of a call. Computes nothing.

    >>> import flax.linen as nn, jax, molora_jax as mj
    >>> mj.sites(nn.Sequential([nn.Dense(32), nn.relu, nn.Dense(4)]), jax.numpy.ones((3, 8))).covered
    {'layers_0': (8, 32), 'layers_2': (32, 4)}
    """
    walk, keys = Walk((), 0, None, False), dict(params=jax.random.key(0), dropout=jax.random.key(0))
    with nn.intercept_methods(walk):
        variables = jax.eval_shape(functools.partial(module.init, **kwargs), keys, *args)
    return Sites(walk.covered, walk.not_covered(variables.get("params", {})))


def _asked(name: str, function: Callable, args, kwargs):
    """What `valid` or `train` says of a call."""
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except TypeError as error:
        got, fix = f"a function that does not take them ({error})", "Let it take all: lambda x, *_, **__: ..."
        raise wrong(name, got, "a function of all the call's arguments", fix) from None
    return function(*args, **kwargs)


def _static(name: str, value, rules) -> bool:
    """A switch as a value that is known when the call is traced; where nothing is random it does not matter."""
    if not isinstance(value, jax.core.Tracer):
        return bool(value)
    random = [field for rule in rules for field in rule.made.random]
    if random:
        fix = f"Name {name} in jit's static_argnames, or say it otherwise: mj.attach(..., train=lambda ...: True)."
        expected = f"True or False itself, for {', '.join(dict.fromkeys(random))}"
        raise wrong(name, "a value that jit traces", expected, fix)
    return False


def _attached(module: nn.Module, rules, valid, train) -> nn.Module:
    """The module again, of a subclass whose methods run under the interception: same paths, random keys and fields."""
    kind = type(module)
    walks = threading.local()  # the methods of one model call each other

    def forward(name, original):
        @functools.wraps(original)
        def method(self, *args, **kwargs):
            if getattr(walks, "on", False):
                return original(self, *args, **kwargs)
            mask = None if valid is None else _asked("valid", valid, args, kwargs)
            walk = Walk(rules, len(self.path), mask, trains(self, original, args, kwargs))
            walks.on = True
            try:
                with nn.intercept_methods(walk):
                    out = original(self, *args, **kwargs)
            finally:
                walks.on = False
            if self.is_mutable_collection("adapters"):  # variables are made: every layer is there
                walk.check(self.variables.get("params", {}))
            return out

        return method

    def trains(self, original, args, kwargs) -> bool:
        if train is not None:
            return _static("train", _asked("train", train, args, kwargs), rules)
        call = inspect.signature(original).bind(self, *args, **kwargs)
        call.apply_defaults()
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name in SWITCHES}
        said = {**call.arguments, **kwargs}
        for name, value in [*((name, said.get(name)) for name in SWITCHES), *fields.items()]:
            if isinstance(value, bool) or getattr(value, "dtype", None) == np.bool_ and np.shape(value) == ():
                return _static(name, value, rules) is SWITCHES[name]
        return self.has_rng("dropout")

    methods = {}
    for name in dir(kind):
        value = getattr(kind, name)
        wrapped = getattr(value, "method_handler_wrapped", False) and not hasattr(nn.Module, name)
        if name == "__call__" or (wrapped and not name.startswith("_") and name != "setup"):
            methods[name] = forward(name, value)
    own = type(kind.__name__, (kind,), methods | {"__module__": kind.__module__, "__doc__": kind.__doc__})
    fields = {field.name: getattr(module, field.name) for field in dataclasses.fields(module) if field.init}
    fields.pop("parent")
    return own(**fields)
