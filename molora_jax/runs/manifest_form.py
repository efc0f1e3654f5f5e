"""The form of a manifest: types, names and ranges of all that `molora_jax/runs/manifest.py` describes.

A checksum says that a text has not changed since it was written, not that a friend wrote it. Nothing in a manifest is
used before it has passed here: its names cannot leave the step's folder, its shapes cannot overflow.
"""

import math
import re

from molora_jax.runs.metrics_file import is_finite

# groups of a config
SECTIONS = {
    "base", "data", "eval", "losses", "mesh", "method", "objective", "optim", "schedule", "surgery", "train",
}  # fmt: skip
DTYPE = re.compile(r"bool|bfloat16|float(8_\w{1,20}|16|32|64)|u?int(4|8|16|32|64)|complex64")


def malformed(manifest: dict) -> str:
    """What in a manifest is not of the form above; "" for nothing. A checksum only says that nothing changed since."""
    step, samples = manifest.get("step"), manifest.get("samples")
    if not count(step):
        return f"step {step!r:.80}"
    if samples is not None and not count(samples):
        return f"samples {samples!r:.80}"
    for name, kind in (("config", dict), ("identity", str), ("run", dict)):
        if manifest.get(name) is not None and not isinstance(manifest[name], kind):
            return f"{name} {manifest[name]!r:.80}"
    for group in ("config", "run"):
        for name in SECTIONS & (manifest.get(group) or {}).keys():
            if not isinstance(manifest[group][name], dict):
                return f"{group}.{name} {manifest[group][name]!r:.80}"
    patience = manifest.get("patience")
    if patience is not None and not _patience(patience):
        return f"patience {patience!r:.80}"
    tree, files = manifest.get("tree"), manifest.get("files")
    if not isinstance(tree, dict) or not all(isinstance(leaves, dict) for leaves in tree.values()):
        return "no tree of items and leaves"
    for item, leaves in tree.items():
        if not _part(item):
            return f"the item {item!r:.80}"
        for name, leaf in leaves.items():
            if not all(map(_part, name.split("/"))) or not _leaf(leaf):
                return f"the leaf {item}/{name:.80}: {leaf!r:.120}"
        if any(a != b and b.startswith(f"{a}/") for a, b in _neighbours(leaves)):
            return f"a leaf below a leaf in {item}"
    for what, table in (("files", files), ("base_files", manifest.get("base_files") or {})):
        if not isinstance(table, dict):
            return f"no table of {what}"
        for name, entry in table.items():
            if not _inside(name):
                return f"the file {name!r:.80}, which is not inside the step's folder"
            size, digest = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
            if not count(size) or not _hex32(digest):
                return f"the file {name:.80}: {entry!r:.80}"
    for parent in _list(manifest.get("parents")):
        if not (isinstance(parent, dict) and parent.keys() == {"path", "step", "digest"}):
            return f"the parent {parent!r:.80}"
        path, number, digest = parent["path"], parent["step"], parent["digest"]
        if not (isinstance(path, str) and path.isprintable() and count(number) and _hex32(digest)):
            return f"the parent {parent!r:.80}"
    return ""


def _patience(value) -> bool:
    """Of `training.patience`: what a run that goes on reads of it."""
    lowest = value.get("lowest") if isinstance(value, dict) else ""
    return (lowest is None or is_finite(lowest)) and count(value.get("waited", 0))


def count(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def _hex32(text) -> bool:
    return isinstance(text, str) and re.fullmatch(r"[0-9a-f]{32}", text) is not None


def _list(value) -> list:
    """None is none; what is no list is an entry that is refused."""
    return value if isinstance(value, list) else [] if value is None else [value]


def _part(name) -> bool:
    """Whether a key is one part of a path: what Orbax may make a folder of."""
    return 0 < len(name) < 200 and not name.startswith(".") and not re.search(r"[/\\\x00-\x1f\ud800-\udfff]", name)


def _leaf(leaf) -> bool:
    if not isinstance(leaf, dict) or not {"shape", "dtype", "digest"} == leaf.keys():
        return False
    shape, dtype, digest = leaf["shape"], leaf["dtype"], leaf["digest"]
    return (
        isinstance(shape, list) and len(shape) <= 32 and all(map(count, shape)) and math.prod(shape) < 2**48
        and isinstance(dtype, str) and DTYPE.fullmatch(dtype) is not None
        and isinstance(digest, str) and re.fullmatch(r"[0-9a-f]{16}", digest) is not None
    )  # fmt: skip


def _neighbours(leaves):
    ordered = sorted(f"{name}/" for name in leaves)
    return [(a[:-1], b[:-1]) for a, b in zip(ordered, ordered[1:], strict=False)]


def _inside(name: str) -> bool:
    parts = name.split("/")
    return not re.search(r"[\\\x00\ud800-\udfff]", name) and not any(part in ("", ".", "..") for part in parts)
