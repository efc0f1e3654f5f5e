"""A run on a quantised base: no dense stack in its step, equal on any mesh, resumed, opened, merged, refused."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from configs import common
from molora_jax import config as config_lib
from molora_jax import load_run, sharding
from molora_jax.backbones.compile import compile_model
from molora_jax.backbones.sizes import base_shapes
from molora_jax.core import quant, trees
from molora_jax.engines import Engine
from molora_jax.errors import InputError
from molora_jax.io import base as base_io
from molora_jax.io.base import load_base
from molora_jax.runs.opened import open_run
from molora_jax.surgery.base import Parent
from molora_jax.surgery.merge_into_base import MergeIntoBase
from molora_jax.training.loop import train
from tests.tiny import write_task

LLAMA = "q,k,v,o,gate,up,down"
ROWS, LENGTH = 8, 12  # 96 tokens: no width of a kernel


def config_of(form, source="random:tiny", rules=None):
    config = common.get_config()
    config.base.update(source=source, quant=form)
    adapter = common.adapter(rank=2, alpha=4.0, dropout=0.0)
    config.method.rules = rules or dict(all=common.rule(LLAMA, adapter=adapter, router=None, experts="1"))
    return config


ON_EXPERTS = dict(
    moe=common.rule(
        "ffn", adapter=common.adapter(rank=2, dropout=0.0), router=None, experts="1",
        placement=dict(name="base_experts", factors="own"),
    ),
    attn=common.rule(
        "q,v,o", adapter=common.adapter("dora", rank=2, dropout=0.0, init="pissa"), router=None, experts="1"
    ),
)  # fmt: skip
FIRST = ("nf4", "dense")
CASES = {"dense": ("random:tiny", None), "experts": ("random:tiny-moe", ON_EXPERTS)}


def step_of(form, case, sizes=None, dense=False):
    """`(gradient function, adapters, params)` of a case on a mesh; `dense`: on the values that the codes say."""
    source, rules = CASES[case]
    config = config_of(form, source, rules)
    config_lib.validate(config)
    base = load_base(source, quant=form)
    model = compile_model(config, base.config)
    params = base.params
    if dense:
        params = jax.tree.map(lambda w: np.asarray(quant.dense(w)), params, is_leaf=quant.is_quantised)
    adapters = jax.jit(lambda p: model.init_adapters(jax.random.key(0), p))(params)
    adapters = jax.tree.map(lambda a: np.asarray(a) + 0.05 * np.cos(np.arange(a.size)).reshape(a.shape), adapters)
    constrain = lambda x: x  # noqa: E731
    if sizes is not None:
        mesh = sharding.local_mesh(sizes)
        model = dataclasses.replace(model, engine=Engine("replicate", mesh))
        constrain = sharding.constrain(mesh)
        params = sharding.put(params, sharding.param_shardings(base.config, params, mesh))
        adapters = sharding.put(adapters, sharding.replicated(mesh))
    tokens = np.random.default_rng(0).integers(0, base.config.vocab, (ROWS, LENGTH)).astype(np.int32)
    at = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape)
    batch = {"tokens": tokens, "segment_ids": np.ones_like(tokens), "positions": at}

    def loss(adapters, params):
        hidden = model.hidden(
            params, adapters, model.init_router_state(), batch, train=True, key=jax.random.key(1), constrain=constrain
        )[0]
        return jnp.mean(hidden * jnp.cos(jnp.arange(hidden.size).reshape(hidden.shape)))

    return jax.jit(jax.value_and_grad(loss)), adapters, params


def dense_stacks(params) -> set:
    """Shapes of whole dense stacks, of all layers or (of experts) of a layer."""
    found = set()
    for W in jax.tree.leaves(params, is_leaf=quant.is_quantised):
        if quant.is_quantised(W):
            found.add(W.shape)
            if len(W.shape) == 4:
                found.add(W.shape[1:])
    return found


@pytest.mark.parametrize(
    ("form", "case"),
    [
        pytest.param(form, case, marks=() if (form, case) == FIRST else pytest.mark.slow)
        for form in quant.FORMS
        for case in CASES
    ],
)
def test_no_kernel_stays_in_16_bits_and_no_stack_is_dense_in_the_step(form, case):
    gradient, adapters, params = step_of(form, case)
    kept = {path for path, W in flatten_dict(params, sep="/").items() if not quant.is_quantised(W)}
    assert not any(
        re.search(r"(/[qkvo]|/gate|/up|/down|/shared/\w+)/kernel$|/experts/(gate|up|down)$", p) for p in kept
    )
    for W in jax.tree.leaves(params, is_leaf=quant.is_quantised):
        if quant.is_quantised(W):
            own = (a for name, a in W.arrays.items() if name in ("codes", "absmax"))
            assert all(a.dtype.itemsize == 1 for a in own) and W.nbytes == quant.num_bytes(W.shape, form)
    text = gradient.lower(adapters, params).compile().as_text()
    arrays = {tuple(map(int, dims.split(","))) for dims in re.findall(r"\bf(?:32|16)\[([\d,]+)\]", text)}
    assert arrays & dense_stacks(params) == set()
    dense, _, values = step_of(form, case, dense=True)
    ours, theirs = gradient(adapters, params), dense(adapters, values)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6)


MESHES = {
    "dense": [dict(fsdp=8), dict(fsdp=2, tensor=4)],
    "experts": [dict(expert=4, tensor=2), dict(fsdp=4, expert=2)],
}


@pytest.mark.slow
@pytest.mark.parametrize(("case", "sizes"), [(case, sizes) for case in MESHES for sizes in MESHES[case]], ids=str)
def test_equal_on_one_and_on_eight_devices(case, sizes):
    one, eight = (jax.tree.leaves(f(a, p)) for f, a, p in (step_of("nf4", case, s) for s in (None, sizes)))
    for a, b in zip(one, eight, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)


def test_scales_and_codes_lie_in_the_same_shards():
    config = dataclasses.replace(load_base("random:tiny").config, width=1024)
    shapes = base_shapes(config, np.float32, "nf4")
    q = sharding.param_shardings(config, shapes, sharding.local_mesh(dict(fsdp=8)))["blocks"]["q"]["kernel"].arrays
    own = shapes["blocks"]["q"]["kernel"].arrays
    assert q["codes"].shard_shape(own["codes"].shape)[1] * 2 == 64 * q["absmax"].shard_shape(own["absmax"].shape)[1]
    assert q["mean"].is_fully_replicated and q["step"].is_fully_replicated


@pytest.mark.slow
def test_a_run_trains_resumes_is_opened_and_merged(tmp_path):
    config = config_of("nf4")
    config.data.update(tasks=f"jsonl:{write_task(tmp_path / 'task.jsonl', 40)}", seq_len=32)
    config.train.update(steps=2, batch_size=8, save_every=1, stop_after=1)
    notes = []
    train(config, str(tmp_path / "run"), note=notes.append)
    table = next(note for note in notes if "bytes of a kernel" in note)
    assert quant.FORMULAS["nf4"] in table
    total = next(line for line in table.splitlines() if line.startswith("total")).split()
    own = trees.num_bytes(base_shapes(load_base("random:tiny").config, np.float32, "nf4"))
    assert int(total[1].replace(",", "")) == own
    with config.unlocked():
        config.train.stop_after = 0
        config.base.quant = "none"
    with pytest.raises(InputError, match='base.quant: was "nf4", now "none"'):
        train(config, str(tmp_path / "run"), note=notes.append)
    config.base.quant = "nf4"
    assert train(config, str(tmp_path / "run"), note=notes.append).step == 2
    opened = open_run(tmp_path / "run", "latest", warn=str)
    assert quant.is_quantised(opened.base.params["blocks"]["q"]["kernel"])
    assert isinstance(load_run(tmp_path / "run", "latest").generate("Double 3", max_new_tokens=2), str)
    result = MergeIntoBase().apply((Parent("run", opened),))
    tokens = np.array([[1, 2, 3, 4, 5]])
    batch = {"tokens": tokens, "segment_ids": np.ones_like(tokens), "positions": np.arange(5)[None]}
    adapted = opened.model.hidden(opened.base.params, opened.items["adapters"], {}, batch)[0]
    merged = opened.model.without_rules().hidden(result.base.params, {}, {}, batch)[0]
    np.testing.assert_allclose(adapted, merged, atol=1e-5)
    assert not any(map(quant.is_quantised, jax.tree.leaves(result.base.params, is_leaf=quant.is_quantised)))


def test_what_trains_kernels_is_refused():
    config = config_of("int8")
    config.method.rules, config.method.train_base = {}, "all"
    with pytest.raises(InputError, match="codes of a kernel have no gradient"):
        config_lib.validate(config)
    config.base.quant = "int4"
    with pytest.raises(InputError, match=r"base\.quant"):
        config_lib.validate(config)


def test_a_folder_is_quantised_once_and_checked(tmp_path, monkeypatch):
    from molora_jax.io import huggingface

    monkeypatch.setenv("MOLORA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "m").mkdir()
    huggingface.write_base(tmp_path / "m", load_base("random:tiny-moe"))
    first = load_base(f"dir:{tmp_path / 'm'}", quant="nf4")
    monkeypatch.setattr(huggingface, "quantised", None)  # from the cache
    again = load_base(f"dir:{tmp_path / 'm'}", quant="nf4")
    assert first.digest == again.digest
    jax.tree.map(np.testing.assert_array_equal, first.params, again.params)
    drawn = load_base("random:tiny-moe", quant="nf4").params
    jax.tree.map(np.testing.assert_array_equal, first.params, drawn)
    (weights,) = (tmp_path / "cache" / "converted").glob(f"*-float32-nf4-{base_io._QUANT_FORMAT}-*/model.safetensors")
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    with pytest.raises(InputError, match="cache is damaged"):
        load_base(f"dir:{tmp_path / 'm'}", quant="nf4")
