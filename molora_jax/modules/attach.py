"""`attach`: adapters at the Dense layers of somebody's Linen model, whose `params` stay as they are.

The model is called as before, under `nn.intercept_methods`: where a Dense layer has made its product, the experts of
the rules that name its path add their change of it (the placement `projection`, under any engine). Their leaves lie at
`adapters/<path of the Dense>/<rule>/...`.
"""

import dataclasses
import difflib
import functools
import inspect
import math
import threading
import warnings
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta
from flax.traverse_util import flatten_dict

from molora_jax import engines
from molora_jax.config.fields import wrong
from molora_jax.core.types import Array
from molora_jax.modules import rules as rules_lib
from molora_jax.modules.lora import SITE, Given, RoutedLoRA
from molora_jax.modules.members import engine_of

OWN = ("adapters", "frozen", "router_state")


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
      train: `(the call's arguments) -> bool`, whether dropout is on. None: where there is an rng named dropout, unless
        an argument `train=False` or `deterministic=True` says otherwise.
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
        raise wrong("module", type(module).__name__, "a flax.linen Module", "mj.nnx has the bridge from Flax NNX.")
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


def _attached(module: nn.Module, rules, valid, train) -> nn.Module:
    """The module again, of a subclass whose methods run under the interception: same paths, random keys and fields."""
    kind = type(module)
    walks = threading.local()  # the methods of one model call each other

    def forward(name, original):
        @functools.wraps(original)
        def method(self, *args, **kwargs):
            if getattr(walks, "on", False):
                return original(self, *args, **kwargs)
            mask = None if valid is None else valid(*args, **kwargs)
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
            return bool(train(*args, **kwargs))
        call = inspect.signature(original).bind(self, *args, **kwargs)
        call.apply_defaults()
        said = {**call.arguments, **call.arguments.get("kwargs", {})}
        for name, means in (("train", True), ("training", True), ("deterministic", False)):
            if isinstance(said.get(name), bool):
                return said[name] is means
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


class Walk:
    """The interceptor of one call: what Dense layers there are, and the rules' change at those that they name."""

    def __init__(self, rules, depth: int, valid, train: bool):
        self.rules, self.depth, self.valid, self.train = rules, depth, valid, train
        self.covered: dict[str, tuple[int, int]] = {}
        self.modules: dict[str, str] = {}
        self.calls = 0

    def __call__(self, method, args, kwargs, context):
        module, name = context.module, context.method_name
        if name == "setup" or name.startswith("_") and name != "__call__":
            return method(*args, **kwargs)
        path = "/".join(module.path[self.depth :])
        self.modules.setdefault(path, type(module).__name__)
        if name != "__call__" or not isinstance(module, (nn.Dense, nn.DenseGeneral)):
            return method(*args, **kwargs)
        calls = self.calls
        y = method(*args, **kwargs)
        if self.calls > calls:  # a lifted Dense: the one inside has been here
            return y
        self.calls += 1
        x = args[0] if args else kwargs["inputs"]
        return self.changed(module, path, x, y)

    def changed(self, module, path, x, y):
        """`y`, the layer's own output, with the experts' change of it."""
        acting = [rule for rule in self.rules if rule.matches(path)]
        kernel = meta.unbox(module.get_variable("params", "kernel"))
        axes = module.axis if isinstance(module, nn.DenseGeneral) else -1
        axes = tuple(a % x.ndim for a in ((axes,) if isinstance(axes, int) else axes))
        d_in = math.prod(x.shape[a] for a in axes)
        d_out = kernel.size // d_in if kernel is not None else 0
        if isinstance(module, nn.DenseGeneral) and module.batch_dims:
            self.covered.pop(path, None)
            self.modules[path] = "nn.DenseGeneral with batch_dims"
            if acting:
                fix = "Leave it out of the rule's sites."
                raise wrong(f"rules.{acting[0].name}.sites", f"{path}, with batch_dims", "a layer with one kernel", fix)
            return y
        self.covered[path] = (d_in, d_out)
        if not acting:
            return y
        if "/jit(" in module.scope.path_text:
            got, fix = f"{path}, inside nn.jit ({module.scope.path_text})", "Drop nn.jit there; jit the whole call."
            raise wrong(f"rules.{acting[0].name}.sites", got, "a layer outside: nn.jit keeps what it once traced", fix)
        rest = [a for a in range(x.ndim) if a not in axes]
        lead = [x.shape[a] for a in rest]
        flat = jnp.transpose(x, (*rest, *axes)).reshape(*lead, d_in).astype(y.dtype)
        W = kernel.reshape(d_in, d_out)
        bias = meta.unbox(module.get_variable("params", "bias")) if module.use_bias else None
        parts, puts = [], []
        for rule in acting:
            layer = RoutedLoRA(
                d_out, rule.made.experts, rule.made.adapter, rule.made.router, rule.made.engine, name=rule.name,
                parent=module,
            )  # fmt: skip
            part, put = layer.part(flat, kernel=W, valid=self.valid, train=self.train)
            parts.append(part)
            puts.append(put)
        arrays = {"x": flat.reshape(-1, d_in), "y": y.reshape(-1, d_out)}
        arrays |= {} if bias is None else {"bias": bias.reshape(-1)}
        out, counts = engines.meet(layer.engine_now(), Given(SITE), arrays, parts)
        for put, count in zip(puts, counts, strict=True):
            put(count)
        return out.reshape(y.shape)

    def not_covered(self, params) -> dict[str, str]:
        """Kernels (two axes and more) that no Dense layer multiplies: path -> what has them."""
        found = {}
        for path, leaf in flatten_dict(meta.unbox(params), sep="/").items():
            parent = path.rpartition("/")[0]
            if jnp.ndim(leaf) > 1 and parent not in self.covered:
                found[path] = self.modules.get(parent, "a raw parameter")
        return found

    def check(self, params) -> None:
        """Raises InputError for a pattern that matches no Dense layer; warns of kernels that it meant in vain."""
        others = self.not_covered(params)
        for rule in self.rules:
            for pattern in rule.patterns:
                one = dataclasses.replace(rule, patterns=(pattern,))
                meant = {p: kind for p, kind in others.items() if one.matches(p) or one.matches(p.rpartition("/")[0])}
                if not any(map(one.matches, self.covered)):
                    self._unmatched(rule.name, pattern, meant)
                meant = {p: kind for p, kind in meant.items() if kind not in NOT_LINEAR}
                if meant:
                    text = f"rules.{rule.name}.sites {pattern!r} does not cover {_listed(meant)}: no Dense layers"
                    warnings.warn(text, stacklevel=2)

    def _unmatched(self, rule, pattern, meant):
        got = f"{pattern!r}, which matches no Dense layer" + (f", but {_listed(meant)}" if meant else "")
        bare = pattern.strip("*/")
        last = {path: path for path in self.covered} | {path.rpartition("/")[2]: path for path in self.covered}
        near = [path for path in self.covered if bare and bare in path]
        near += [last[name] for name in difflib.get_close_matches(bare, last, n=3, cutoff=0.3)]
        near = list(dict.fromkeys(near or self.covered))[:3]
        fix = f"Nearest: {', '.join(near)}." if near else "The model has no Dense layer."
        if meant:
            fix += " nn.Dense and nn.DenseGeneral are covered; other kernels need mj.RoutedLoRA inside their module."
        raise wrong(f"rules.{rule}.sites", got, "paths of Dense layers (mj.sites(model, x) lists them)", fix)


NOT_LINEAR = ("Embed", "Conv", "ConvTranspose", "LayerNorm")  # a pattern as wide as * means none of them


def _listed(kinds: dict[str, str]) -> str:
    more = ", ..." if len(kinds) > 5 else ""
    return ", ".join(f"{path} (of {kind})" for path, kind in list(kinds.items())[:5]) + more
