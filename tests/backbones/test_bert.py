"""The encoder: adapters' gradients against einsums, examples of a packed row apart, what it refuses, MiniLM itself."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from molora_jax import config as config_lib
from molora_jax.backbones.compile import compile_model
from molora_jax.backbones.families import FAMILIES
from molora_jax.backbones.hf_config import from_hf
from molora_jax.backbones.model import Model
from molora_jax.decode.generate import generate
from molora_jax.errors import InputError
from molora_jax.io.base import load_base
from molora_jax.training.setup import setup
from tests.backbones.backbone_cases import CASES

SITES = ("q", "k", "v", "o", "up", "down")


def config_of(sites="*", **rule):
    config = common.get_config()
    config.method.rules = dict(all=common.rule(sites, adapter=common.adapter(rank=4, dropout=0.0), **rule))
    config.base.source = "random:tiny-bert"
    return config


def batch(base, lengths=(5, 7)):
    """One row of two examples."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, base.config.vocab, (1, sum(lengths))).astype(np.int32)
    segments = np.repeat(np.arange(1, len(lengths) + 1, dtype=np.int32), lengths)[None]
    positions = np.concatenate([np.arange(n, dtype=np.int32) for n in lengths])[None]
    return dict(tokens=tokens, segment_ids=segments, positions=positions)


def reference(params, factors, data, heads, eps, scale):
    """Hidden states by einsums over merged weights; a loop over layers."""

    def normed(x, p):
        x = x - x.mean(-1, keepdims=True)
        return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + eps) * p["weight"] + p["bias"]

    pick = lambda tree, i: jax.tree.map(lambda a: a[i], tree)  # noqa: E731
    x = params["embed"][data["tokens"]] + params["positions"][data["positions"]] + params["token_types"][0]
    x = normed(x, params["embed_norm"])
    same = data["segment_ids"][:, :, None] == data["segment_ids"][:, None, :]
    for i in range(len(params["blocks"]["q"]["kernel"])):
        p, f = pick(params["blocks"], i), pick(factors, i)

        def site(name, h, p=p, f=f):
            W = p[name]["kernel"] + scale * jnp.einsum("ri,ro->io", f[name]["A"][0], f[name]["B"][0])
            return jnp.einsum("bsi,io->bso", h, W) + p[name]["bias"]

        q, k, v = (site(n, x).reshape(*x.shape[:2], heads, -1) for n in "qkv")
        scores = jnp.einsum("bshd,bthd->bhst", q, k) / q.shape[-1] ** 0.5
        weights = jax.nn.softmax(jnp.where(same[:, None], scores, -jnp.inf))
        x = normed(x + site("o", jnp.einsum("bhst,bthd->bshd", weights, v).reshape(x.shape)), p["attn_norm"])
        x = normed(x + site("down", jax.nn.gelu(site("up", x), approximate=False)), p["ffn_norm"])
    return x


def test_adapters_gradients_are_those_of_einsums():
    base, config = load_base("random:tiny-bert"), config_of()
    config_lib.validate(config)
    model = compile_model(config, base.config)
    assert model.rules[0].sites == SITES
    rng, data = np.random.default_rng(1), batch(base)
    adapters = jax.tree.map(
        lambda a: 0.1 * rng.standard_normal(a.shape).astype(np.float32),
        jax.eval_shape(lambda p: model.init_adapters(jax.random.key(0), p), base.params),
    )
    params = jax.tree.map(lambda a: a + 0.1 * rng.standard_normal(a.shape).astype(np.float32), base.params)
    weight = rng.standard_normal((1, 12, base.config.width)).astype(np.float32)
    own = adapters["all"]["000-003"]

    def ours(own):
        hidden = model.hidden(params, {"all": {"000-003": own}}, {}, data, train=True, key=jax.random.key(0))[0]
        return jnp.sum(hidden * weight)

    def theirs(own):
        scale = model.rules[0].adapter.scale()
        return jnp.sum(reference(params, own, data, base.config.heads, base.config.norm_eps, scale) * weight)

    with jax.default_matmul_precision("highest"):
        found, wanted = jax.jit(jax.value_and_grad(ours))(own), jax.jit(jax.value_and_grad(theirs))(own)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert np.linalg.norm(a - b) < 1e-4 * np.linalg.norm(b)


def test_examples_of_a_row_do_not_see_each_other_and_are_read_both_ways():
    base = load_base("random:tiny-bert")
    model, data = Model(base.config), batch(base)
    run = jax.jit(lambda p, d: model.hidden(p, {}, {}, d)[0])
    hidden = run(base.params, data)
    second = dict(data, tokens=data["tokens"].copy())
    second["tokens"][0, 11] = (second["tokens"][0, 11] + 1) % base.config.vocab
    changed = np.abs(run(base.params, second) - hidden).max(-1)[0] > 1e-6
    assert not changed[:5].any() and changed[5:].all()


@pytest.mark.parametrize("sites", ["gate", "ffn", "q,gate"])
def test_sites_that_it_does_not_have_are_refused_with_the_reason(sites):
    config, base = config_of(sites), load_base("random:tiny-bert")
    with pytest.raises(InputError, match="without a gate"):
        config_lib.check_model(config, base.config.layers, base.config.dims, base.config.ABSENT)


def test_generation_and_the_objective_lm_are_refused_by_name():
    base = load_base("random:tiny-bert")
    with pytest.raises(InputError, match=r"generation on bert.*encoder"):
        generate(Model(base.config), base.params, {}, {}, [[1, 2]], max_new_tokens=2, eos_id=None)
    with pytest.raises(InputError, match=r"objective lm on bert.*encoder"):
        setup(config_of())


def test_a_width_that_says_the_hidden_size_again_is_no_other_model(monkeypatch):
    """And the family of a reader is the `model_type` that asked for it."""
    monkeypatch.setitem(FAMILIES, "another_bert", FAMILIES["bert"])
    config = CASES["bert"] | dict(model_type="another_bert", embedding_size=CASES["bert"]["hidden_size"])
    assert from_hf(config, where="config.json").family == "another_bert"
    with pytest.raises(InputError, match="embedding_size"):
        from_hf(config | dict(embedding_size=128), where="config.json")


@pytest.mark.slow
def test_minilm_from_its_package():
    """Ids of its tokenizer with [CLS] and [SEP], and hidden states, as transformers has them."""
    base = load_base("pkg:all-minilm-l6-v2")
    wanted = json.loads((pathlib.Path(__file__).parents[1] / "fixtures" / "minilm.json").read_text())
    model, pooled = Model(base.config), []
    for row in wanted["rows"]:
        ids = [*base.tokenizer.encode_plain(row["text"]), base.tokenizer.eos_id]
        assert ids == row["ids"]
        tokens = np.array([ids], np.int32)
        data = dict(
            tokens=tokens, segment_ids=np.ones_like(tokens), positions=np.arange(len(ids), dtype=np.int32)[None]
        )
        with jax.default_matmul_precision("highest"):
            hidden = np.asarray(model.hidden(base.params, {}, {}, data)[0][0])
        np.testing.assert_allclose(hidden[0, :8], row["first"], atol=1e-4)
        np.testing.assert_allclose(hidden.mean(0)[:8], row["mean"], atol=1e-4)
        pooled.append(hidden.mean(0) / np.linalg.norm(hidden.mean(0)))
    np.testing.assert_allclose(np.array(pooled) @ np.array(pooled).T, wanted["cosines"], atol=1e-4)
