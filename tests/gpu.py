"""GPUs that this machine does not have: XLA compiles for them, nothing runs.

Needs jax's CUDA plugin: `./launch/test.sh --all` fetches it; else `pip install -e '.[plan]'`, or MOLORA_CUDA_PLUGIN.
"""

import pytest

from molora_jax.errors import InputError
from molora_jax.training import gpus


def devices(chip: str, hosts: int = 1, each: int = 8):
    """Of `hosts` machines. Without the plugin the test fails and says so."""
    try:
        return gpus.devices(chip, hosts, each)
    except InputError as error:
        pytest.fail(str(error), pytrace=False)
