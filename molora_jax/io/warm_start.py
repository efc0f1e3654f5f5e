"""Another run as a start: its adapters and router state, re-cut to this run's segments by absolute layer."""

import pathlib

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from molora_jax.errors import InputError
from molora_jax.io.checkpoints import Checkpoints, read_manifest


def load(run: str, items=("adapters", "router_state"), *, where: str = "train.init_from") -> dict:
    """These items of a run's newest valid step, each a nested dict of numpy arrays.

    Raises:
      InputError: no such run, or none of its steps is valid.
    """
    folder = pathlib.Path(run).expanduser() / "checkpoints"
    checkpoints = Checkpoints(folder, keep=1)
    step = checkpoints.newest_valid()
    if step is None:
        raise InputError(
            where, got=f"{run}, without a checkpoint", expected="the workdir of a run", fix="Check the path."
        )
    tree = read_manifest(folder / str(step))["tree"]
    blank = lambda leaves: {k: np.zeros(v["shape"], v["dtype"]) for k, v in leaves.items()}  # noqa: E731
    return checkpoints.restore(step, {item: unflatten_dict(blank(tree[item]), sep="/") for item in items})


def load_adapters(run: str, *, where: str = "train.init_from") -> dict:
    """`load` of the adapters alone."""
    return load(run, ("adapters",), where=where)["adapters"]


def recut(old: dict, new: dict, *, where: str = "train.init_from") -> dict:
    """`old`'s values in the shape of `new` (nested dicts of arrays): layer by layer, whatever the segments.

    Raises:
      InputError: a leaf or a layer that `old` does not have, or has in another shape.
    """
    layers, shared = _by_layer(old)
    out = {}
    for path, leaf in flatten_dict(new, sep="/").items():
        rule, segment, *rest = path.split("/")
        name = "/".join(rest)
        if segment == "shared":
            out[path] = _same(shared.get(path), leaf.shape, path, where)
            continue
        start, stop = (int(x) for x in segment.split("-"))
        rows = [_same(layers.get((rule, i, name)), leaf.shape[1:], f"{rule}, layer {i}, {name}", where)
                for i in range(start, stop + 1)]  # fmt: skip
        out[path] = np.stack(rows)
    return unflatten_dict(out, sep="/")


def _by_layer(tree):
    layers, shared = {}, {}
    for path, leaf in flatten_dict(tree, sep="/").items():
        rule, segment, *rest = path.split("/")
        if segment == "shared":
            shared[path] = leaf
            continue
        start = int(segment.split("-")[0])
        for i, row in enumerate(np.asarray(leaf)):
            layers[rule, start + i, "/".join(rest)] = row
    return layers, shared


def _same(value, shape, name, where):
    if value is None or tuple(value.shape) != tuple(shape):
        got = "nothing" if value is None else f"shape {list(value.shape)}"
        raise InputError(
            where, got=f"{got} for {name}", expected=f"shape {list(shape)}",
            fix="Start from a run whose rules have the same sites, experts and rank.",
        )  # fmt: skip
    return np.asarray(value)
