"""A mesh that does not fit: the axis at fault is named, and no other; a vocabulary fits on every mesh."""

import dataclasses
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from molora_jax import config as config_lib
from molora_jax import sharding
from molora_jax.backbones.model import Model
from molora_jax.config.checks import problems
from molora_jax.config.resolve import resolve_mesh
from molora_jax.errors import InputError
from molora_jax.io.random_init import random_params
from molora_jax.objectives.lm import lm
from tests.battery.cases import BATCH, SMALL, TARGETS_PER_ROW
from tests.tiny import tiny_config

PLAIN = dataclasses.replace(SMALL, tied=False, qkv_bias=True)
ONE = dict(data=1, fsdp=1, expert=1, tensor=1)


def named(error) -> set:
    return set(re.findall(r"mesh\.(\w+)", str(error)))


MESHES = [  # sizes, devices, rows, the axes to name
    (dict(data=-1, tensor=3), 8, None, "tensor"),
    (dict(data=-1, fsdp=3), 8, None, "fsdp"),
    (dict(data=-1, expert=16), 8, None, "expert"),
    (dict(data=1, tensor=3), 2, None, "tensor"),
    (dict(data=-1, fsdp=4, tensor=4), 8, None, "fsdp tensor"),  # each alone would do
    (dict(data=3, tensor=2), 8, None, "data"),
    (dict(data=1), 8, None, "data"),
    (dict(data=-1, fsdp=4, tensor=2), 8, 6, "fsdp"),
    (dict(data=-1, expert=4, tensor=2), 8, 6, "expert"),
    (dict(data=-1), 8, 6, "data"),
    (dict(data=2, fsdp=2, expert=2), 8, 4, "data fsdp expert"),
]


@pytest.mark.parametrize(("sizes", "devices", "rows", "axes"), MESHES, ids=str)
def test_devices_and_rows(sizes, devices, rows, axes):
    with pytest.raises(InputError) as caught:
        resolve_mesh(ONE | sizes, devices, rows=rows)
    assert named(caught.value) == set(axes.split())


@pytest.mark.parametrize("axis", ["data", "fsdp", "expert"])
def test_rows_before_the_devices_are_known(axis):
    config = config_lib.to_dict(tiny_config("lora"))
    config["mesh"] |= {axis: 3}
    (problem,) = problems(config)
    assert named(problem) == {axis}


def shapes(tied=True, **sizes):
    made = {
        "embed": (sizes.get("V", 16), sizes.get("D", 8)),
        "final_norm": (8,),
        "blocks": {
            "attn_norm": (2, 8),
            **{name: {"kernel": (2, sizes.get("D", 8), sizes.get(name, 8)), "bias": (2, sizes.get(name, 8))}
               for name in ("q", "k", "v")},
            "o": {"kernel": (2, sizes.get("q", 8), sizes.get("D", 8))},
            **{name: {"kernel": (2, sizes.get("D", 8), sizes.get("F", 8))} for name in ("gate", "up")},
            "down": {"kernel": (2, sizes.get("F", 8), sizes.get("D", 8))},
        },
    }  # fmt: skip
    made |= {} if tied else {"head": (sizes.get("D", 8), sizes.get("V", 16))}
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, jnp.float32), made, is_leaf=lambda v: isinstance(v, tuple))


def mesh_of(**sizes):
    return sharding.make_mesh(ONE | sizes)


@pytest.mark.parametrize("leaf", ["q", "k", "v", "F"])
def test_a_width_names_tensor(leaf):
    with pytest.raises(InputError) as caught:
        sharding.param_shardings(PLAIN, shapes(**{leaf: 9}), mesh_of(data=2, fsdp=2, tensor=2))
    assert caught.value.where == "mesh.tensor" and "of 9" in caught.value.got and "fsdp" not in str(caught.value)


def test_the_models_width_names_fsdp():
    with pytest.raises(InputError) as caught:
        sharding.param_shardings(PLAIN, shapes(D=9), mesh_of(data=2, fsdp=2, tensor=2))
    assert caught.value.where == "mesh.fsdp" and "tensor" not in str(caught.value)


@pytest.mark.parametrize("vocab", [16, 17, 18])
@pytest.mark.parametrize("sizes", [dict(data=4, tensor=2), dict(data=4, fsdp=2), dict(data=2, fsdp=2, tensor=2),
                                   dict(tensor=8), dict(data=8)], ids=str)  # fmt: skip
def test_a_table_is_split_whatever_the_vocabulary(vocab, sizes):
    mesh = mesh_of(**sizes)
    made = sharding.param_shardings(PLAIN, shapes(tied=False, V=vocab), mesh)
    split = sizes.get("fsdp", 1) * sizes.get("tensor", 1)
    for leaf, shape in ((made["embed"], (vocab, 8)), (made["head"], (8, vocab))):
        assert np.prod(leaf.shard_shape(shape)) * split == np.prod(shape), "each device holds its shard"


@pytest.mark.parametrize("sizes", [dict(data=4, tensor=2), dict(data=2, fsdp=2, tensor=2)], ids=str)
def test_a_vocabulary_that_nothing_divides_gives_the_numbers_of_one_device(sizes):
    decoder = dataclasses.replace(SMALL, vocab=129, tied=False)
    params = random_params(decoder)[0]
    params["embed"] *= 50  # of size 1, as the head is: a norm of small numbers makes rounding large
    params["head"] = np.random.default_rng(1).standard_normal((decoder.width, decoder.vocab)).astype(np.float32)
    model = Model(decoder, (), (), "dots", 3)

    def loss(tables, params, batch):
        params = params | tables
        hidden = model.hidden(params, {}, {}, batch)[0]
        return lm(model, params, hidden, batch, TARGETS_PER_ROW)

    def run(params, batch):
        tables = {name: params[name] for name in ("embed", "head")}
        return jax.device_get(jax.jit(jax.value_and_grad(loss))(tables, params, batch))

    mesh = mesh_of(**sizes)
    placed = sharding.put(params, sharding.param_shardings(decoder, params, mesh))
    many = run(placed, sharding.put_batch(BATCH, mesh, 8))
    one = run(params, BATCH)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), many, one)


def test_slices_are_whole_and_only_data_leads_across_them():
    def device(number, of_slice, process):
        return types.SimpleNamespace(id=number, slice_index=of_slice, process_index=process)

    of_slices = [device(i, i // 4, i // 2) for i in range(16)]
    assert [[d.id for d in part] for part in sharding._slices(of_slices, 2)] == [list(range(8)), list(range(8, 16))]
    of_processes = [device(i, 0, i // 4) for i in range(8)]
    assert [[d.id for d in part] for part in sharding._slices(of_processes, 2)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    for devices, count in ((of_slices, 3), (of_processes[:6], 2), (of_processes[:4], 2)):
        with pytest.raises(InputError, match="mesh.dcn"):
            sharding._slices(devices, count)
