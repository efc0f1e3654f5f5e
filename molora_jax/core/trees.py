"""Nested dicts of arrays: paths, which leaves train, putting trees together."""

import fnmatch

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from kernels_pallas.quantised import is_quantised


def split(tree: dict, frozen: tuple[str, ...]) -> tuple[dict, dict]:
    """`(trainable, frozen)` nested dicts; a path `rule/segment/site/leaf` is frozen when a pattern matches it."""
    flat = flatten_dict(tree, sep="/")
    fixed = {path for path in flat for pattern in frozen if fnmatch.fnmatchcase(path, pattern)}
    part = lambda keep: unflatten_dict({p: x for p, x in flat.items() if keep(p)}, sep="/")  # noqa: E731
    return part(lambda p: p not in fixed), part(lambda p: p in fixed)


def merge(a: dict, b: dict) -> dict:
    return unflatten_dict({**flatten_dict(a, sep="/"), **flatten_dict(b, sep="/")}, sep="/")


def joined(adapters: dict, modules: dict) -> dict:
    """All leaves that may train as one tree: the adapters' rules, and the trained modules under `modules`."""
    return {**adapters, "modules": modules} if modules else adapters


def apart(tree: dict) -> tuple[dict, dict]:
    """The reverse of `joined`: `(adapters, modules)`."""
    return {name: own for name, own in tree.items() if name != "modules"}, tree.get("modules", {})


def overlay(params: dict, copies: dict) -> dict:
    """`params` with trained copies (float32) in the places of the leaves that they were copied from, in their dtype."""
    flat = flatten_dict(params, sep="/")
    own = {path: leaf.astype(flat[path].dtype) for path, leaf in flatten_dict(copies, sep="/").items()}
    return unflatten_dict({**flat, **own}, sep="/") if own else params


def pairs(model, trainable: dict) -> dict[tuple[str, str], float]:
    """`{(path of A, path of B): scale}` of every low-rank pair that trains (either half of it)."""
    flat = flatten_dict(trainable, sep="/")
    out = {}
    for rule in model.rules:
        for path in flat if rule.adapter.PAIRED else ():
            head, _, leaf = path.rpartition("/")
            if path.startswith(rule.name + "/") and leaf == "B" and "/router/" not in path:
                out[f"{head}/A", path] = rule.adapter.scale()
    return out


def triplets(flat: dict) -> list[tuple[str, str, str]]:
    """The paths `(A, B, lam)` of every site that has all three (AdaLoRA's), of leaves by path `a/b/c`."""
    heads = [path.removesuffix("/lam") for path in flat if path.endswith("/lam")]
    return [(f"{h}/A", f"{h}/B", f"{h}/lam") for h in heads if {f"{h}/A", f"{h}/B"} <= flat.keys()]


def repeated(tree, n: int):
    """`tree` n times side by side: every leaf `[n, ...]`; traceable."""
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (n, *x.shape)), tree)


def count(tree) -> int:
    """Numbers in a tree; of a quantised kernel those of the dense one."""
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree, is_leaf=is_quantised))


def num_bytes(tree) -> int:
    """Bytes of a tree of arrays or shapes."""
    return sum(int(np.prod(x.shape)) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


def name_of(path) -> str:
    """`a/b/c` of a key path of `jax.tree_util`, of nested dicts."""
    return "/".join(str(key.key) for key in path)


def paths(tree) -> list[str]:
    """`a/b/c` of every leaf, in tree order."""
    return [name_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def set_path(tree: dict, path: str, leaf) -> None:
    """Puts `leaf` at `a/b/c` of a nested dict."""
    *parents, last = path.split("/")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[last] = leaf
