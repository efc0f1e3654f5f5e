"""From a form's name to the form, with an error that says why where there is none."""

import jax

from kernels_pallas.platform import is_split, platform_of


def pick(op: str, portable: dict, kernels: dict, name: str, *, refused: dict[str, str], platform: str | None):
    """The form called `name`: of those in plain XLA, or of the kernels, each named after its platform.

    Raises:
      ValueError: the op has no such form (`refused` says why, where there is a reason), or the kernel cannot run on
        the platform.
    """
    if name in kernels and platform_of(platform) != name:
        raise ValueError(
            f"{op}: implementation {name!r} is a kernel for that platform and this program is for "
            f"{platform_of(platform)}; use {', '.join(portable)}."
        )
    forms = {**portable, **kernels}
    if name not in forms:
        why = f" ({refused[name]})" if name in refused else ""
        raise ValueError(f"{op} has no implementation {name!r}{why}; it has {', '.join(forms)}.")
    return forms[name]


def no_kernel_because(tiles) -> str | None:
    """Why the TPU kernel cannot serve here, None where it can. `tiles()` raises ValueError where nothing fits."""
    mesh = jax.sharding.get_abstract_mesh()
    if is_split() or (mesh.empty and jax.device_count() > 1):
        return "the compiler spreads the rows over several chips, and only shard_map splits a kernel"
    try:
        tiles()
    except ValueError as error:
        return str(error)
    return None
