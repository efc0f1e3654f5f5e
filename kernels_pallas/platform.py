"""The device that an op is traced for.

Never `jax.devices()`: a program may be compiled for devices that this machine does not have.
"""

import contextlib
import contextvars
import importlib.metadata
import importlib.util

import jax

PLATFORMS = {"cpu": "cpu", "gpu": "gpu", "cuda": "gpu", "rocm": "gpu", "tpu": "tpu"}


def device_kind_of() -> str | None:
    """The device kind of the mesh in context (`jax.set_mesh`), None without one."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return None if device is None else device.device_kind


def platform_of(platform: str | None = None) -> str:
    """`cpu`, `gpu` or `tpu`: the argument, else the mesh in context (`jax.set_mesh`), else the default backend.

    Raises:
      ValueError: the argument is another name.
    """
    if platform is not None:
        if platform not in PLATFORMS:
            raise ValueError(f"platform {platform!r} is not known, expected one of {', '.join(PLATFORMS)}.")
        return PLATFORMS[platform]
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if device is None:
        return jax.default_backend()
    kind = f"{getattr(device, 'platform', '')} {device.device_kind}".lower()
    return "tpu" if "tpu" in kind else "cpu" if "cpu" in kind else "gpu"


def may_accelerate() -> bool:
    """Whether jax may find an accelerator, without starting a backend: its plugin is installed and not shut out."""
    if jax.config.jax_platforms == "cpu":
        return False
    return bool(importlib.metadata.entry_points(group="jax_plugins")) or importlib.util.find_spec("libtpu") is not None


_SIDE_BY_SIDE = contextvars.ContextVar("side_by_side", default=False)


@contextlib.contextmanager
def side_by_side():
    """What is traced in here is batched over an axis of runs (`jax.vmap`): a loop over tiles, whose length is each
    run's own, is then made of one run after the other (`tiles.one_by_one`); no Pallas kernel is taken."""
    token = _SIDE_BY_SIDE.set(True)
    try:
        yield
    finally:
        _SIDE_BY_SIDE.reset(token)


def is_side_by_side() -> bool:
    return _SIDE_BY_SIDE.get()


def is_split() -> bool:
    """True where the compiler spreads arrays over the mesh in context: rows are then not this device's own.

    Inside `shard_map` every axis is manual and rows are local.
    """
    mesh = jax.sharding.get_abstract_mesh()
    manual = set(getattr(mesh, "manual_axes", ()))
    return any(size > 1 for name, size in dict(mesh.shape).items() if name not in manual)
