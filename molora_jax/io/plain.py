"""Any pytree as nested dicts with string keys, and back. Checkpoints hold only such plain trees.

optax states are named tuples: `to_plain` turns `(ScaleByAdamState(count, mu, nu), EmptyState())` into
`{"0": {"count": ..., "mu": {...}, "nu": {...}}}`; `from_plain` puts the values back into a template's structure.
"""

import jax

from molora_jax.core import trees
from molora_jax.errors import InputError


def names(tree) -> dict[str, object]:
    """`{"ffn/000-007/gate/A": leaf}` in tree order. None and empty containers have no leaves.

    Raises ValueError where two leaves get one name or a key holds `/`.
    """
    flat = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        parts = [_key(entry) for entry in path] or ["value"]
        if any(not part or "/" in part or part.startswith(".") for part in parts):
            raise ValueError(f"a checkpoint cannot name this leaf: {jax.tree_util.keystr(path)}")
        name = "/".join(parts)
        if name in flat:
            raise ValueError(f"two leaves of a checkpoint have the name {name!r}")
        flat[name] = leaf
    return flat


def nest(flat: dict[str, object]) -> dict:
    """`{"a/b": x}` as `{"a": {"b": x}}`."""
    tree = {}
    for name, leaf in flat.items():
        trees.set_path(tree, name, leaf)
    return tree


def to_plain(tree) -> dict:
    """The tree as nested dicts with string keys; a tree that is one leaf becomes `{"value": leaf}`."""
    return nest(names(tree))


def from_plain(plain: dict, template, *, where: str = "checkpoint"):
    """The values of `plain` in the structure of `template` (whose leaves are only counted and named).

    Raises InputError that lists the leaves missing from `plain` and those that `template` does not have.
    """
    have, want = names(plain), names(template)
    same_names(have, want, where=where)
    return jax.tree.unflatten(jax.tree.structure(template), [have[name] for name in want])


def same_names(have, want, *, where: str):
    missing, extra = [n for n in want if n not in have], [n for n in have if n not in want]
    if missing or extra:
        found = [f"no {_some(missing)}"] * bool(missing) + [f"unknown {_some(extra)}"] * bool(extra)
        raise InputError(
            where,
            got=" and ".join(found),
            expected=f"exactly the {len(want)} leaves of this run's configuration",
            fix="Use the configuration that the checkpoint was written with.",
        )


def _some(keys, limit=4):
    return ", ".join(keys[:limit]) + (f" and {len(keys) - limit} more" if len(keys) > limit else "")


def _key(entry) -> str:
    for field in ("key", "name", "idx"):
        if hasattr(entry, field):
            return str(getattr(entry, field))
    raise ValueError(f"a checkpoint cannot name the tree entry {entry!r}")
