"""What a run is, as tables: rules with their sites, layers, experts, rank; what trains at each site."""

import platform

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from molora_jax import runtime
from molora_jax.core import trees
from molora_jax.core.quant import FORMULAS, is_quantised
from molora_jax.runs.view import keys_of
from molora_jax.sharding import axes_text
from molora_jax.text import table


def machine(mesh, dtype: str) -> str:
    """`2 processes, 8 devices (TPU v5e), mesh data=8, base in bfloat16; molora_jax 0.1.0, jax 0.12.0, Python 3.12`."""
    kind = mesh.devices.flat[0].device_kind
    processes = len({d.process_index for d in mesh.devices.flat})
    axes = axes_text(mesh.shape) or "of one device"
    on = f"{counted(processes, 'process', 'processes')}, {counted(mesh.size, 'device', 'devices')} ({kind})"
    versions = f"molora_jax {runtime.version()}, jax {jax.__version__}, Python {platform.python_version()}"
    return f"{on}, mesh {axes}, base in {dtype}; {versions}"


def counted(number: int, one: str, more: str) -> str:
    return f"{number} {one if number == 1 else more}"


def rules_table(model, adapters, frozen: tuple[str, ...], num_base: int, modules: dict | None = None) -> str:
    """One row a rule and a trained module, then the sum; `share` is of base plus what is beside it (shapes will do).

    `frozen`: memory and dtype of the rule's leaves that do not train, such as random bases.
    """
    modules = modules or {}
    parts = trees.split(trees.joined(adapters, modules), frozen)
    trainable, still = (flatten_dict(part, sep="/") for part in parts)
    total = num_base + trees.count(adapters) + trees.count({n: m for n, m in modules.items() if n != "base"})
    rows = [("rule", "sites", "layers", "experts", "rank", "adapter", "router", "trainable", "share", "frozen")]
    for rule in model.rules:
        own = sum(int(np.prod(x.shape)) for path, x in trainable.items() if path.startswith(rule.name + "/"))
        kept = memory([x for path, x in still.items() if path.startswith(rule.name + "/")])
        router = "-" if rule.router is None else f"{type(rule.router).__name__} ({rule.share})"
        rows.append(
            (rule.name, ",".join(rule.sites), runs([i for i, n in enumerate(rule.experts) if n]), experts(rule.experts),
             str(rule.adapter.rank), type(rule.adapter).__name__, router, f"{own:,}", f"{own / total:.2%}", kept)
        )  # fmt: skip
    for name in modules:
        own = {path: x for path, x in trainable.items() if path.startswith(f"modules/{name}/")}
        count = sum(int(np.prod(x.shape)) for x in own.values())
        what = "copies of base leaves" if name == "base" else "head"
        rows.append((f"modules/{name}", what, "", "", "", "", "", f"{count:,}", f"{count / total:.2%}", "-"))
    own = sum(int(np.prod(x.shape)) for x in trainable.values())
    rows.append(("total", "", "", "", "", "", "", f"{own:,}", f"{own / total:.2%}", memory(still.values())))
    return table(rows, right=(7, 8))


def base_table(base) -> str:
    """Of a quantised base: the bytes of every kernel (by the formula that is printed with them), and of all else.

    Args:
      base: the tree of its parameters, arrays or shapes.
    """
    rows, kept, form, all_dense = [("kernel", "shape", "form", "bytes", "dense")], [], "", 0
    for path, leaf in flatten_dict(base, sep="/").items():
        if is_quantised(leaf):
            form = leaf.form
            dense = int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize
            rows.append((path, "x".join(map(str, leaf.shape)), form, f"{leaf.nbytes:,}", f"{dense:,}"))
            all_dense += dense
        else:
            kept.append(leaf)
    rest, total = trees.num_bytes(kept), trees.num_bytes(base)
    rows.append(("all else", "", ", ".join(sorted({str(x.dtype) for x in kept})), f"{rest:,}", f"{rest:,}"))
    rows.append(("total", "", "", f"{total:,}", f"{rest + all_dense:,}"))
    return f"{table(rows, right=(3, 4))}\nbytes of a kernel [D_in, D_out] in {form}: {FORMULAS[form]}"


def sites_table(adapters, frozen: tuple[str, ...], modules: dict | None = None) -> str:
    """One row a rule and site (a router's scope is one): the leaves that train there, and those that do not.

    Args:
      adapters, modules: nested dicts of arrays or shapes. frozen: patterns of paths, of members, loads and the stage.
    """
    parts, found = trees.split(trees.joined(adapters, modules or {}), frozen), {}
    for column, part in enumerate(parts):
        for path, leaf in flatten_dict(part, sep="/").items():
            if path.startswith("modules/"):
                rule, site, layers, name = "modules", path.split("/")[1], (), "/".join(path.split("/")[2:])
            else:
                keys = keys_of(path, "adapters")
                rule, site, name = keys[0].rule, keys[0].site or "(shared)", keys[0].leaf
                layers = tuple(key.layer for key in keys if key.layer is not None)
            at, columns = found.setdefault((rule, site), (set(), ({}, {})))
            at.update(layers)
            columns[column][name] = columns[column].get(name, 0) + int(np.prod(leaf.shape))
    rows = [("rule", "site", "layers", "trains", "frozen")]
    for (rule, site), (layers, columns) in found.items():
        said = (", ".join(f"{name} {count:,}" for name, count in column.items()) or "-" for column in columns)
        rows.append((rule, site, runs(sorted(layers)) or "-", *said))
    return table(rows)


def memory(leaves) -> str:
    """`"3.1 MB float32"`, by dtype; "-" where there are none."""
    sizes: dict[str, int] = {}
    for leaf in leaves:
        sizes[str(leaf.dtype)] = (
            sizes.get(str(leaf.dtype), 0) + int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize
        )
    return ", ".join(f"{_bytes(size)} {dtype}" for dtype, size in sorted(sizes.items())) or "-"


def _bytes(size: int) -> str:
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size} B"


def runs(layers: list[int]) -> str:
    """`[0, 1, 2, 5]` -> `0-2,5`."""
    out: list[list[int]] = []
    for layer in layers:
        if out and layer == out[-1][1] + 1:
            out[-1][1] = layer
        else:
            out.append([layer, layer])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in out)


def experts(counts: tuple[int, ...]) -> str:
    """`(2, 2, 4, 4)` -> `2*2,4*2`; one count for all layers as itself."""
    used = [n for n in counts if n]
    if len(set(used)) == 1:
        return str(used[0])
    out: list[list[int]] = []
    for n in used:
        if out and out[-1][0] == n:
            out[-1][1] += 1
        else:
            out.append([n, 1])
    return ",".join(f"{n}*{times}" for n, times in out)
