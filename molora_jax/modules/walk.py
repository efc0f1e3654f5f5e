"""The interceptor behind `attach`: at every Dense layer of a call, the rules' change of what the layer made."""

import collections
import dataclasses
import difflib
import math
import warnings

import flax.linen as nn
import jax.numpy as jnp
from flax.core import meta
from flax.errors import NameInUseError
from flax.traverse_util import flatten_dict

from molora_jax import engines
from molora_jax.config.fields import wrong
from molora_jax.modules.lora import SITE, Given, RoutedLoRA
from molora_jax.modules.routed import check_sharding


class Walk:
    """The interceptor of one call: what Dense layers there are, and the rules' change at those that they name."""

    def __init__(self, rules, depth: int, valid, train: bool):
        self.rules, self.depth, self.valid, self.train = rules, depth, valid, train
        self.covered: dict[str, tuple[int, int]] = {}
        self.modules: dict[str, str] = {}
        self.calls: collections.Counter = collections.Counter()

    def __call__(self, method, args, kwargs, context):
        module, name = context.module, context.method_name
        if name == "setup" or name.startswith("_") and name != "__call__":
            return method(*args, **kwargs)
        path = "/".join(module.path[self.depth :])
        self.modules.setdefault(path, type(module).__name__)
        if name != "__call__" or not isinstance(module, (nn.Dense, nn.DenseGeneral)):
            return method(*args, **kwargs)
        calls = self.calls[path]
        y = method(*args, **kwargs)
        if self.calls[path] > calls:  # a lifted Dense: the one inside has been here
            return y
        self.calls[path] += 1
        x = args[0] if args else kwargs["inputs"]
        return self.changed(module, path, x, y)

    def changed(self, module, path, x, y):
        """`y`, the layer's own output, with the experts' change of it."""
        acting = [rule for rule in self.rules if rule.matches(path)]
        kernel = meta.unbox(module.get_variable("params", "kernel"))
        axes = module.axis if isinstance(module, nn.DenseGeneral) else -1
        axes = tuple(a % x.ndim for a in ((axes,) if isinstance(axes, int) else axes))
        why = "without params/kernel" if kernel is None else "with batch_dims" if _many(module) else ""
        if why:
            self.modules[path] = f"{type(module).__name__} {why}"
            if acting:
                got, fix = f"{path}, {type(module).__name__} {why}", "Leave it out of the rule's sites."
                raise wrong(f"rules.{acting[0].name}.sites", got, "a layer with one kernel", fix)
            return y
        d_in = math.prod(x.shape[a] for a in axes)
        d_out = kernel.size // d_in
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
        check_sharding(f"{path}, the layer's input", x)
        for rule in acting:
            layer = _layer(rule, d_out, module, path)
            part, put = layer.part(flat, kernel=W, valid=self.valid, train=self.train)
            parts.append(part)
            puts.append(put)
        arrays = {"x": flat.reshape(-1, d_in), "y": y.reshape(-1, d_out)}
        arrays |= {} if bias is None else {"bias": bias.reshape(-1)}
        arrays |= {"W": W} if any(part.factors.inp is not None for part in parts) else {}
        if not y.size:  # no token, nothing to be changed
            for put in puts:
                put(None)
            return y
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
                single = dataclasses.replace(rule, patterns=(pattern,))
                meant = {
                    p: kind for p, kind in others.items() if single.matches(p) or single.matches(p.rpartition("/")[0])
                }
                if not any(map(single.matches, self.covered)):
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


def _layer(rule, features: int, module, path: str) -> RoutedLoRA:
    """The experts of a rule, below the Dense layer whose output they change."""
    made = rule.made
    try:
        return RoutedLoRA(features, made.experts, made.adapter, made.router, made.engine, name=rule.name, parent=module)
    except NameInUseError:
        raise wrong(
            f"rules.{rule.name}", f"a name that {path} has already, of an attach inside this one", "another name",
            f"Give the rules as a dict: {{'outer_{rule.name}': dict(sites=...)}}.",
        ) from None  # fmt: skip


NOT_LINEAR = ("Embed", "Conv", "ConvTranspose", "LayerNorm")  # a pattern as wide as * means none of them


def _many(module) -> bool:
    return isinstance(module, nn.DenseGeneral) and bool(module.batch_dims)


def _listed(kinds: dict[str, str]) -> str:
    more = ", ..." if len(kinds) > 5 else ""
    return ", ".join(f"{path} (of {kind})" for path, kind in list(kinds.items())[:5]) + more
