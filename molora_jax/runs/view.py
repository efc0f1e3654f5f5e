"""The leaves of a run by (rule, absolute layer, site, leaf), whatever the segments that its layers are cut into.

    adapters/<rule>/<segment>/<site>/<leaf> [L_segment, ...]    is    view[rule, layer, site, leaf] [...]
    adapters/<rule>/shared/<site>/<leaf>    [...]                     view[rule, None, site, leaf] [...]

A router's leaves are of the site `router/<scope>`. Arrays stay what they are, numpy or jax; a read is a row of the
run's own array, nothing is copied until something is written.

Example:
  >>> view = run.view()
  >>> view["all", 3, "q", "B"] = 0 * view["all", 3, "q", "B"]      # layer 3 without its change of q
  >>> molora_jax.write_run("runs/without", run, view=view)
"""

import collections.abc
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from molora_jax.config.fields import did_you_mean, one_of
from molora_jax.core.rules import layers_named
from molora_jax.errors import InputError


class Key(NamedTuple):
    """`layer` is absolute, None for what the layers share."""

    rule: str
    layer: int | None
    site: str
    leaf: str


class NoLeaf(InputError, KeyError):
    """A key at which a view has nothing: a KeyError too, as `in` and `get` of a mapping ask for."""

    __str__ = InputError.__str__


class View(collections.abc.Mapping):
    """A mapping `Key -> array` over a nested tree of leaves.

    Args:
      tree: as `adapters` or `router_state` of a run. where: names it in errors.

    Raises:
      InputError: a leaf at no such path, or with another number of layers than its segment.
    """

    def __init__(self, tree: dict, *, where: str = "view"):
        self.where, self._leaves, self._places, self._new = where, flatten_dict(tree, sep="/"), {}, {}
        for path, leaf in self._leaves.items():
            for i, key in enumerate(keys_of(path, where, np.shape(leaf))):
                self._places[key] = path, None if key.layer is None else i

    def __getitem__(self, key):
        key = self._key(key)
        path, i = self._places[key]
        if key in self._new:
            return self._new[key]
        return self._leaves[path] if i is None else self._leaves[path][i]

    def __setitem__(self, key, value):
        """Another array in a leaf's place, perhaps of another shape; `tree` wants one shape a segment."""
        key = self._key(key)
        if not isinstance(value, (np.ndarray, np.generic, jax.Array)):
            got, fix = f"a {type(value).__name__}", f"Write np.full({np.shape(self[key])}, VALUE, np.float32), say."
            raise InputError(f"{self.where}: {tuple(key)}", got=got, expected="an array", fix=fix)
        self._new[key] = value

    def __delitem__(self, key):
        """Refused: what leaves there are follows from the rules of the config."""
        key = self._key(key)
        raise InputError(
            f"{self.where}: {tuple(key)}", got="del", expected="an array for every leaf of the run's rules",
            fix="Write zeros to take a change away: view[key] = 0 * view[key].",
        )  # fmt: skip

    def _key(self, key) -> Key:
        """Raises NoLeaf, with what there is, for a key of no leaf."""
        simple = isinstance(key, tuple) and all(isinstance(p, (str, int, np.integer, type(None))) for p in key)
        if simple and len(key) == len(Key._fields):
            if key in self._places:
                return Key(*key)
            left = list(self._places)
            for i, (field, value) in enumerate(zip(Key._fields, key, strict=True)):
                there = list(dict.fromkeys(one[i] for one in left))
                left = [one for one in left if one[i] == value]
                if not left:
                    raise NoLeaf(
                        f"{self.where}: {key}", got=f"no such leaf: {field} {value!r}",
                        expected=_among(there), fix=did_you_mean(value, there),
                    )  # fmt: skip
        expected = 'a key (rule, layer, site, leaf), such as ("all", 0, "q", "A")'
        raise NoLeaf(self.where, got=f"{key!r:.80}", expected=expected, fix="list(view) has them all.")

    def __iter__(self):
        return iter(self._places)

    def __len__(self):
        return len(self._places)

    def __repr__(self):
        rules = ", ".join(dict.fromkeys(key.rule for key in self))
        return f"View({len(self)} leaves by layer of {rules or 'no rule'})"

    def by_site(self) -> dict[tuple, dict]:
        """`{(rule, layer, site): {leaf: array}}`."""
        out: dict = {}
        for key, leaf in self.items():
            out.setdefault(key[:3], {})[key.leaf] = leaf
        return out

    def tree(self) -> dict:
        """The nested tree again, with what was written."""
        places = {}
        for key in self._places:
            places.setdefault(self._places[key][0], []).append(key)
        out = {}
        for path, keys in places.items():
            if not self._new.keys() & set(keys):
                out[path] = self._leaves[path]
            elif keys[0].layer is None:
                out[path] = self[keys[0]]
            else:
                rows = [self[key] for key in keys]
                if len({(np.shape(row), str(row.dtype)) for row in rows}) > 1:
                    raise InputError(
                        f"{self.where}: {path}", got="layers of different shapes or dtypes",
                        expected="one a segment: " + "; ".join(sorted({f"{r.dtype}{list(r.shape)}" for r in rows})),
                        fix="Write the leaf in all layers of its segment.",
                    )  # fmt: skip
                stack = jnp.stack if any(isinstance(row, jax.Array) for row in rows) else np.stack
                out[path] = stack(rows)
        return unflatten_dict(out, sep="/")


def keys_of(path: str, where: str, shape=None) -> list[Key]:
    """The keys of the leaf at `RULE/SEGMENT/SITE/LEAF`, a layer each. `shape`: of the leaf, to be checked."""
    rule, segment, *rest = path.split("/") if "/" in path else (path, "")
    site, leaf = "/".join(rest[:-1]), rest[-1] if rest else ""
    if segment == "shared":
        return [Key(rule, None, site, leaf)]
    layers = layers_named(segment)
    if layers is None or not rest or (shape is not None and (not shape or shape[0] != len(layers))):
        raise InputError(where, got=f"a leaf {path} {list(shape or ())}", expected="RULE/FIRST-LAST/SITE/LEAF [L, ...]")
    return [Key(rule, layer, site, leaf) for layer in layers]


def cut(leaves, shapes: dict, *, where: str, dry: bool = False) -> dict:
    """The tree of `shapes` (nested dicts of arrays or shapes) from leaves by key, layer by layer.

    Args:
      leaves: a mapping by `Key`; what `shapes` does not ask for is left. dry: only compare.

    Raises:
      InputError: a leaf or a layer that is missing, or of another shape or dtype.
    """
    out = {}
    for path, leaf in flatten_dict(shapes, sep="/").items():
        keys = keys_of(path, where)
        if keys[0].layer is None:
            out[path] = _same(leaves.get(keys[0]), leaf.shape, leaf.dtype, path, where)
            continue
        rows = [
            _same(leaves.get(key), leaf.shape[1:], leaf.dtype, f"{key.rule}, layer {key.layer}, {_name(key)}", where)
            for key in keys
        ]
        if not dry:
            out[path] = np.stack([np.asarray(row) for row in rows])
    return unflatten_dict(out, sep="/")


def _among(values: list) -> str:
    """Names or layers that there are, as text."""
    whole = [value for value in values if isinstance(value, int)]
    if len(whole) > 2 and whole == list(range(whole[0], whole[-1] + 1)):
        return f"one of {whole[0]} to {whole[-1]}" + (" or None" if None in values else "")
    return one_of(map(repr, values)) if values else "nothing: the run has no such leaves"


def _name(key: Key) -> str:
    return "/".join(part for part in (key.site, key.leaf) if part)


def _same(value, shape, dtype, name, where):
    if value is None or tuple(value.shape) != tuple(shape) or value.dtype != dtype:
        got = "nothing" if value is None else f"{value.dtype}{list(value.shape)}"
        raise InputError(
            where, got=f"{got} for {name}", expected=f"{dtype}{list(shape)}",
            fix="Start from a run whose rules have the same sites, experts and rank.",
        )  # fmt: skip
    return value
