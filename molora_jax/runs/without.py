"""A run without some of its experts: they are taken out of its leaves, and nothing of them is read any more.

    eval.without = "legal,code"    names of experts: of a rule with `load` its runs' folders, else its tasks, or numbers

Bit by bit a model that never had them, as every leaf is smaller by their rows. Which axis holds the experts is told by
the shapes that the model without them has.
"""

import dataclasses
import pathlib

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from molora_jax.config.fields import did_you_mean
from molora_jax.config.resolve import file_of, split_commas
from molora_jax.errors import InputError

WHERE = "eval.without"


def names_of(rule, config) -> tuple[str, ...]:
    """The names of the experts of a model's rule in the run of this config; public tasks have no expert."""
    E, load = max(rule.experts), config.method.rules[rule.name].load
    if load:
        return tuple(pathlib.Path(path).name for path in load)
    public, own = split_commas(getattr(rule.router, "public", "")), []
    for entry in split_commas(config.data.tasks):
        name = pathlib.Path(file_of(entry)).stem if file_of(entry) else entry
        own += [] if {entry, name} & {*public} else [name]
    return tuple(own) if len(own) == E else tuple(map(str, range(E)))


def leave_out(config, model, params: dict, items: dict, *, own=None):
    """`(config, model, items)` without the experts that `eval.without` names, which the new config does not.

    Args:
      items: `adapters`, `router_state`: nested dicts of numpy arrays.
      own: the config that the run was saved with, whose files and tasks say the names; None: `config`.

    Raises:
      InputError: a name that no expert or that two experts of a rule have, layers of different numbers of experts, or
        leaves in which experts are not rows.
    """
    left_out = split_commas(config.eval.get("without", ""))
    if not left_out:
        return config, model, items
    kept, known = {}, []
    for rule in model.rules:
        if rule.router is None:
            continue
        names = names_of(rule, own or config)
        known += names
        for name in (name for name in left_out if names.count(name) > 1):
            raise InputError(WHERE, got=f"{name!r}, two experts of {rule.name}", expected="names that say one expert")
        kept[rule.name] = [e for e, name in enumerate(names) if name not in left_out]
        if len(kept[rule.name]) < len(names) and len({n for n in rule.experts if n}) > 1:
            raise InputError(
                WHERE, got=f"layers of {rule.name} with different numbers of experts", expected="equal numbers",
                fix="Its experts have no names across layers: none can be left out.",
            )  # fmt: skip
    unknown = [name for name in left_out if name not in known]
    if unknown:
        expected = f"experts among {', '.join(dict.fromkeys(known)) or 'those of a router: there is none'}"
        raise InputError(WHERE, got=repr(unknown[0]), expected=expected, fix=did_you_mean(unknown[0], known))
    smaller = dataclasses.replace(model, rules=tuple(filter(None, (_rule(r, kept) for r in model.rules))))
    config = _config(config, own or config, smaller, kept)
    stubs = jax.eval_shape(lambda: params)
    wanted = {
        "adapters": jax.eval_shape(lambda p: smaller.init_adapters(jax.random.key(0), p), stubs),
        "router_state": jax.eval_shape(smaller.init_router_state),
    }
    return config, smaller, items | {name: _cut(items[name], shapes, kept) for name, shapes in wanted.items()}


def _rule(rule, kept):
    """None where no expert is left: there the base is alone."""
    if rule.name not in kept:
        return rule
    E, own = max(rule.experts), kept[rule.name]
    load = tuple(rule.load[e] for e in own) if rule.load else ()
    experts = tuple(len(own) if n == E else n for n in rule.experts)
    return dataclasses.replace(rule, experts=experts, load=load) if own else None


def _config(config, own, model, kept):
    config, there = config.copy_and_resolve_references(), {rule.name: rule for rule in model.rules}
    with config.unlocked():
        config.eval.without = ""
        for name in kept:
            if name not in there:
                del config.method.rules[name]
            elif len({n for n in there[name].experts if n}) == 1:  # else none of its experts is left out
                load = own.method.rules[name].load
                load = tuple(load[e] for e in kept[name]) if load else ()
                config.method.rules[name].update(experts=str(max(there[name].experts)), load=load)
    return config


def _cut(tree: dict, shapes: dict, kept: dict) -> dict:
    leaves, out = flatten_dict(tree, sep="/"), {}
    for path, shape in flatten_dict(shapes, sep="/").items():
        leaf, own = leaves[path], kept.get(path.split("/")[0], ())
        axes = [i for i, (a, b) in enumerate(zip(leaf.shape, shape.shape, strict=True)) if a != b]
        if len(axes) > 1 or axes and shape.shape[axes[0]] != len(own):
            raise InputError(
                WHERE, got=f"{path}, of shape {list(leaf.shape)}", expected="a leaf in which experts are rows",
                fix="What is left of it would not be a model that never had them.",
            )  # fmt: skip
        out[path] = np.take(leaf, own, axis=axes[0]) if axes else leaf
    return unflatten_dict(out, sep="/")
