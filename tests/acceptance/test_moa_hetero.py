"""The acceptance list of MoA, heterogeneous mixture of adapters: one router a block over adapters of several kinds."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from launch import flags
from molora_jax import config as schema
from molora_jax.backbones.compile import compile_model
from molora_jax.backbones.families import SMOLLM2, TINY_BERT, TINY_MOE
from molora_jax.backbones.sizes import num_trainable
from molora_jax.core.prompt import attend_prompt
from molora_jax.errors import InputError
from molora_jax.placements.block import parallel
from molora_jax.routers.sigmoid_threshold import SigmoidThreshold
from tests.acceptance import helpers, small
from tests.acceptance.helpers import SMALL, batch, build, gradient, hidden, randomised, run
from tests.battery.cases import BASES

SITES = ("q", "k", "v", "o", "down")
ALL = ("lora", "prompt", "parallel")
SEGMENT = "000-002"
LORA = common.adapter(rank=3, alpha=6.0, dropout=0.0)
KEEP = batch()["segment_ids"] > 0  # padding has no weight: the base alone
ROUTER = dict(name="sigmoid_threshold", f="swiglu", expand=4)


def rule(adapters=ALL, *, sites="q,k,v,o,down", router=(), adapter=None, experts="1", routed=True, **placement):
    return dict(
        all=common.rule(
            sites, experts=experts, adapter=adapter or LORA,
            adapters=tuple(adapters) or None, router=ROUTER | dict(router) if routed else None,
            placement=dict(name="block", length=4, width=5) | placement,
        )
    )  # fmt: skip


def sparse(**options):
    return dict(mode="sparse") | options


def leaf(adapters, *path):
    return functools.reduce(lambda node, name: node[name], path, adapters["all"][SEGMENT])


def put(adapters, *path, value):
    """A copy with another value at a leaf."""
    copy = jax.tree.map(lambda x: x, adapters)
    node = functools.reduce(lambda node, name: node[name], path[:-1], copy["all"][SEGMENT])
    node[path[-1]] = jnp.broadcast_to(jnp.asarray(value, jnp.float32), node[path[-1]].shape)
    return copy


def test_acceptance_1_weights_of_1_are_plain_lora():
    one = dict(f="linear")
    model, params, adapters = build(rule(("lora",), router=one))
    plain, _, fresh = build(dict(all=common.rule("q,k,v,o,down", adapter=LORA)))
    for site in SITES:  # the same start as a rule of its own
        np.testing.assert_array_equal(leaf(adapters, site, "A"), leaf(fresh, site, "A"))
    moved = randomised(fresh)
    for site in SITES:
        for name in "AB":
            adapters = put(adapters, site, name, value=leaf(moved, site, name))
    adapters = put(put(adapters, "router", "block", "W", value=0.0), "router", "block", "b", value=40.0)
    wanted = hidden(plain, params, moved, batch())
    np.testing.assert_allclose(hidden(model, params, adapters, batch())[KEEP], wanted[KEEP], atol=2e-6)
    assert np.abs(wanted - hidden(plain.without_rules(), params, {}, batch())).max() > 0.1
    summed, _, _ = build(rule(("lora",), routed=False))  # and so it is without a router
    alone = {"all": {SEGMENT: {site: leaf(moved, site) for site in SITES}}}
    np.testing.assert_allclose(hidden(summed, params, alone, batch()), wanted, atol=2e-6)


def test_acceptance_2_a_gate_of_0_shuts_the_prompt_and_learns_first():
    model, params, adapters = build(rule(sites="q,down"))
    adapters = put(randomised(adapters), "prompt", "gate", value=0.0)
    other = put(adapters, "prompt", "P", value=7.0)
    np.testing.assert_array_equal(hidden(model, params, adapters, batch()), hidden(model, params, other, batch()))
    _, grads = gradient(model, params, adapters, batch())
    assert (np.abs(leaf(grads, "prompt", "gate")).max(axis=(1, 2)) > 0).all()
    np.testing.assert_array_equal(leaf(grads, "prompt", "P"), 0.0)
    opened = put(adapters, "prompt", "gate", value=0.5)
    assert np.abs(hidden(model, params, opened, batch()) - hidden(model, params, adapters, batch())).max() > 1e-2
    _, grads = gradient(model, params, opened, batch())
    assert (np.abs(leaf(grads, "prompt", "P")).max(axis=(1, 2, 3)) > 0).all()


@pytest.mark.parametrize("f", ["swiglu", "linear"])
def test_acceptance_3_a_weight_follows_from_its_own_logit_alone(f):
    router = SigmoidThreshold(f=f)
    site = dataclasses.replace(_site(7))
    p = router.init_leaves(jax.random.key(0), site, 0)
    x, ctx = jax.random.normal(jax.random.key(1), (1, 6, site.d_in)), small.context(1, 6)
    before = small.routed(router, p, {}, x, ctx)[0].gates
    bias = "b2" if f == "swiglu" else "b"
    after = small.routed(router, p | {bias: p[bias].at[2].add(3.0)}, {}, x, ctx)[0].gates
    others = np.arange(7) != 2
    np.testing.assert_array_equal(before[..., others], after[..., others])
    assert (after[..., 2] > before[..., 2] + 0.05).all()
    # float64, from the paper
    q, y = {k: np.asarray(v, np.float64) for k, v in p.items()}, np.asarray(x, np.float64)
    if f == "linear":
        z = y @ q["W"].T + q["b"]
    else:
        a = y @ q["W1"].T + q["b1"]
        z = (a / (1 + np.exp(-a)) * (y @ q["W3"].T + q["b3"])) @ q["W2"].T + q["b2"]
        assert q["W1"].shape == (28, site.d_in) and not q["b1"].any() and not q["b2"].any()
    np.testing.assert_allclose(before, 1 / (1 + np.exp(-z)), rtol=1e-5)
    assert abs(before.sum(-1).mean() - 7 / 2) < 1, "near 1/2 each at the start, and not normalised"


def _site(experts, width=SMALL.width):
    from molora_jax.core.types import Site

    return Site("block", width, width, (0,), experts)


def test_acceptance_4_threshold_0_is_soft_without_the_prompt_and_threshold_1_is_the_base():
    kinds = ("lora", "parallel")
    soft, params, adapters = build(rule(kinds, sites="q,down", router=dict(mode="soft")))
    open_, _, fresh = build(rule(kinds, sites="q,down", router=sparse(tau_max=0.0)))
    adapters = randomised(adapters)
    own = randomised(fresh)
    for site in ("q", "down", "parallel"):
        own["all"][SEGMENT][site] = adapters["all"][SEGMENT][site]
    own["all"][SEGMENT]["router"]["block"] |= adapters["all"][SEGMENT]["router"]["block"]
    np.testing.assert_allclose(hidden(soft, params, adapters, batch()), hidden(open_, params, own, batch()), atol=1e-6)
    one, two = gradient(soft, params, adapters, batch())[1], gradient(open_, params, own, batch())[1]
    for name in ("w_tau", "b_tau"):
        np.testing.assert_array_equal(two["all"][SEGMENT]["router"]["block"].pop(name), 0.0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), one, two)
    shut, _, _ = build(rule(kinds, sites="q,down", router=sparse(tau_max=1.0)))
    closed = put(put(own, "router", "block", "b_tau", value=60.0), "router", "block", "w_tau", value=0.0)
    alone = hidden(shut.without_rules(), params, {}, batch())
    np.testing.assert_allclose(hidden(shut, params, closed, batch()), alone, atol=1e-6)
    assert np.abs(hidden(soft, params, adapters, batch()) - alone).max() > 0.1


@pytest.mark.parametrize("threshold", ["token", "constant"])
def test_acceptance_5_a_masked_threshold_never_learns_a_shifted_one_does(threshold):
    slopes = {}
    for weight in ("masked", "shifted"):
        model, params, adapters = build(rule(router=sparse(sparse_weight=weight, threshold=threshold)))
        _, grads = gradient(model, params, randomised(adapters), batch())
        slopes[weight] = {n: g for n, g in leaf(grads, "router", "block").items() if "tau" in n}
    assert set(slopes["masked"]) == {"b_tau"} | ({"w_tau"} if threshold == "token" else set())
    for name, slope in slopes["masked"].items():
        np.testing.assert_array_equal(slope, 0.0)
        moved = slopes["shifted"][name]
        assert (np.abs(moved).reshape(len(moved), -1).max(axis=1) > 0).all(), name


def test_acceptance_5_sparse_weights_by_hand():
    x, ctx = jax.random.normal(jax.random.key(1), (1, 40, 8)), small.context(1, 40)
    for weight in ("masked", "shifted"):
        router = SigmoidThreshold(f="linear", mode="sparse", tau_max=0.9, sparse_weight=weight)
        p = jax.tree.map(lambda v: 6 * v, router.init_leaves(jax.random.key(0), _site(5, 8), 0))
        made = small.routed(router, p, {}, x, ctx)[0]
        q, y = {k: np.asarray(v, np.float64) for k, v in p.items()}, np.asarray(x, np.float64)
        w = 1 / (1 + np.exp(-(y @ q["W"].T + q["b"])))
        tau = 0.9 / (1 + np.exp(-(y @ q["w_tau"].T + q["b_tau"])))
        on = w >= tau
        np.testing.assert_array_equal(made.selected, on)
        np.testing.assert_allclose(made.gates, np.where(on, w - tau if weight == "shifted" else w, 0.0), atol=1e-5)
        assert 0.2 < on.mean() < 0.8


def test_acceptance_6_gathered_and_dense_masked_forms_agree():
    found = {}
    for form in ("dense", "gathered"):
        model, params, adapters = build(rule(("lora", "parallel"), router=sparse(tau_max=1.0), form=form))
        adapters = randomised(adapters, scale=0.3)
        found[form] = hidden(model, params, adapters, batch()), *gradient(model, params, adapters, batch())
    load = run(model, params, adapters, batch())[1]["all"][SEGMENT]["block"]["expert_load"]
    share = np.asarray(load["slots"] / load["tokens"]) / 6
    assert ((0.1 < share) & (share < 0.9)).all(), "some are in, some are out"
    (h, loss, grads), (h2, loss2, grads2) = found["dense"], found["gathered"]
    np.testing.assert_allclose(h, h2, atol=5e-5)
    np.testing.assert_allclose(loss, loss2, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-6), grads, grads2)


def test_acceptance_6_the_gathered_form_visits_only_the_tokens_that_chose(monkeypatch):
    T, D = 2048, 32
    p = {n: jax.random.normal(jax.random.key(i), s) for i, (n, s) in enumerate(
        dict(inward=(1, 8, D), outward=(1, 8, D), b=(1, 8), c=(1, D)).items())}  # fmt: skip
    x = jax.random.normal(jax.random.key(9), (T, D))
    for share in (8, 1):
        idx = jnp.where(jnp.arange(T) % share == 0, 0, 1)[:, None]
        slots = idx, jnp.full((T, 1), 0.7)
        rows = small.rows_visited(monkeypatch, lambda x, slots=slots: parallel(p, x, slots, "gathered"), x)
        assert rows and all(T // share <= n <= 1.3 * T // share + 128 for n in rows), rows
        y = jax.jit(functools.partial(parallel, form="gathered"))(p, x, slots)
        assert not np.any(np.asarray(y)[np.asarray(idx[:, 0]) == 1])


def test_acceptance_7_the_prompt_is_a_softmax_of_its_own():
    rng = np.random.default_rng(0)
    q, K, V = (rng.standard_normal(s) for s in ((2, 5, 4, 6), (3, 2, 6), (3, 2, 6)))
    gate = rng.standard_normal(4)
    made = attend_prompt(*(jnp.asarray(a, jnp.float32) for a in (q, K, V, gate)))
    wanted = np.zeros((2, 5, 4, 6))
    for b, s, h in np.ndindex(2, 5, 4):  # heads 0, 1 of the queries have key-value head 0
        z = K[:, h // 2] @ q[b, s, h] / np.sqrt(6)
        e = np.exp(z - z.max())
        wanted[b, s, h] = gate[h] * (e / e.sum()) @ V[:, h // 2]
    np.testing.assert_allclose(made, wanted.reshape(2, 5, 24), atol=1e-5)

    # with the text's keys and values: prefix tuning has one softmax, of which the prompt takes a part
    k, v = (rng.standard_normal((5, 2, 6)) for _ in range(2))
    own, joint = np.zeros((5, 24)), np.zeros((5, 24))
    for s, h in np.ndindex(5, 4):
        text, slots = (keys[:, h // 2] @ q[0, s, h] / np.sqrt(6) for keys in (k[: s + 1], K))
        at = slice(6 * h, 6 * h + 6)
        own[s, at] = np.exp(text) / np.exp(text).sum() @ v[: s + 1, h // 2]
        both = np.exp(np.r_[slots, text])
        joint[s, at] = both / both.sum() @ np.r_[V[:, h // 2], v[: s + 1, h // 2]]
    separate = own + attend_prompt(*(jnp.asarray(a, jnp.float32) for a in (q[:1], K, V, np.ones(4))))[0]
    assert np.abs(separate - joint).max() > 0.3, "ours is no prefix tuning"


def test_acceptance_7_the_models_prompt_by_hand():
    """Keys and values through the frozen weights, without positions and without LoRA; before o, whose LoRA sees it."""
    decoder = dataclasses.replace(SMALL, layers=1)
    model, params, adapters = build(rule(), decoder=decoder)
    adapters = jax.device_get(randomised(adapters))
    data = {k: v[:1, :1] for k, v in batch().items()}  # one token: attention over the text gives its own v
    got = np.asarray(hidden(model, params, adapters, data), np.float64)[0, 0]
    own = jax.tree.map(lambda a: np.asarray(a, np.float64)[0], adapters["all"]["000-000"])
    block = jax.tree.map(lambda a: np.asarray(a, np.float64)[0], params["blocks"])
    silu = lambda a: a / (1 + np.exp(-a))  # noqa: E731
    rms = lambda a, w: a / np.sqrt((a * a).mean() + decoder.norm_eps) * w  # noqa: E731

    x = np.asarray(params["embed"], np.float64)[data["tokens"][0, 0]]
    r = own["router"]["block"]
    w = r["W2"] @ (silu(r["W1"] @ x + r["b1"]) * (r["W3"] @ x + r["b3"])) + r["b2"]  # x before the norm
    w = 1 / (1 + np.exp(-w))
    at = dict(zip(("q", "k", "v", "prompt", "o", "down", "parallel"), w, strict=True))

    def project(site, h):
        change = (own[site]["A"][0] @ h) @ own[site]["B"][0]
        return h @ block[site]["kernel"] + at[site] * 2.0 * change

    h = rms(x, block["attn_norm"])
    q = project("q", h).reshape(2, 16)  # at position 0 nothing is turned
    K, V = (own["prompt"]["P"][0] @ block[s]["kernel"] for s in ("k", "v"))
    v = project("v", h)
    out = []
    for head in range(2):
        e = np.exp(K @ q[head] / 4)
        out.append(v + at["prompt"] * own["prompt"]["gate"][0, head] * (e / e.sum()) @ V)
    x = x + project("o", np.concatenate(out))
    h = rms(x, block["ffn_norm"])
    ffn = project("down", silu(h @ block["gate"]["kernel"]) * (h @ block["up"]["kernel"]))
    p = own["parallel"]
    beside = silu(p["inward"][0] @ h + p["b"][0]) @ p["outward"][0] + p["c"][0]
    x = x + ffn + at["parallel"] * beside
    np.testing.assert_allclose(got, rms(x, np.asarray(params["final_norm"], np.float64)), rtol=1e-4, atol=1e-5)


def test_acceptance_8_parameters_of_an_8B_llama():
    shape = dict(layers=32, width=4096, ffn_width=14336, heads=32, kv_heads=8, head_dim=128, vocab=128256, tied=False)
    llama = dataclasses.replace(SMOLLM2, **shape)
    config = flags.load(flags.ROOT / "configs" / "moa_hetero.py")
    assert round(num_trainable(compile_model(config, llama)) / 1e6, 2) == 24.52
    with config.unlocked():
        config.method.rules["all"].update(adapters=("lora", "parallel"))
        config.method.rules["all"].router.mode = "sparse"
    schema.validate(config)
    assert round(num_trainable(compile_model(config, llama)) / 1e6, 2) == 22.29


@pytest.mark.parametrize(("pool", "earlier"), [("token", False), ("instance", True)])
def test_acceptance_9_a_token_router_is_causal_and_an_instance_router_is_not(pool, earlier):
    model, params, adapters = build(rule(router=dict(pool=pool)))
    adapters, data = randomised(adapters), batch()
    other = dict(data, tokens=data["tokens"].copy())
    other["tokens"][:, 3] = (other["tokens"][:, 3] + 7) % SMALL.vocab  # of the first example of each row
    moved = np.abs(hidden(model, params, adapters, data) - hidden(model, params, adapters, other)).max(axis=-1)
    assert (moved[:, 3] > 1e-3).all() and (moved[:, 5:10] < 1e-6).all(), "an example is alone"
    assert (moved[:, :3] > 1e-4).all() if earlier else (moved[:, :3] < 1e-6).all()
    assert model.rules[0].router.SETTLES == earlier, "decoding asks the prompt alone"


@pytest.mark.parametrize("options", [dict(), dict(pool="instance"), pytest.param(sparse(), marks=pytest.mark.slow)])
def test_acceptance_10_a_cache_changes_nothing(options):
    model, params, adapters = build(rule(router=options))
    adapters = randomised(adapters)
    prompts = helpers.cache_changes_nothing(model, params, adapters)
    if options.get("pool") == "instance":  # the weights of the prompt's own mean
        text = dict(tokens=np.array([prompts[0]], np.int32), segment_ids=np.ones((1, 3), np.int32),
                    positions=np.arange(3, dtype=np.int32)[None])  # fmt: skip
        gates = run(model, params, adapters, text, collect=True)[2]["all"][SEGMENT]["block"]
        settled = model.settle(params, adapters, {}, text)["all"][SEGMENT]["block"]
        np.testing.assert_allclose(settled, gates[:, :, 0], rtol=1e-6)


def test_the_router_reads_before_the_norm_unless_asked():
    """Trap: a normed input; scaling what enters the first block changes the weights there, normed it does not."""
    for router_input, moves in (("raw", True), ("normed", False)):
        model, params, adapters = build(rule(router_input=router_input))
        adapters = randomised(adapters)
        larger = dict(params, embed=3 * params["embed"])
        a, b = (run(model, p, adapters, batch(), collect=True)[2]["all"][SEGMENT]["block"][0] for p in (params, larger))
        assert (np.abs(a - b).max() > 1e-2) == moves


def test_the_parallel_adapter_starts_near_but_not_at_zero():
    """Gain 1e-4 on both matrices: gradients of 1e-4 of the usual size, which Adam's eps must not swallow."""
    model, params, adapters = build(rule(("lora", "parallel")))
    start, alone = hidden(model, params, adapters, batch()), hidden(model.without_rules(), params, {}, batch())
    assert np.abs(start - alone).max() < 1e-6
    p = jax.tree.map(lambda a: a[0], leaf(adapters, "parallel"))
    x = jax.random.normal(jax.random.key(0), (64, SMALL.width))
    size = np.abs(parallel(p, x, None, "dense")).max()
    assert 1e-11 < size < 1e-7
    _, grads = gradient(model, params, adapters, batch())
    slope = np.abs(leaf(grads, "parallel", "outward")).max()
    config = flags.load(flags.ROOT / "configs" / "moa_hetero.py")
    assert slope > 20 * config.optim.eps, (slope, config.optim.eps)


@pytest.mark.parametrize("kinds", [("lora", "ia3"), ("ia3", "parallel")])
def test_kinds_at_one_projection_each_have_a_weight(kinds):
    made = rule(kinds, sites="k,down", adapter=LORA if kinds[0] == "lora" else dict(name="ia3"))
    model, params, adapters = build(made, decoder=dataclasses.replace(SMALL, layers=1))
    adapters = randomised(adapters)
    gates = run(model, params, adapters, batch(), collect=True)[2]["all"]["000-000"]["block"]
    K = {("lora", "ia3"): 4, ("ia3", "parallel"): 3}[kinds]
    assert gates.shape[-1] == K
    # shut one after the other: each weight moves the model by itself
    router = adapters["all"]["000-000"]["router"]["block"]
    outs = []
    for j in range(K):
        own = jax.tree.map(lambda a: a, adapters)
        b2 = jnp.full(router["b2"].shape, -60.0).at[..., j].set(60.0)
        own["all"]["000-000"]["router"]["block"] = router | {"b2": b2, "W2": 0 * router["W2"]}
        outs.append(np.asarray(hidden(model, params, own, batch())))
    alone = np.asarray(hidden(model.without_rules(), params, {}, batch()))
    assert all(np.abs(out - alone).max() > 1e-3 for out in outs)
    assert all(np.abs(a - b).max() > 1e-4 for i, a in enumerate(outs) for b in outs[:i])


def test_any_router_over_the_places_of_a_block():
    """Softmax over the places works too, and says how many they are; a base that routes itself has no FFN sites."""
    top = dict(name="softmax_topk", k=2, renormalise=False)
    config = helpers.rules_config(dict(all=common.rule("q,v", adapter=LORA, router=top,
        placement=dict(name="block"), experts="2")))  # fmt: skip
    model = compile_model(config, SMALL, max_segments=3)
    params = helpers.base()
    adapters = randomised(helpers.fresh_adapters(model, jax.random.key(0), params))
    _, sums, gates = run(model, params, adapters, batch(), collect=True)
    assert gates["all"][SEGMENT]["block"].shape[-1] == 4
    load = sums["all"][SEGMENT]["block"]["expert_load"]
    np.testing.assert_allclose(load["slots"], 2 * np.asarray(load["tokens"]))
    config = helpers.rules_config(rule(sites="q,o"))
    moe = compile_model(config, TINY_MOE, max_segments=3)
    assert moe.rules[0].placement.choices(moe.rules[0], TINY_MOE, 1) == 4
    with pytest.raises(InputError, match="sites"):
        schema.check_model(helpers.rules_config(rule()), TINY_MOE.layers, TINY_MOE.dims, TINY_MOE.ABSENT)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("decoder", "sites"),
    [
        (BASES["qwen3"], "q,k,v,o,down"), (TINY_MOE, "q,o"), (TINY_BERT, "q,k,v,o,down"),
        (dataclasses.replace(TINY_MOE, qk_norm_all=True), "q,o"),
    ],
    ids=["norms a head", "a base with experts", "an encoder", "norms over all heads"],
)  # fmt: skip
def test_kinds_on_other_bases(decoder, sites):
    """Keys of a prompt are normed as the family's are; without a gate the text's attention stays."""
    model = compile_model(helpers.rules_config(rule(sites=sites)), decoder, max_segments=3)
    params = jax.tree.map(jnp.asarray, helpers.base(decoder))
    adapters = randomised(helpers.fresh_adapters(model, jax.random.key(0), params))
    (segment,) = model.segments
    own = adapters["all"][segment.name]
    shut = {"all": {segment.name: own | {"prompt": own["prompt"] | {"gate": 0 * own["prompt"]["gate"]}}}}
    lost = {"all": {segment.name: shut["all"][segment.name] | {"prompt": own["prompt"] | {
        "gate": 0 * own["prompt"]["gate"], "P": 3 * own["prompt"]["P"]}}}}  # fmt: skip
    h, without, same = (hidden(model, params, tree, batch()) for tree in (adapters, shut, lost))
    assert np.isfinite(h).all() and np.abs(h - without).max() > 1e-2
    np.testing.assert_array_equal(without, same)


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: rule(("lora", "promt")), "adapters"),
        (lambda: rule(("lora", "lora")), "adapters"),
        (lambda: rule(("ia3", "lora")), "adapters"),
        (lambda: rule(("prompt", "parallel")), "adapters"),
        (lambda: rule(experts="2"), "experts"),
        (lambda: rule(router=dict(share="model")), "router.share"),
        (lambda: rule(router=dict(tau_max=1.5)), "router.tau_max"),
        (lambda: rule(router_input="both"), "placement.router_input"),
        (lambda: rule(length=0), "placement.length"),
        (lambda: dict(all={k: v for k, v in rule()["all"].items() if k != "placement"}), "adapters"),
        (lambda: dict(all=rule()["all"] | dict(router=dict(name="softmax_topk", k=8))), "router.k"),
        (lambda: dict(all=rule(())["all"] | dict(router=dict(name="core_space"))), "router.name"),
    ],
)
def test_what_does_not_fit_is_refused(make, field):
    with pytest.raises(InputError, match=f"method.rules.all.{field}"):
        helpers.rules_config(make())


def test_kinds_that_share_a_leaf_are_refused():
    config = helpers.rules_config(rule(("lora", "dora", "prompt")))
    with pytest.raises(InputError, match=r"method.rules.all.adapters: got Lora and Dora, both with leaves A, B"):
        compile_model(config, SMALL)
