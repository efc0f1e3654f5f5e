"""Chips that this machine does not have: described topologies, for which the TPU compiler compiles and nothing runs.

Needs libtpu: `./launch/test.sh --all` fetches it; else `pip install -e '.[tpu]'`, or TPU_LIBRARY_PATH at a libtpu.so.
"""

import importlib.util
import os

import pytest
from jax.experimental import topologies

TOPOLOGIES = {"v5e": "v5e:2x4", "v6e": "v6e:2x4", "v5p": "v5p:2x2x1", "tpu7x": "tpu7x:2x2x1"}


def devices(chip: str):
    """The devices of a topology of `chip`. Without libtpu the test fails and says so."""
    if "TPU_LIBRARY_PATH" not in os.environ and importlib.util.find_spec("libtpu") is None:
        pytest.fail("libtpu is not installed: pip install -e '.[tpu]', or set TPU_LIBRARY_PATH.", pytrace=False)
    os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    return topologies.get_topology_desc(TOPOLOGIES[chip], platform="tpu").devices
