"""The platform that an op is traced for."""

import jax


def platform_of(platform: str | None = None) -> str:
    """`cpu`, `gpu` or `tpu`: the argument, else the mesh in context (`jax.set_mesh`), else the default backend.

    Never `jax.devices()`: a program may be compiled for devices that this machine does not have.
    """
    if platform is not None:
        return {"cuda": "gpu", "rocm": "gpu"}.get(platform, platform)
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if device is None:
        return jax.default_backend()
    kind = f"{getattr(device, 'platform', '')} {device.device_kind}".lower()
    return "tpu" if "tpu" in kind else "cpu" if "cpu" in kind else "gpu"
