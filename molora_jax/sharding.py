"""The mesh, and where every array lives on it: the base's as its backbone says, one `constrain` for activations.

Mesh axes: `data`, `fsdp`, `expert`, `tensor`; a batch's rows are split over the first three. The layer axis of the
stacked base is never sharded: a sharded layer axis gathers the whole stack inside the layer loop (compiled and seen).
"""

import functools

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kernels_pallas.quantised import is_quantised
from molora_jax.core import trees
from molora_jax.errors import InputError

if jax.__version__ == "0.11.2":
    # Its Shardy crashes (a segmentation fault in ManualComputationUnusedInputsPattern) on a `shard_map` whose input
    # turns out to be unused: every routed FFN over several devices has one. 0.11.1 and 0.12 do not. GSPMD, the older
    # partitioner, is still there (but aborts on `gather` with tensor parallelism: pyproject.toml excludes 0.11.2).
    jax.config.update("jax_use_shardy_partitioner", False)

AXES = ("data", "fsdp", "expert", "tensor")
ROWS = ("data", "fsdp", "expert")
CHANGE = "change"  # an optimizer's leaf of what a pair A, B does to its whole kernel: `rule/segment/site/change`


def make_mesh(sizes: dict[str, int], devices=None, *, slices: int = 1) -> Mesh:
    """A mesh of the four axes. `sizes` multiply to the number of devices (checked by the config).

    Args:
      slices: TPU slices (or hosts of GPUs; of other devices, processes) that only the axis `data` leads across, as its
        outer part: all other axes stay on the fast network inside a slice.

    Raises:
      InputError: there are no so many equal slices.
    """
    devices = jax.devices() if devices is None else devices
    shape = tuple(sizes[a] for a in AXES)
    if slices > 1:
        inner = sizes | dict(data=sizes["data"] // slices)
        parts = [make_mesh(inner, part).devices for part in _slices(devices, slices)]
        return Mesh(np.concatenate(parts), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    types = (AxisType.Auto,) * len(AXES)
    try:
        return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)
    except NotImplementedError:  # fsdp=2 on a torus of 16x16: no whole axis of the chips is of that size
        split = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return Mesh(split, AXES, axis_types=types)


def _slices(devices, count: int) -> list[list]:
    """The devices in so many groups, each of whole slices."""
    of = [getattr(device, "slice_index", None) for device in devices]
    of = of if len(set(of)) > 1 else [device.process_index for device in devices]
    groups = [[d for d, own in zip(devices, of, strict=True) if own == name] for name in sorted(set(of))]
    if len(groups) % count or len({len(group) for group in groups}) > 1:
        sizes = ", ".join(str(len(group)) for group in groups)
        raise InputError(
            "mesh.dcn", got=f"{count} for {len(groups)} slices (of {sizes} devices)",
            expected="a divisor of the number of slices, which are alike", fix="Give the number of slices, or 1.",
        )  # fmt: skip
    each = len(groups) // count
    return [sum(groups[i : i + each], []) for i in range(0, len(groups), each)]


def local_mesh(sizes: dict[str, int] | None) -> Mesh:
    """A mesh of some of this process's devices for a model that is asked, not trained; None is the first device.

    Args:
      sizes: of some axes, such as `dict(fsdp=8)`; those left out are 1.

    Raises:
      InputError: an axis that is none, a size that is no number from 1 on, more devices than there are.
    """
    sizes, devices = sizes or {}, jax.local_devices()
    for axis, size in sizes.items():
        if axis not in AXES:
            raise InputError("mesh", got=repr(axis), expected="axes " + ", ".join(AXES), fix="Write dict(fsdp=8).")
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise InputError(f"mesh.{axis}", got=repr(size), expected="a number from 1 on")
    count = int(np.prod(list(sizes.values())))
    if count > len(devices):
        raise InputError(
            "mesh", got=f"{' x '.join(f'{a}={n}' for a, n in sizes.items())}, {count} devices",
            expected=f"at most {len(devices)}, which this process has", fix="Choose a smaller axis.",
        )  # fmt: skip
    return make_mesh({axis: sizes.get(axis, 1) for axis in AXES}, devices[:count])


def fits(params: dict, shardings, mesh: Mesh) -> None:
    """Checks, where the device says how much memory it has, that the base has room on it.

    Raises:
      InputError: it has not; the message says what it needs.
    """
    stats = mesh.devices.flat[0].memory_stats() or {}
    limit = stats.get("bytes_limit")
    if limit is None:
        return
    split = lambda leaf, sharding: int(np.prod(sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize  # noqa: E731
    need = sum(jax.tree.leaves(jax.tree.map(split, params, shardings)))
    if need > limit - stats.get("bytes_in_use", 0):
        raise InputError(
            "mesh", got=f"{need / 1e9:.1f} GB of the base for a device with {limit / 1e9:.1f} GB (of {mesh.size})",
            expected="room for the base", fix=f"Split it, as in mesh=dict(fsdp={2 * -(-need // limit)}) "
            "(launchers: --mesh=fsdp:N), or take base.dtype=bfloat16.",
        )  # fmt: skip


def axes_text(sizes) -> str:
    """`data=4 tensor=2` of `{axis: size}`: the axes that split something; "" of one device."""
    return " ".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1)


def ways(mesh: Mesh, axes) -> int:
    """The devices along some axes together."""
    return int(np.prod([mesh.shape[a] for a in axes]))


def param_shardings(backbone, params, mesh: Mesh):
    """Shardings of the frozen base: of the specs that `backbone.shapes()` gives for a leaf, the first that divides it.

    Raises:
      InputError: a dimension that the mesh does not divide.
    """
    leaves = backbone.shapes()

    def of_leaf(path, leaf):
        name = trees.name_of(path)
        if name not in leaves:
            raise ValueError(f"{type(backbone).__name__}.shapes() does not have the parameter {name!r}")
        specs = leaves[name].specs
        shape = leaf.arrays["codes"].shape if is_quantised(leaf) else leaf.shape
        spec = next((spec for spec in specs if not _undivided(shape, spec, mesh)), None)
        if spec is None:
            size, axis = _undivided(shape, specs[-1], mesh)[0]
            raise InputError(
                f"mesh.{axis}", got=f"{mesh.shape[axis]} ways for {name} of {size}", expected=f"a divisor of {size}",
                fix="Choose a smaller axis, or give its devices to mesh.data.",
            )  # fmt: skip
        if is_quantised(leaf):  # scales lie as their codes, but for axes that do not divide their number
            fitting = lambda n, axes: None if _undivided((n,), (axes,), mesh) else axes  # noqa: E731
            held = lambda a: P(*map(fitting, a.shape, spec))  # noqa: E731
            return leaf.map(lambda a: NamedSharding(mesh, held(a)))
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(of_leaf, params, is_leaf=is_quantised)


def _undivided(shape, spec, mesh) -> list:
    """`(size, axis)` of the dimensions that their axes do not divide; of several axes the one that alone does not."""
    found = []
    for size, axes in zip(shape, spec, strict=False):
        axes = (axes,) if isinstance(axes, str) else axes or ()
        if size % ways(mesh, axes):
            found.append((size, next((a for a in axes if size % mesh.shape[a]), axes[-1])))
    return found


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def row_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P(ROWS))


@functools.cache  # one function a mesh: programs are compiled for it
def constrain(mesh: Mesh):
    """Pins activations `[B, ...]` to the batch's rows; as they are where the mesh does not divide the rows."""
    sharding, count = row_sharding(mesh), ways(mesh, ROWS)
    return lambda x: jax.lax.with_sharding_constraint(x, sharding) if len(x) % count == 0 else x


def _of_rows(num_rows: int, mesh: Mesh) -> NamedSharding:
    return replicated(mesh) if num_rows % ways(mesh, ROWS) else row_sharding(mesh)


def rows_of_process(num_rows: int, mesh: Mesh) -> np.ndarray:
    """The rows of a global batch that lie on this process's devices, rising.

    The sharding says which, not the process's number: processes that split `tensor` between them have the same rows.
    """
    places = _of_rows(num_rows, mesh).addressable_devices_indices_map((num_rows,)).values()
    return np.array(sorted({row for (rows,) in places for row in range(*rows.indices(num_rows))}), np.int64)


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh, num_rows: int) -> dict[str, jax.Array]:
    """This process's rows `[B_local, S]` as global arrays `[B, S]`; on all devices where the mesh does not divide B."""
    sharding, own = _of_rows(num_rows, mesh), rows_of_process(num_rows, mesh)

    def put(value):
        def part(index):
            rows = index[0] if index else slice(None)
            return value[np.searchsorted(own, np.arange(*rows.indices(num_rows)))]

        return jax.make_array_from_callback((num_rows, *value.shape[1:]), sharding, part)

    return {name: put(value) for name, value in batch.items()}


def put(tree, shardings):
    """Host arrays onto the mesh; every process holds the same values."""

    def put_leaf(x, sharding):
        x = np.asarray(x) if isinstance(x, (jax.Array, int, float)) else x
        read: dict = {}  # devices that hold the same part: one reading of what lies in files (`huggingface.Stored`)

        def part(index):
            key = str(index)
            if key not in read:
                read[key] = x[index]
            return read[key]

        return jax.make_array_from_callback(x.shape, sharding, part)

    if isinstance(shardings, NamedSharding):
        return jax.tree.map(lambda x: put_leaf(x, shardings), tree)
    return jax.tree.map(put_leaf, tree, shardings)


def adapter_shardings(adapters, model, mesh: Mesh):
    """Shardings of a tree of adapters (or of their shapes): experts over `expert` where the engine keeps shards.

    Leaves are `rule/segment/site/leaf [L, E, ...]`; routers and leaves that a rule shares are replicated, and so is a
    leaf whose E the axis does not divide.
    """
    experts = {
        (rule.name, segment.name): (E, rule)
        for segment in model.segments
        for rule, E in zip(model.rules, segment.counts, strict=True)
    }

    def of_leaf(path, leaf):
        rule, segment, site, *_ = names = [str(k.key) for k in path]  # a shared leaf may end at its third name
        E, owner = experts.get((rule, segment), (0, None))
        E = E if owner is None or owner.placement is None else owner.placement.experts(model.config, E)
        whole = site == "router" or owner is not None and model.engine.keeps(owner, names[-1])
        split = not whole and len(leaf.shape) > 1 and leaf.shape[1] == E and model.engine.stored(E)
        return NamedSharding(mesh, P(None, "expert") if split else P())

    return jax.tree_util.tree_map_with_path(of_leaf, adapters)


def state_shardings(state, model, mesh: Mesh):
    """Shardings of a training state (shapes): the optimizer's leaves lie where the leaves lie that they belong to.

    An optimizer keeps trees of the adapters' structure: a leaf belongs to the adapter whose path its own ends with. A
    `CHANGE [L, E, D_in, D_out]` lies over `expert` as its pair's B does, its widths as the kernel's that it changes.
    """
    modules = module_shardings(model.config, state.modules, mesh)
    of = {}
    for tree, shardings in (
        (state.adapters, adapter_shardings(state.adapters, model, mesh)),
        ({"modules": state.modules}, {"modules": modules}),
    ):
        each = zip(trees.paths(tree), jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True)
        of |= {path: (leaf.shape, sharding) for path, leaf, sharding in each}

    def of_leaf(path, leaf):
        names = [str(k.key) for k in path if isinstance(k, jax.tree_util.DictKey)]
        if names[-1:] == [CHANGE]:
            _, of_B = of["/".join((*names[-4:-1], "B"))]
            layer, expert = (*of_B.spec, None, None)[:2]
            return NamedSharding(mesh, P(layer, expert, *_widths(model.config, names[-2])))
        for i in range(len(names)):
            shape, sharding = of.get("/".join(names[i:]), (None, None))
            if shape == leaf.shape:
                return sharding
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(of_leaf, state).replace(modules=modules)


def _widths(backbone, site: str) -> tuple:
    """The mesh axes of a kernel's `D_in, D_out`; none where the base has no such kernel (a chain's state)."""
    kernels = (leaf.specs[-1] for path, leaf in backbone.shapes().items() if path.endswith(f"/{site}/kernel"))
    return tuple(next(kernels, (None, None)))[-2:]


def module_shardings(backbone, modules, mesh: Mesh):
    """Of the collection `modules`: trained copies lie as the base leaves that they stand for, heads everywhere."""
    shardings = {name: jax.tree.map(lambda _: replicated(mesh), tree) for name, tree in modules.items()}
    return shardings | ({"base": param_shardings(backbone, modules["base"], mesh)} if "base" in modules else {})
