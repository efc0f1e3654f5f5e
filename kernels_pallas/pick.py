"""From a form's name to the form, with an error that says why where there is none."""

import jax

from kernels_pallas.platform import is_split, platform_of


def pick(op: str, portable: dict, kernels: dict, name: str, *, refused: dict[str, str], platform, no_kernel):
    """The form called `name`: of those in plain XLA, or of the kernels, each named after its platform.

    `platform` is what the caller chose for, None for that of the program. `no_kernel()` says why a kernel cannot serve
    these shapes here, None where it can.

    Raises:
      ValueError: the op has no such form (`refused` says why, where there is a reason); the kernel is not for
        `platform`, or not for that of the program; the kernel cannot serve here; `platform` is not known.
    """
    chosen_for = platform_of(platform)
    if name in kernels:
        for other in (chosen_for, platform_of()):
            if other != name:
                raise ValueError(
                    f"{op}: implementation {name!r} is a kernel for that platform and this program is for {other}; "
                    f"use {', '.join(portable)}, or set the mesh to compile for (jax.set_mesh)."
                )
        why = no_kernel()
        if why:
            raise ValueError(
                f"{op}: implementation {name!r} cannot serve here: {why.rstrip('.')}. Use {', '.join(portable)}."
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
