"""A base of state-space blocks: its recurrence, packed examples, the cache, adapters at its projections, meshes.

Logits and gradients against transformers: `test_others.py`.
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import molora_jax
from configs import common
from molora_jax import config as schema
from molora_jax import sharding
from molora_jax.backbones import hf_config, mamba
from molora_jax.backbones.compile import compile_model
from molora_jax.backbones.families import TINY, TINY_MAMBA
from molora_jax.config.fields import SSM
from molora_jax.core import trees
from molora_jax.decode import generate as decoding
from molora_jax.errors import InputError
from molora_jax.io.base import load_base
from molora_jax.io.random_init import random_params
from molora_jax.surgery.perform import perform
from molora_jax.training.loop import train
from tests.battery.cases import Case, random_adapters
from tests.battery.checks import same_step
from tests.engines.problems import mesh
from tests.surgery import make
from tests.tiny import write_task

SMALL = dataclasses.replace(TINY_MAMBA, layers=2, width=32, inner=64, state=6, rank=3, vocab=128)
E, S = 4, 12
ALL = ",".join(SSM)


def rules(sites=ALL, router=True, share="attn", experts=E, **adapter):
    adapter = common.adapter(**dict(rank=3, alpha=6.0, dropout=0.0) | adapter)
    if not router:
        return dict(mix=common.rule(sites, adapter=adapter))
    soft = dict(name="soft_topk", k=2, hard="never", share=share)
    return dict(mix=common.rule(sites, experts=str(experts), adapter=adapter, router=soft))


def config_of(made=None, **fields):
    config = common.get_config()
    config.base.source = "random:tiny-mamba"
    config.method.rules = made or rules()
    for group, values in fields.items():
        config[group].update(values)
    schema.validate(config)
    return config


def built(made=None, decoder=SMALL, seed=3):
    config = config_of(made)
    schema.check_model(config, decoder.layers, decoder.dims, decoder.ABSENT)
    model, params = compile_model(config, decoder, max_segments=3), base(decoder)
    return model, params, random_adapters(model, params, seed=seed)


@functools.cache
def base(decoder=SMALL):
    params = random_params(decoder, seed=1)[0]
    params["embed"] = params["embed"] * 10
    return jax.tree.map(jnp.asarray, params)


def packed(rows=2):
    """Two examples a row and padding: 5, 4 and 3 positions; 2, 9 and 1 in the second."""
    rng = np.random.default_rng(0)
    lengths = [(5, 4), (2, 9)] * (rows // 2)
    ids = np.array([[1] * a + [2] * b + [0] * (S - a - b) for a, b in lengths], np.int32)
    at = np.array([[*range(a), *range(b), *[0] * (S - a - b)] for a, b in lengths], np.int32)
    return dict(tokens=rng.integers(1, SMALL.vocab, ids.shape).astype(np.int32), segment_ids=ids, positions=at)


@functools.partial(jax.jit, static_argnames=("model", "train"))
def hidden(model, params, adapters, batch, train=False):
    with jax.default_matmul_precision("highest"):
        return model.hidden(params, adapters, {}, batch, train=train, key=jax.random.key(0) if train else None)[0]


# ---- the recurrence --------------------------------------------------------------------------------------------------


def sigmoid(xp, x):
    return 1 / (1 + xp.exp(-x))


def naive(xp, model, params, adapters, batch):
    """The decoder as the papers write it: token by token, every expert a weight of its own. Values `[B, S, D]`."""
    c, (rule,) = model.config, model.rules or (None,)
    ids, rows = batch["segment_ids"], len(batch["tokens"])
    rms = lambda x, w: x / xp.sqrt(xp.mean(x * x, axis=-1, keepdims=True) + c.norm_eps) * w  # noqa: E731
    x = params["embed"][batch["tokens"]]
    for layer in range(c.layers):
        p = jax.tree.map(lambda w, i=layer: w[i], params["blocks"])
        own = jax.tree.map(lambda w, i=layer: w[i], adapters["mix"]["000-001"]) if adapters else {}
        h = rms(x, p["norm"])

        def project(site, y, own=own, p=p, h=h):
            out = y @ p[site]["kernel"]
            if site in own:
                if rule.router is None:
                    gates = xp.ones((*y.shape[:2], 1))
                else:
                    read, scope = (y, site) if rule.router.share == "site" else (h, "attn")
                    z = xp.einsum("bsd,ed->bse", read, own["router"][scope]["W"])
                    gates = xp.exp(z) / xp.sum(xp.exp(z), axis=-1, keepdims=True)
                weights = rule.adapter.scale() * xp.einsum("erd,ero->edo", own[site]["A"], own[site]["B"])
                out = out + xp.einsum("bse,bsd,edo->bso", gates, y, weights)
            return out + p[site]["bias"] if "bias" in p[site] else out

        uz = project("in_proj", h)
        v, z = uz[..., : c.inner], uz[..., c.inner :]
        u = []
        for t in range(ids.shape[1]):
            total = p["conv"]["bias"] + xp.zeros((rows, 1))
            for back in range(min(t + 1, c.taps)):
                same = (ids[:, t - back] == ids[:, t])[:, None]
                total = total + xp.where(same, v[:, t - back], 0.0) * p["conv"]["kernel"][:, 0, c.taps - 1 - back]
            u.append(total * sigmoid(xp, total))
        u = xp.stack(u, axis=1)
        low = project("x_proj", u)
        r, B, C = low[..., : c.rank], low[..., c.rank : c.rank + c.state], low[..., c.rank + c.state :]
        dt, A = xp.log(1 + xp.exp(project("dt_proj", r))), -xp.exp(p["A_log"])
        state, y = xp.zeros((rows, c.inner, c.state)), []
        for t in range(ids.shape[1]):
            state = xp.where((ids[:, t] == ids[:, t - 1])[:, None, None] if t else False, state, 0.0)
            state = xp.exp(dt[:, t, :, None] * A) * state + (dt[:, t] * u[:, t])[..., None] * B[:, t, None]
            y.append(xp.einsum("bin,bn->bi", state, C[:, t]) + p["skip"] * u[:, t])
        x = x + project("out_proj", xp.stack(y, axis=1) * z * sigmoid(xp, z))
    return rms(x, params["final_norm"])


def as_float64(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


@pytest.mark.parametrize(
    "made", [rules(), pytest.param(rules("in_proj,out_proj", share="site"), marks=pytest.mark.slow),
             pytest.param(rules(router=False), marks=pytest.mark.slow)], ids=["attn", "site", "lora"],
)  # fmt: skip
def test_values_and_gradients_of_adapters_are_those_of_a_loop_over_tokens(made):
    """Every projection, the fused in_proj whole; the gradient of every leaf by autodiff of the loop."""
    model, params, adapters = built(made)
    batch, keep = packed(), packed()["segment_ids"] > 0
    wanted = naive(np, model, as_float64(params), as_float64(adapters), batch)
    np.testing.assert_allclose(hidden(model, params, adapters, batch)[keep], wanted[keep], rtol=2e-5, atol=2e-5)
    batch = {name: values[:, 4:] for name, values in batch.items()}  # the loop compiles every token by itself
    keep = keep[:, 4:]
    assert (keep.sum(1) > model.config.taps).any() and not keep.all()
    weight = np.random.default_rng(1).standard_normal(wanted[:, 4:].shape).astype(np.float32) * keep[..., None]
    ours = jax.jit(jax.grad(lambda a: jnp.sum(hidden(model, params, a, batch, train=True) * weight)))(adapters)
    with jax.default_matmul_precision("highest"):
        loop = jax.jit(jax.grad(lambda a: jnp.sum(naive(jnp, model, params, a, batch) * weight)))(adapters)
    paths = dict(zip(trees.paths(ours), jax.tree.leaves(ours), strict=True))
    assert all(any(f"/{site}/" in path for path in paths) for site in made["mix"]["sites"].split(","))
    for (path, g), other in zip(paths.items(), jax.tree.leaves(loop), strict=True):
        assert np.abs(other).max() > 0, path
        np.testing.assert_allclose(g, other, rtol=2e-4, atol=2e-5 * np.abs(other).max(), err_msg=path)


@pytest.mark.parametrize("length", [1, 15, 16, 40])
def test_the_scan_is_the_recurrence_whatever_its_chunks(length):
    rng, rows, inner, N = np.random.default_rng(length), 2, 3, 4
    normal = lambda *shape: rng.standard_normal(shape)  # noqa: E731
    u, dt, A_log, B, C = (normal(rows, length, inner), np.abs(normal(rows, length, inner)), normal(inner, N),
                          normal(rows, length, N), normal(rows, length, N))  # fmt: skip
    begins, state = rng.random((rows, length)) < 0.1, normal(rows, inner, N)
    got = mamba.scanned(*(jnp.asarray(x, jnp.float32) for x in (u, dt, A_log, B, C)), jnp.asarray(begins),
                        jnp.asarray(state, jnp.float32))  # fmt: skip
    y = []
    for t in range(length):
        state = np.where(begins[:, t, None, None], 0, state)
        state = np.exp(-dt[:, t, :, None] * np.exp(A_log)) * state + (dt[:, t] * u[:, t])[..., None] * B[:, t, None]
        y.append(np.einsum("bin,bn->bi", state, C[:, t]))
    np.testing.assert_allclose(got[0], np.stack(y, axis=1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got[1], state, rtol=1e-4, atol=1e-5)


# ---- packed examples -------------------------------------------------------------------------------------------------


def test_packed_examples_are_what_each_is_alone():
    model, params, adapters = built()
    batch = packed()
    whole = np.asarray(hidden(model, params, adapters, batch))
    for row, ids in enumerate(batch["segment_ids"]):
        for segment in (1, 2):
            at = np.flatnonzero(ids == segment)
            alone = {name: np.zeros((1, S), np.int32) for name in batch}
            for name, values in batch.items():
                alone[name][0, : len(at)] = values[row, at] if name != "segment_ids" else 1
            got = np.asarray(hidden(model, params, adapters, alone))[0, : len(at)]
            np.testing.assert_allclose(whole[row, at], got, rtol=1e-5, atol=1e-5)


def test_neither_another_example_nor_padding_reaches_one():
    model, params, adapters = built()
    batch = packed()
    other = batch["tokens"].copy()
    other[batch["segment_ids"] != 2] = 77
    before, after = (
        np.asarray(hidden(model, params, adapters, batch | {"tokens": t})) for t in (batch["tokens"], other)
    )
    second = batch["segment_ids"] == 2
    np.testing.assert_array_equal(before[second], after[second])
    worst = params | {"embed": params["embed"].at[99].set(np.nan)}
    nowhere = np.where(batch["segment_ids"] == 0, 99, batch["tokens"])
    got = np.asarray(hidden(model, worst, adapters, batch | {"tokens": nowhere}))
    np.testing.assert_array_equal(got[batch["segment_ids"] > 0], before[batch["segment_ids"] > 0])
    assert np.abs(before - after)[batch["segment_ids"] == 1].max() > 0.1
    later = batch["tokens"].copy()
    later[:, 8:] = 5
    changed = np.asarray(hidden(model, params, adapters, batch | {"tokens": later}))
    np.testing.assert_array_equal(before[:, :8], changed[:, :8], err_msg="nothing sees what comes")


# ---- the cache -------------------------------------------------------------------------------------------------------

PROMPTS = [[5], [9, 11, 6], [20, 3, 41, 40, 7, 8, 2], list(range(1, 36))]  # shorter than the convolution, and longer


@pytest.mark.parametrize("router", ["soft_topk", pytest.param("x_lora", marks=pytest.mark.slow)])
def test_cached_decoding_equals_uncached(router):
    made = rules()
    if router == "x_lora":  # a second pass with a cache of its own
        made["mix"]["router"] = dict(name="x_lora", share="site")
    model, params, adapters = built(made, dataclasses.replace(SMALL, tied=False))  # a tied one repeats its last token
    tokens, lengths, limits, keys = decoding.pad(PROMPTS, 9, 512, 0, rows=4)
    found = {}
    for cache in (True, False):
        found[cache] = jax.device_get(
            decoding.decode(params, adapters, {}, tokens, lengths, limits, keys, np.float32(0), decoding.end_ids(None),
                            model=model, size=29, sample=False, cache=cache, keep_logits=True)
        )  # fmt: skip
    np.testing.assert_array_equal(found[True][0], found[False][0])
    np.testing.assert_allclose(found[True][2][:, :9], found[False][2][:, :9], rtol=1e-4, atol=1e-4)
    assert len(np.unique(found[True][0][:, :9])) > 4, "the answers say something"


def test_a_cache_does_not_grow_with_the_text():
    model = built()[0]
    short, long = (model.init_cache(3, slots, jnp.bfloat16)["own"] for slots in (8, 4096))
    assert [x.shape for x in short] == [x.shape for x in long] == [(2, 3, 3, 64), (2, 3, 64, 6)]
    assert [x.dtype for x in short] == [jnp.bfloat16, jnp.float32]


# ---- meshes ----------------------------------------------------------------------------------------------------------

EIGHT = {
    "fsdp": (dict(data=4, fsdp=2), "replicate"), "tensor": (dict(data=2, fsdp=2, tensor=2), "replicate"),
    "gather": (dict(data=2, expert=4), "gather"), "all_to_all": (dict(expert=4, tensor=2), "all_to_all"),
}  # fmt: skip


def trained(made, **options):
    config = config_of(made, optim=dict(warmup=0))
    if "router" in made["mix"]:
        config.losses = dict(specialisation=dict(weight=0.1))
    return Case(config, SMALL, **options)


@functools.cache
def on_one(sites=ALL):
    case = trained(rules(sites))
    adapters = random_adapters(case.model, case.params)
    return adapters, case.run(case.start(adapters))[1:]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in ("fsdp", "all_to_all") else pytest.mark.slow) for n in EIGHT]
)
def test_eight_devices_equal_one(name):
    sites = "in_proj,out_proj" if name == "fsdp" else ALL  # it splits these two
    adapters, (metrics, gradients) = on_one(sites)
    sizes, engine = EIGHT[name]
    eight = trained(rules(sites), mesh=mesh(**sizes), engine=engine)
    same_step(metrics, gradients, *eight.run(eight.start(adapters))[1:])


@pytest.mark.slow
def test_eight_devices_equal_one_with_a_plain_lora():
    one, eight = (trained(rules(router=False), mesh=on) for on in (None, mesh(data=2, fsdp=2, tensor=2)))
    adapters = random_adapters(one.model, one.params)
    same_step(*one.run(one.start(adapters))[1:], *eight.run(eight.start(adapters))[1:])


def test_the_base_lies_on_the_mesh_as_its_leaves_say():
    places = sharding.param_shardings(SMALL, base(), mesh(data=2, fsdp=2, tensor=2))["blocks"]
    spec = {site: tuple(places[site]["kernel"].spec) for site in SSM}
    assert spec == dict(in_proj=(None, "fsdp", "tensor"), x_proj=(None, "tensor", None),
                        dt_proj=(None, None, "tensor"), out_proj=(None, "tensor", "fsdp"))  # fmt: skip
    wide = dataclasses.replace(SMALL, rank=4)  # 4 + 2 * 6 are 16
    places = sharding.param_shardings(wide, random_params(wide)[0], mesh(data=2, fsdp=2, tensor=2))["blocks"]
    assert tuple(places["x_proj"]["kernel"].spec) == (None, "tensor", "fsdp")


@pytest.mark.slow
def test_bfloat16_is_finite_and_near_float32():
    case = trained(rules(), dtype="bfloat16")
    adapters, (metrics, _) = on_one()
    _, half, gradients = case.run(case.start(adapters))
    assert all(np.isfinite(g).all() for g in gradients.values())
    np.testing.assert_allclose(half["lm_loss"], metrics["lm_loss"], rtol=2e-2)


# ---- configs ---------------------------------------------------------------------------------------------------------


def test_a_pattern_means_the_projections_that_a_base_has():
    for decoder, wanted in ((SMALL, SSM), (TINY, ("q", "k", "v", "o", "gate", "up", "down"))):
        assert compile_model(config_of(rules("*", share="site")), decoder).rules[0].sites == wanted


@pytest.mark.parametrize(
    ("decoder", "sites", "words"),
    [(SMALL, "q,v", "no q, v. This base has no attention.*name in_proj, x_proj, dt_proj, out_proj"),
     (SMALL, "ffn", "no ffn. This base has no attention and no feed-forward"),
     (TINY, "in_proj,out_proj", "no in_proj, out_proj. This base has no state-space blocks")],
)  # fmt: skip
def test_a_site_that_the_base_does_not_have_is_refused_by_name(decoder, sites, words):
    config = config_of(rules(sites, share="site"))
    with pytest.raises(InputError, match=f"method.rules.mix.sites.*{words}"):
        schema.check_model(config, decoder.layers, decoder.dims, decoder.ABSENT)


@pytest.mark.parametrize(
    ("changes", "words"),
    [(dict(hidden_act="gelu"), "hidden_act: got gelu; expected silu"), (dict(use_bias=1), "use_bias: got 1; exp"),
     (dict(conv_kernel=0), "conv_kernel"), (dict(time_step_rank="some"), "time_step_rank"),
     (dict(num_experts=4), "num_experts"), (dict(state_size=True), "state_size")],
)  # fmt: skip
def test_a_config_json_that_says_what_it_is_not_is_refused(changes, words):
    with pytest.raises(InputError, match=words):
        hf_config.from_hf(hf_config.to_hf(TINY_MAMBA) | changes, where="config.json")


def test_a_config_json_is_read_as_transformers_reads_it():
    """The fields of a published one (state-spaces/mamba-130m-hf); what it leaves out has transformers' defaults."""
    published = dict(
        model_type="mamba", architectures=["MambaForCausalLM"], conv_kernel=4, d_inner=1536, d_model=768, expand=2,
        fused_add_norm=True, hidden_act="silu", hidden_size=768, initializer_range=0.1, intermediate_size=1536,
        layer_norm_epsilon=1e-5, n_layer=24, num_hidden_layers=24, pad_vocab_size_multiple=8, residual_in_fp32=True,
        rescale_prenorm_residual=False, rms_norm=True, ssm_cfg={}, state_size=16, time_step_rank=48,
        time_step_floor=1e-4, time_step_init_scheme="random", time_step_max=0.1, time_step_min=0.001,
        time_step_scale=1.0, use_bias=False, use_conv_bias=True, use_cache=True, vocab_size=50280,
    )  # fmt: skip
    told = []
    read = hf_config.from_hf(published, where="config.json", note=told.append)
    assert not told and (read.rank, read.inner, read.tied, read.inner_eps) == (48, 1536, True, 0.0)
    short = {k: published[k] for k in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")}
    assert hf_config.from_hf(short, where="config.json") == read
    falcon = hf_config.from_hf(short | dict(model_type="falcon_mamba"), where="config.json")
    assert falcon == dataclasses.replace(read, family="falcon_mamba", inner_eps=1e-6)
    for backbone in (TINY_MAMBA, falcon, dataclasses.replace(read, tied=False, bias=True, conv_bias=False)):
        assert hf_config.from_hf(hf_config.to_hf(backbone), where="config.json") == backbone


def test_a_lora_put_into_the_base_says_the_same(tmp_path, monkeypatch):
    """As a folder that is read again, by the names that transformers gives."""
    monkeypatch.setenv("MOLORA_CACHE", str(tmp_path / "cache"))
    make.new_run(tmp_path / "run", make.lora_rules(3, 6.0, sites=ALL), source="random:tiny-mamba")
    perform(make.config_of("merge_into_base", tmp_path / "run"), str(tmp_path / "out"), note=lambda text: None)
    run, merged = molora_jax.load_run(tmp_path / "run", "latest"), load_base(f"dir:{tmp_path / 'out' / 'base'}")
    params, adapters = jax.device_get((run.params, run.adapters))
    assert merged.config == TINY_MAMBA
    batch = packed() | {"tokens": packed()["tokens"] + 100}
    wanted = np.asarray(hidden(run.model, params, adapters, batch))
    got, plain = (np.asarray(hidden(run.model.without_rules(), p, {}, batch)) for p in (merged.params, params))
    keep = batch["segment_ids"] > 0
    np.testing.assert_allclose(got[keep], wanted[keep], rtol=1e-4, atol=1e-4)
    assert np.abs(plain - wanted)[keep].max() > 0.05


@pytest.mark.slow
def test_a_run_trains_goes_on_and_answers(tmp_path):
    """LoRA-Mixer's config with other sites; its experts learnt by task, then the router."""
    from configs import lora_mixer

    write_task(tmp_path / "task.jsonl")

    def config(**fields):
        made = lora_mixer.get_config(sites="in_proj,out_proj")
        made.base.source = "random:tiny-mamba"
        made.data.update(tasks=f"jsonl:{tmp_path / 'task.jsonl'}", seq_len=96)
        made.train.update(dict(steps=4, batch_size=8, save_every=1, keep=9, log_every=9) | fields)
        made.eval.update(num_items=4, num_generated=2, max_new_tokens=4)
        return made

    quiet = dict(note=lambda text: None)
    train(config(), str(tmp_path / "whole"), **quiet)
    train(config(stop_after=3), str(tmp_path / "broken"), **quiet)
    train(config(), str(tmp_path / "broken"), **quiet)
    whole, broken = (
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "broken")
    )
    assert whole == broken and len(whole) == 4 and np.isfinite(whole).all()
    run = molora_jax.load_run(tmp_path / "broken", "latest")
    assert run.generate("Double 3", max_new_tokens=6) == run.generate("Double 3", max_new_tokens=6, cache=False)
    shares = run.routing("Double 3")["mix"]
    assert shares.keys() == {"attn"} and len(shares["attn"]) == 4
    assert load_base("random:tiny-mamba").config == run.model.config
