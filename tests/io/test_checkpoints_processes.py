"""Two processes of four devices write one step; one process of eight reads it, and the other way round."""

import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from molora_jax.runs.checkpoints import Checkpoints, read_manifest

pytestmark = pytest.mark.slow

CHILD = """
import os, sys
sys.path.insert(0, {root!r})
folder, port, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{{port}}", 2, rank, initialization_timeout=600)
import numpy as np
from tests.io.test_checkpoints_processes import Checkpoints, items
assert jax.process_count() == 2 and jax.device_count() == 8
with Checkpoints(folder, keep=2) as checkpoints:
    template = items(0)
    assert checkpoints.newest_valid() == 1
    restored = checkpoints.restore(1, template)
    for x, y in zip(jax.tree.leaves(restored), jax.tree.leaves(items(1)), strict=True):
        x, y = (([np.asarray(s.data) for s in a.addressable_shards] if isinstance(a, jax.Array) else a) for a in (x, y))
        np.testing.assert_array_equal(x, y)
    for step in (2, 3):
        checkpoints.save(step, items(step), meta={{"samples": step}}, best=step == 2)
    assert checkpoints.wait() == [], checkpoints.failures
    jax.experimental.multihost_utils.sync_global_devices("saved")
    assert checkpoints.newest_valid() == 3
print("done", flush=True)
"""


def items(step):
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "expert"))
    value = np.random.default_rng(step).standard_normal((8, 4, 6)).astype(np.float32)

    def place(x, *spec):
        return jax.make_array_from_callback(x.shape, NamedSharding(mesh, PartitionSpec(*spec)), lambda i: x[i])

    tree = {"cut": place(value, "expert", "data"), "cut16": place(value.astype(jnp.bfloat16), None, "data")}
    return {"adapters": {**tree, "whole": place(value[0])}, "router_state": {}, "train": {"step": step}}


def test_two_processes_and_one(tmp_path):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, items(1), meta={}, wait=True)
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    command = [sys.executable, "-c", CHILD.format(root=os.getcwd()), str(tmp_path), str(port)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": env}
    children = [subprocess.Popen([*command, str(rank)], **pipes) for rank in (0, 1)]
    try:
        outputs = [child.communicate(timeout=600)[0] for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [0, 0], "\n".join(outputs)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.steps() == [2, 3] and checkpoints.best() == 2
        for step in (2, 3):
            restored = checkpoints.restore(step, items(0))  # digests summed by two are those found by one
            jax.tree.map(np.testing.assert_array_equal, restored, items(step))
            assert read_manifest(tmp_path / str(step))["samples"] == step
