"""Random bases that are made from a seed are those of the run that trained on them."""

from molora_jax.errors import InputError


def check_bases(rules, adapters: dict, *, where: str, of: str) -> None:
    """Raises InputError where an adapter would make other bases than those that `of` was trained with.

    Args:
      adapters: nested dicts of numpy arrays.
    """
    for rule in rules:
        for path, leaves in _tables(adapters.get(rule.name, {}), rule.name):
            if not rule.adapter.same_bases(leaves):
                raise InputError(
                    where, got=f"{of}, whose random bases at {path} are not made here as they were there",
                    expected="the entries that its saved check says",
                    fix="Open it with the version that trained it; its seed alone does not give the factors here.",
                )  # fmt: skip


def _tables(tree: dict, path: str):
    """Every dict of a nested one that holds arrays, with its path."""
    arrays = {name: leaf for name, leaf in tree.items() if not isinstance(leaf, dict)}
    if arrays:
        yield path, arrays
    for name, below in tree.items():
        if isinstance(below, dict):
            yield from _tables(below, f"{path}/{name}")
