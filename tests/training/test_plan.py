"""The planner: what it says of a run on these eight devices is what the run has; what cannot be planned is named."""

import importlib
import json
import types

import jax
import numpy as np
import pytest

from launch import plan as launcher
from molora_jax import config as config_lib
from molora_jax import sharding
from molora_jax.backbones.hf_config import from_hf
from molora_jax.backbones.presets import PRESETS
from molora_jax.backbones.sizes import base_shapes
from molora_jax.core import trees
from molora_jax.errors import InputError
from molora_jax.io.base import load_base
from molora_jax.training import gpus
from molora_jax.training import plan as planning
from tests import gpu, tpu

GIB = 2**30


def config_of(name="mixlora", **changes):
    config = importlib.import_module(f"configs.{name}").get_config()
    config.base.source = "random:tiny"
    config.data.seq_len = 64
    for path, value in changes.items():
        group, field = path.split("__")
        config[group][field] = value
    config_lib.validate(config)
    return config


@pytest.fixture(scope="module")
def tiny():
    return load_base("random:tiny").config


def test_a_plan_of_these_devices(tiny):
    """Bytes of base, adapters and optimizer are those of the arrays; gradients are summed over `data`."""
    config = config_of(mesh__data=2, mesh__fsdp=4, train__batch_size=8)
    made = planning.plan(config, tiny, jax.devices(), "cpu", own_mesh=True, own_batch=True)
    assert made.fits and made.mesh == dict(data=2, fsdp=4, expert=1, tensor=1) and made.batch == 8
    base = load_base("random:tiny")
    mesh = sharding.make_mesh(made.mesh)
    params = sharding.put(base.params, sharding.param_shardings(base.config, base.params, mesh))
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(params))
    assert made.memory["base"] == held
    parts = sum(size for name, size in made.memory.items() if name != "total")
    assert made.memory["optimizer"] == pytest.approx(2 * made.memory["adapters"], rel=0.01), "two moments"
    assert parts <= made.memory["total"] * 1.01 and made.memory["temp"] > 0
    (sums,) = [c for c in made.collectives if c["kind"] == "all-reduce" and c["axis"] == "all"]
    assert sums["bytes"] >= made.memory["adapters"], "every gradient is summed over all devices"
    assert any(c["axis"] == "fsdp" for c in made.collectives), made.collectives
    assert made.roofline_s is None and "no figures" in made.bound
    assert "does not fit" not in launcher.words(made) and "mesh data=2 fsdp=4" in launcher.words(made)


def test_mesh_and_batch_are_chosen_from_the_fastest_to_the_smallest():
    backbone = from_hf(PRESETS["llama3-8b"], where="preset")
    assert trees.count(base_shapes(backbone)) == pytest.approx(8.03e9, rel=0.001)
    config = config_of(base__dtype="bfloat16", data__seq_len=2048)
    found = list(planning._candidates(config, backbone, [None] * 16, 16 * GIB, False, False))
    assert found[0] == (dict(data=4, fsdp=4, expert=1, tensor=1), 32), "16 GB over 4 are under 0.4 of 16 GiB"
    assert found[1][1] == 16 and found[2][0]["fsdp"] == 8 and len(found) == planning.TRIES
    own = config_of(mesh__data=2, mesh__fsdp=8, train__batch_size=16)
    assert list(planning._candidates(own, backbone, [None] * 16, 16 * GIB, True, True)) == [
        (dict(data=2, fsdp=8, expert=1, tensor=1), 16)
    ]


@pytest.mark.parametrize(
    "name, billions, active", [("qwen3-30b-a3b", 30.5, 8), ("llama3-8b", 8.03, None), ("smollm2", 0.1345, None)]
)
def test_presets_have_the_published_number_of_parameters(name, billions, active):
    backbone = from_hf(PRESETS[name], where="preset")
    assert trees.count(base_shapes(backbone)) == pytest.approx(billions * 1e9, rel=0.003)
    assert active is None or backbone.active == active


def test_a_plan_that_does_not_fit_says_what_would():
    memory = dict(base=20 * GIB, adapters=GIB, optimizer=2 * GIB, activations=0, temp=0, total=30 * GIB)
    made = planning.Plan(
        False, memory, [], 1.0, "replicate", "", None, "", dict(data=1, fsdp=4, expert=1, tensor=1), 4, 2048, "float32",
        4, "TPU v5e", 16 * GIB, 14 * GIB,
    )  # fmt: skip
    assert "split them 8 ways" in planning._advice(made, False, False)
    assert "bfloat16" in planning._advice(made, False, False)
    less = memory | dict(base=5 * GIB, adapters=0, optimizer=0)
    rows = planning.dataclasses.replace(made, memory=less, batch=16)
    assert "4 rows a device" in planning._advice(rows, True, True)


def test_what_a_compiler_asked_for_is_read_from_its_message():
    text = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 23.45G of 15.75G hbm. Exceeded hbm."
    assert planning._asked_for(text) == (None, int(23.45 * GIB))
    text = "the total memory required for HLO temporaries (19.24G) exceeds available HBM (15.75G)."
    assert planning._asked_for(text) == (int(19.24 * GIB), None)
    assert planning._asked_for("another error") == (None, None)


def test_groups_of_devices_are_named_by_axis():
    mesh = types.SimpleNamespace(shape=dict(data=2, fsdp=4, expert=1, tensor=4), size=32)
    assert planning._axis(2, mesh) == "data" and planning._axis(4, mesh) == "fsdp or tensor"
    assert planning._axis(8, mesh) == "data+fsdp or data+tensor" and planning._axis(32, mesh) == "all"


def hosts(data, fsdp, of_a_host):
    """A mesh of GPUs, so many of them on each host."""
    devices = np.array([types.SimpleNamespace(process_index=i // of_a_host) for i in range(data * fsdp)])
    shape = dict(data=data, fsdp=fsdp, expert=1, tensor=1)
    return types.SimpleNamespace(
        shape=shape, size=data * fsdp, axis_names=tuple(shape), devices=devices.reshape(tuple(shape.values()))
    )


def test_groups_that_span_hosts_of_gpus_share_the_network():
    """Two hosts of four: `fsdp` stays inside one; pairs over `data` have a link each, and all eight share four."""
    chip, mesh = planning.CHIPS["h100"], hosts(2, 4, of_a_host=4)
    seconds = lambda axis, mesh=mesh: planning._seconds(dict(bytes=1e9, axis=axis), mesh, chip)  # noqa: E731
    assert seconds("fsdp") == pytest.approx(1e9 / 450e9)
    assert seconds("data") == pytest.approx(1e9 / 50e9)
    assert seconds("all") == seconds("data+fsdp") == pytest.approx(1e9 / 4 / 50e9)
    assert seconds("data or fsdp") == seconds("data") and seconds("part of an axis") == seconds("fsdp")
    assert seconds("all", hosts(2, 4, of_a_host=8)) == seconds("fsdp"), "one host"
    tpus = planning._seconds(dict(bytes=1e9, axis="all"), mesh, planning.CHIPS["v5e"])
    assert tpus == pytest.approx(1e9 / 200e9), "the links of a slice lead everywhere"


def test_the_command_line_knows_the_chips():
    assert {*launcher.TPUS, *launcher.GPUS, "cpu"} == set(planning.CHIPS) and set(launcher.GPUS) == set(gpus.GPUS)


def test_what_a_run_gets_of_a_gpu_is_what_jax_takes(monkeypatch):
    monkeypatch.delenv(planning.FRACTION, raising=False)
    chip = planning.CHIPS["h200"]
    assert chip.usable == 0.75 * chip.memory and planning.CHIPS["v5e"].usable == planning.USABLE * 16 * GIB
    monkeypatch.setenv(planning.FRACTION, "0.9")
    assert chip.usable == pytest.approx(0.9 * chip.memory) and planning.CHIPS["cpu"].usable is None


@pytest.mark.parametrize(
    "text", ["v5p", "v7:2x2", "cpu:0", "cpu:2x2", "h100", "h100:2x2x2", "h100:0", "v100:8", "v5e:", "v5e:2x", ""]
)
def test_a_topology_that_does_not_exist_is_named(text, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    with pytest.raises(InputError, match="--topology"):
        launcher.topology(text)


def test_a_base_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(InputError, match="llama3-8b"):
        launcher.backbone(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(PRESETS["smollm2"]))
    assert launcher.backbone(str(tmp_path)) == launcher.backbone("smollm2")


def test_a_mesh_that_does_not_fit_the_devices_is_named_before_compiling(tiny):
    with pytest.raises(InputError, match="mesh"):
        planning.plan(config_of(mesh__fsdp=3), tiny, jax.devices(), "cpu", own_mesh=True, own_batch=True)


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v5e", "v6e", "a100", "h100", "h200", "b200"])
def test_a_plan_of_chips_that_are_not_there(chip, tiny, without_cache):
    devices = gpu.devices(chip) if chip in launcher.GPUS else tpu.devices(chip)
    made = planning.plan(config_of(), tiny, devices, chip, own_mesh=False, own_batch=False)
    assert made.fits and made.devices == len(devices) == 8 and made.limit > made.usable
    assert made.roofline_s > 0 and made.bound.startswith(("compute", "memory", "collectives"))
    assert np.isfinite(made.roofline_s)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [dict(data=2, fsdp=4), dict(data=4, expert=2), dict(fsdp=2, tensor=4)])
def test_gpus_hold_and_send_what_eight_cpus_do(mesh, tiny, without_cache):
    """One program for both: bytes of the leaves are equal; what is sent differs by what a compiler joins or casts."""
    config = config_of(train__batch_size=8, **{f"mesh__{axis}": size for axis, size in mesh.items()})
    ways = dict(cpu=jax.devices(), h100=gpu.devices("h100", 2, 4))
    found = {
        chip: planning.plan(config, tiny, on, chip, own_mesh=True, own_batch=True) for chip, on in ways.items()
    }  # fmt: skip
    ours, theirs = found["cpu"], found["h100"]
    for part in ("base", "adapters", "optimizer"):
        assert theirs.memory[part] == ours.memory[part]
    sent = lambda made: sum(c["bytes"] for c in made.collectives)  # noqa: E731
    assert theirs.engine == ours.engine
    assert 0.4 < sent(theirs) / sent(ours) < 1.6, (theirs.collectives, ours.collectives)
