"""GPUs that this machine does not have: described to XLA, which compiles for them while nothing runs.

What XLA reads of a GPU are the limits of its multiprocessors, its memory and its clock (`GpuTargetConfigProto`); the
figures are NVIDIA's, of the SXM boards. No driver and no toolkit: jax's plugin brings the compiler.
"""

import dataclasses
import functools
import importlib.util
import os
import sys

from jax.experimental import topologies

from molora_jax.errors import InputError

PLUGINS = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")
COMPILE = {"xla_gpu_autotune_level": 0}  # tuning would run kernels


@dataclasses.dataclass(frozen=True)
class Gpu:
    """Memory in bytes, `bandwidth` in bytes/s, shared memory in bytes of a multiprocessor; `capability` major only."""

    name: str
    capability: int
    multiprocessors: int
    fpus: int
    shared: int
    memory: int
    bandwidth: int
    l2: int
    clock_ghz: float


GPUS = {
    "a100": Gpu("NVIDIA A100-SXM4-80GB", 8, 108, 64, 164 << 10, 85_100_068_864, 2_039_040_000_000, 40 << 20, 1.41),
    "h100": Gpu("NVIDIA H100 80GB HBM3", 9, 132, 128, 228 << 10, 84_942_979_072, 3_352_320_000_000, 50 << 20, 1.98),
    "h200": Gpu("NVIDIA H200", 9, 132, 128, 228 << 10, 151_397_597_184, 4_800_000_000_000, 50 << 20, 1.98),
    "b200": Gpu("NVIDIA B200", 10, 148, 128, 228 << 10, 191_514_411_008, 7_672_320_000_000, 126 << 20, 1.965),
}
CONFIG = """
gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  shared_memory_per_block: 49152  shared_memory_per_block_optin: {optin}  shared_memory_per_core: {gpu.shared}
  core_count: {gpu.multiprocessors}  fpus_per_core: {gpu.fpus}  clock_rate_ghz: {gpu.clock_ghz}
  device_memory_size: {gpu.memory}  memory_bandwidth: {gpu.bandwidth}  l2_cache_size: {gpu.l2}
  cuda_compute_capability {{ major: {gpu.capability} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9  minor: 8 }}
runtime_version {{ major: 12  minor: 8 }}
device_description_str: "{gpu.name}"
"""


def devices(name: str, hosts: int, each: int):
    """The devices of `hosts` machines with `each` GPUs, in the order of hosts.

    The plugin is the one that is installed (extra `plan`), or lies in the folder MOLORA_CUDA_PLUGIN, where jax does not
    look for a GPU at every start.

    Raises:
      InputError: no plugin.
    """
    folder = os.environ.get("MOLORA_CUDA_PLUGIN")
    if folder and folder not in sys.path:
        sys.path.append(folder)
    plugin = next((name for name in PLUGINS if _there(name)), None)
    if plugin is None:
        raise InputError(
            "--topology", got=f"{name}, without the GPU's compiler", expected="jax's CUDA plugin (no GPU, no driver)",
            fix="pip install -e '.[plan]', or set MOLORA_CUDA_PLUGIN to a folder that it was installed in.",
        )  # fmt: skip
    gpu = GPUS[name]
    config = CONFIG.format(gpu=gpu, optin=gpu.shared - 1024)
    described = functools.partial(
        topologies.get_topology_desc, platform="cuda", target_config=config, topology=f"1x{hosts}x{each}"
    )
    try:
        return described().devices
    except NotImplementedError:  # jax looked for its plugins before this one could be found
        importlib.import_module(plugin).initialize()
        return described().devices


def _there(plugin: str) -> bool:
    try:
        return importlib.util.find_spec(plugin) is not None
    except ModuleNotFoundError:  # no plugins at all
        return False
