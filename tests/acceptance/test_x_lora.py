"""The acceptance list of X-LoRA, its experts from other runs, its two stages, and generation with two caches."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from molora_jax.backbones.attention import causal_mask
from molora_jax.backbones.model import Model
from molora_jax.core import trees
from molora_jax.core.trees import count
from molora_jax.core.types import Context
from molora_jax.errors import InputError
from molora_jax.regimes.stages import stages
from tests.acceptance import helpers
from tests.acceptance.helpers import SMALL, batch, build, gradient, hidden, randomised, run

SITES, R, ALPHA, n, D = ("q", "down"), 3, 6.0, 3, SMALL.width
KEEP = batch()["segment_ids"] > 0


def rule(experts="3", *, share="site", load=(), sites="q,down", rank=R, **head):
    router = dict(name="x_lora", share=share) | head
    adapter = common.adapter(rank=rank, alpha=ALPHA, dropout=0.0)
    return dict(mix=common.rule(sites, experts=experts, adapter=adapter, router=router, load=load))


def lora(rank=R):
    return build(
        dict(mix=common.rule("q,down", adapter=common.adapter(rank=rank, alpha=ALPHA * rank / R, dropout=0.0)))
    )


def made(**options):
    model, params, adapters = build(rule(**options))
    return model, params, randomised(adapters)


def with_heads(adapters, bias):
    """Every slice of the head: weights 0, this bias."""
    own = adapters["mix"]["000-002"]
    heads = {s: {"W": 0 * p["W"], "b": jnp.broadcast_to(jnp.asarray(bias, jnp.float32), p["b"].shape)}
             for s, p in own["router"].items()}  # fmt: skip
    return {"mix": {"000-002": own | {"router": heads}}}


def experts(adapters, change):
    """A tree of plain LoRA: `change(A [L, n, R, D], B) -> (A, B)` at each site."""
    own = adapters["mix"]["000-002"]
    return {"mix": {"000-002": {s: dict(zip("AB", change(own[s]["A"], own[s]["B"]), strict=True)) for s in SITES}}}


def gates_of(model, params, adapters, data=None):
    """`{site: [L, B, S, n]}`"""
    return jax.device_get(run(model, params, adapters, batch() if data is None else data, collect=True)[2])["mix"][
        "000-002"
    ]


@pytest.mark.parametrize("a", range(n))
def test_acceptance_1_one_hot_gates_are_that_adapter_alone(a):
    model, params, adapters = made()
    one = with_heads(adapters, jnp.where(jnp.arange(n) == a, 200.0, 0.0))
    wanted = hidden(lora()[0], params, experts(adapters, lambda A, B: (A[:, a : a + 1], B[:, a : a + 1])), batch())
    # two programs, other orders of summing in float32: up to 4.3e-6 measured (jax 0.12), where values reach 3
    np.testing.assert_allclose(hidden(model, params, one, batch())[KEEP], wanted[KEEP], atol=6e-6, rtol=1e-6)


def test_acceptance_2_constant_logits_are_the_average_adapter():
    model, params, adapters = made()
    flat = lambda x: x.reshape(x.shape[0], 1, n * R, x.shape[-1])  # noqa: E731  (sum_a B_a A_a / n as one product)
    wanted = hidden(lora(n * R)[0], params, experts(adapters, lambda A, B: (flat(A), flat(B) / n)), batch())
    got = hidden(model, params, with_heads(adapters, 0.7), batch())
    np.testing.assert_allclose(got[KEEP], wanted[KEEP], atol=2e-6, rtol=1e-5)


def test_acceptance_3_gradient_reaches_the_head_alone_and_dies_with_the_experts():
    model, params, adapters = made(depth=2, width=16)
    _, grads = gradient(model, params, adapters, batch(), frozen=("*/A", "*/B"))
    flat = trees.flatten_dict(grads, sep="/")
    assert {path.rpartition("/")[0] for path in flat} == {
        *(f"mix/000-002/router/{s}" for s in SITES), "mix/shared/trunk/0"
    }  # fmt: skip
    assert all((np.abs(g) > 0).any() for g in flat.values())
    own = adapters["mix"]["000-002"]
    silent = {"mix": adapters["mix"] | {"000-002": own | {s: own[s] | {"B": 0 * own[s]["B"]} for s in SITES}}}
    _, grads = gradient(model, params, silent, batch(), frozen=("*/A", "*/B"))
    assert all((g == 0).all() for g in jax.tree.leaves(grads))
    loaded = dataclasses.replace(model, rules=(dataclasses.replace(model.rules[0], load=("x",)),))
    trainable, _ = trees.split(adapters, loaded.frozen_patterns())
    assert trees.flatten_dict(trainable, sep="/").keys() == flat.keys(), "load freezes the experts"


@functools.partial(jax.jit, static_argnums=0)
def features(model, params, adapters, data):
    """What the head's slices read, `[B, S, D | H]`."""
    data = {k: jnp.asarray(v) for k, v in data.items()}
    names = ("segment_ids", "positions", "task_ids", "example_ids")
    ctx = Context(data["segment_ids"] > 0, *(data[name] for name in names))
    mask = causal_mask(data["segment_ids"])
    return model._base_features(params, adapters, data, ctx, mask, None, None, lambda x: x)[0]["mix"]


def test_acceptance_4_the_first_pass_knows_no_adapter_and_no_gradient(monkeypatch):
    model, params, adapters = made()
    got = features(model, params, adapters, batch())
    np.testing.assert_array_equal(got, features(model, params, randomised(adapters, seed=9), batch()))
    np.testing.assert_allclose(got, hidden(model.without_rules(), params, {}, batch()), atol=1e-5)
    summed = lambda e: jnp.sum(features(model, params | {"embed": e}, adapters, batch()))  # noqa: E731
    slopes = jax.jit(jax.grad(summed))(params["embed"])
    np.testing.assert_array_equal(slopes, 0.0)

    passes, plain = [], Model.hidden

    def spy(self, params, adapters, *args, **options):
        passes.append((self.rules, adapters, options.get("train", False)))
        return plain(self, params, adapters, *args, **options)

    monkeypatch.setattr(Model, "hidden", spy)
    jax.eval_shape(lambda p, a: model.hidden(p, a, {}, batch(), train=True)[0], params, adapters)
    assert passes[0][0] == model.rules and passes[1:] == [((), {}, False)], (
        "one base pass, without experts, dropout or noise"
    )


def test_acceptance_5_top_k_keeps_the_largest_and_does_not_renormalise():
    model, params, adapters = made()
    dense = gates_of(model, params, adapters)
    for options in (dict(top_k=n), dict(top_k=n, mix="softmax_topk")):
        same, _, _ = made(**options)
        np.testing.assert_allclose(
            hidden(same, params, adapters, batch()), hidden(model, params, adapters, batch()), atol=1e-6
        )
    one, forced = (gates_of(made(top_k=1, mix=mix)[0], params, adapters) for mix in ("softmax", "softmax_topk"))
    for site in SITES:
        best = dense[site].max(axis=-1)[:, KEEP]
        np.testing.assert_allclose(one[site].sum(axis=-1)[:, KEEP], best, rtol=1e-6)
        assert (best < 1).all() and ((one[site] > 0).sum(axis=-1)[:, KEEP] == 1).all()
        np.testing.assert_array_equal(forced[site].sum(axis=-1)[:, KEEP], 1.0)
        assert (one[site][:, ~KEEP] == 0).all(), "padding has no expert"


def test_raw_logits_temperature_and_gain():
    model, params, adapters = made()
    dense, raw = gates_of(model, params, adapters), gates_of(made(mix="raw")[0], params, adapters)
    cold = gates_of(made(temperature=0.5, gain=3.0)[0], params, adapters)
    for site in SITES:
        z = raw[site][:, KEEP]
        np.testing.assert_allclose(dense[site][:, KEEP], jax.nn.softmax(z), rtol=1e-5)
        np.testing.assert_allclose(cold[site][:, KEEP], 3 * jax.nn.softmax(2 * z), rtol=1e-5)
    top = gates_of(made(mix="raw", top_k=1)[0], params, adapters)["q"][:, KEEP]
    np.testing.assert_allclose(top.sum(-1), raw["q"][:, KEEP].max(-1), rtol=1e-6)  # may be negative: still the gate


def test_the_temperature_belongs_to_the_softmax_and_the_choice_to_the_logits():
    """Raw gates are the logits at any T; at a T where all but one probability round to 0, k experts are still the k."""
    model, params, adapters = made(mix="raw")
    z = gates_of(model, params, adapters)
    cold = dict(temperature=1e-4)
    same = gates_of(made(mix="raw", **cold)[0], params, adapters)
    two = gates_of(made(mix="raw", top_k=2, **cold)[0], params, adapters)
    chosen = run(made(top_k=2, **cold)[0], params, adapters, batch())[1]["mix"]["000-002"]
    for site in SITES:
        np.testing.assert_array_equal(same[site], z[site])
        second = np.sort(z[site], axis=-1)[..., -2:-1]
        wanted = np.where(z[site] >= second, z[site], 0.0)
        np.testing.assert_array_equal(two[site][:, KEEP], wanted[:, KEEP])
        count = (z[site] >= second)[:, KEEP].sum(axis=1)
        np.testing.assert_array_equal(chosen[site]["expert_load"]["count"], count)


def test_acceptance_6_the_second_sample_does_not_alter_the_first():
    model, params, adapters = made(top_k=2, mix="softmax_topk")
    one, other = batch(), batch()
    other["tokens"] = np.concatenate([one["tokens"][:1], (one["tokens"][1:] + 7) % SMALL.vocab])
    a, b = (gates_of(model, params, adapters, data) for data in (one, other))
    for site in SITES:
        np.testing.assert_array_equal(a[site][:, 0], b[site][:, 0])
        assert (a[site][:, 1] != b[site][:, 1]).any()


def test_acceptance_7_layerwise_scalings_and_head_sizes():
    def head(model, adapters):
        flat = trees.flatten_dict(adapters, sep="/")
        return count({p: x for p, x in flat.items() if not p.endswith(("/A", "/B"))})

    model, params, adapters = made()
    Lw = SMALL.layers * len(SITES)
    assert head(model, adapters) == D * n * Lw + n * Lw
    gates = gates_of(model, params, adapters)
    assert (gates["q"] != gates["down"]).any() and (gates["q"][0] != gates["q"][1]).any()

    one, params, adapters = made(share="model")
    assert head(one, adapters) == D * n + n
    _, sums, given = run(one, params, adapters, batch(), collect=True)
    assert given["mix"]["model"]["model"].shape == (1, *KEEP.shape, n), "one decision for every linear"
    assert set(sums["mix"]) == {"model"} and adapters["mix"]["shared"]["router"]["model"]["W"].shape == (1, n, D)
    assert head(*made(bias=False)[::2]) == D * n * Lw
    H = 16
    assert head(*made(depth=3, width=H)[::2]) == (D * H + H) + (H * H + H) + H * n * Lw + n * Lw

    big = dataclasses.replace(SMALL, layers=32, width=4096, ffn_width=14336, heads=32, kv_heads=8, head_dim=128)
    config = helpers.rules_config(rule("9", sites="q,k,v,o,gate", rank=16))
    shapes = {
        s: {"kernel": jax.ShapeDtypeStruct((32, *big.dims(s)), jnp.float32)} for s in ("q", "k", "v", "o", "gate")
    }
    model = helpers.compile_model(config, big)
    tree = jax.eval_shape(model.init_adapters, jax.random.key(0), {"blocks": shapes})
    assert 2 * head(model, tree) == (4096 + 1) * 9 * 160 * 2 == 11_799_360  # the released head: 11.8 MB in bfloat16


@pytest.mark.parametrize(
    "options", [dict(), dict(share="model", depth=2, width=16), dict(share="ffn", sites="gate,up,down")]
)
def test_acceptance_8_prefixes_keep_their_gates_and_a_cache_changes_nothing(options):
    model, params, adapters = made(**options)
    whole = dict(batch(), segment_ids=np.ones((2, helpers.S), np.int32))
    whole["positions"] = np.broadcast_to(np.arange(helpers.S, dtype=np.int32), (2, helpers.S))
    short = {name: value[:, :7] for name, value in whole.items()}
    a, b = (run(model, params, adapters, data, collect=True)[2]["mix"] for data in (whole, short))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x[:, :, :7], y, atol=1e-6), a, b)

    helpers.cache_changes_nothing(model, params, adapters)
    assert set(model.init_cache(1, 4, jnp.float32)) == {"own", "base"}


def test_dropout_of_the_head_needs_a_key_and_is_off_in_evaluation():
    model, params, adapters = made(depth=2, width=64)
    hidden_of = lambda train, key: model.hidden(params, adapters, {}, batch(), train=train, key=key)[0]  # noqa: E731
    go = jax.jit(hidden_of, static_argnums=0)
    keys = [jax.random.key(i) for i in (0, 1)]
    plain, first, again, other = go(False, None), go(True, keys[0]), go(True, keys[0]), go(True, keys[1])
    np.testing.assert_array_equal(first, again)
    assert (first != other).any() and (plain != first).any()


def test_route_task_sends_each_task_to_an_expert_of_its_own():
    model, params, adapters = made()
    hard = dataclasses.replace(model, route="task")
    gates = gates_of(hard, params, adapters)
    for site in SITES:
        np.testing.assert_array_equal(
            gates[site][:, KEEP], np.eye(n)[batch()["task_ids"]][None][:, KEEP].repeat(3, axis=0)
        )
    _, grads = gradient(hard, params, adapters, batch(), frozen=("*/router/*",))
    for site in SITES:
        moved = np.abs(grads["mix"]["000-002"][site]["B"]).max(axis=(0, 2, 3)) > 0
        assert moved.tolist() == [True, True, False], "tasks 0 and 1 are in the batch, 2 is not"
    assert "base" not in hard.init_cache(1, 4, jnp.float32), "no base pass while experts train apart"


# ---- whole runs ----------------------------------------------------------------------------------------------------


def config_of(folder, rules, steps, **schedule):
    config = helpers.rules_config(rules)
    for name in "ab":  # two tasks
        lines = [{"prompt": f"Say {name} {i}", "target": str(i % 7)} for i in range(40)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config.data.update(tasks=",".join(f"jsonl:{folder}/{name}.jsonl" for name in "ab"), seq_len=96)
    config.train.update(steps=steps, batch_size=8, save_every=steps)
    config.optim.update(learning_rate=1e-2, warmup=1)
    if schedule:
        config.schedule = schedule
    helpers.schema.validate(config)
    return config


def adapters_of(run, step):
    from molora_jax.runs.warm_start import load_adapters

    tree = load_adapters(str(run))
    assert json.loads((run / "checkpoints" / str(step) / "manifest.json").read_text())
    return tree


def test_experts_from_other_runs_are_exactly_those_runs(tmp_path):
    from molora_jax.training.loop import train

    quiet = dict(note=lambda text: None)
    plain = {
        "one": common.rule("q,down", adapter=common.adapter(rank=2, alpha=8.0, dropout=0.0)),
        "two": common.rule("q", layers="1-3", adapter=common.adapter("rslora", rank=4, alpha=3.0, dropout=0.0)),
    }
    for name, one in plain.items():
        train(config_of(tmp_path, {name: one}, 2), str(tmp_path / name), **quiet)
    runs = tuple(str(tmp_path / name) for name in plain)
    config = config_of(tmp_path, rule("2", load=runs, rank=5), 2)
    train(config, str(tmp_path / "mixed"), **quiet)
    got, one, two = (adapters_of(tmp_path / name, 2)[key] for name, key in
                     (("mixed", "mix"), ("one", "one"), ("two", "two")))  # fmt: skip
    delta = lambda A, B, s: s * np.einsum("erd,ero->edo", A, B)  # noqa: E731
    for layer in range(4):
        for site in SITES:
            own = got["000-003"][site]
            both = delta(own["A"][layer], own["B"][layer], ALPHA / 5)
            first = one["000-003"][site]
            np.testing.assert_allclose(both[0], delta(first["A"][layer], first["B"][layer], 4.0)[0], atol=1e-6)
            wanted = 0.0
            if site == "q" and layer:
                wanted = delta(two["001-003"][site]["A"][layer - 1], two["001-003"][site]["B"][layer - 1], 1.5)[0]
            np.testing.assert_allclose(both[1], wanted, atol=1e-6)
    assert np.abs(got["000-003"]["q"]["B"]).max() > 0

    for change, message in (
        (dict(rank=3), "adapter.rank: got 3; expected at least 4"),
        (dict(sites="q"), "sites: got no down of layer 0"),
    ):
        with pytest.raises(InputError, match=re.escape(f"method.rules.mix.{message}")):
            train(
                config_of(tmp_path, rule("2", load=runs, **dict(rank=5) | change), 2),
                str(tmp_path / message[:4]),
                **quiet,
            )


def test_two_stages_train_experts_apart_and_then_the_head(tmp_path):
    from molora_jax.training.loop import train

    s00 = dict(steps=0, tasks="", freeze="*/router/*,*/shared/*", set={}, route="task")
    s01 = dict(steps=0, tasks="", freeze="*/A,*/B", set={}, route="")
    config = config_of(tmp_path, rule("3"), 5, s00=s00, s01=s01)
    assert [(s.start, s.stop, s.route) for s in stages(config)] == [(0, 2, "task"), (2, 5, "")]
    config.train.save_every, config.train.keep = 1, 9
    train(config, str(tmp_path / "run"), note=lambda text: None)
    from molora_jax.runs.checkpoints import Checkpoints

    store, shape = Checkpoints(tmp_path / "run" / "checkpoints", keep=9), adapters_of(tmp_path / "run", 5)
    start, middle, end = (store.restore(s, {"adapters": shape})["adapters"]["mix"]["000-003"] for s in (0, 2, 5))
    for site in SITES:
        moved = np.abs(middle[site]["B"] - start[site]["B"]).max(axis=(0, 2, 3)) > 0
        assert moved.tolist() == [True, True, False], "two tasks, the third expert is idle"
        np.testing.assert_array_equal(middle[site]["B"], end[site]["B"])
        np.testing.assert_array_equal(start["router"][site]["W"], middle["router"][site]["W"])
        assert (middle["router"][site]["W"] != end["router"][site]["W"]).any()


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda tmp: (rule("3", load=(str(tmp), str(tmp))), {}), "method.rules.mix.experts"),
        (lambda tmp: (rule("1", load=(str(tmp / "gone"),)), {}), "method.rules.mix.load"),
        (lambda tmp: (rule(temperature=0.0), {}), "method.rules.mix.router.temperature"),
        (lambda tmp: (rule(mix="softmax_top"), {}), "method.rules.mix.router.mix"),
        (lambda tmp: (rule(), dict(route="hard")), "schedule.s00.route"),
        (lambda tmp: (dict(a=common.rule("q", adapter=common.adapter())), dict(route="task")), "schedule.s00.route"),
    ],
)
def test_what_does_not_fit_is_refused(make, field, tmp_path):
    rules, stage = make(tmp_path)
    config = common.get_config()
    config.method.rules = rules
    config.schedule.s00.update(stage)
    with pytest.raises(InputError, match=re.escape(field)):
        helpers.schema.validate(config)


def test_a_folder_that_is_no_run_of_plain_adapters_is_refused(tmp_path):
    from molora_jax.training.loop import train

    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="without a checkpoint"):
        config = config_of(tmp_path, rule("1", load=(str(tmp_path / "empty"),)), 2)
        train(config, str(tmp_path / "run"), note=lambda text: None)
    routed = dict(mix=rule("3")["mix"] | dict(router=dict(name="softmax_topk", k=1, share="site")))
    train(config_of(tmp_path, routed, 1), str(tmp_path / "routed"), note=lambda text: None)
    dora = dict(mix=common.rule("q,down", adapter=common.adapter("dora", rank=2, dropout=0.0)))
    train(config_of(tmp_path, dora, 1), str(tmp_path / "dora"), note=lambda text: None)
    for name, message in (("routed", "is a mixture"), ("dora", "whose adapter is Dora")):
        with pytest.raises(InputError, match=message):
            config = config_of(tmp_path, rule("1", load=(str(tmp_path / name),)), 2)
            train(config, str(tmp_path / f"on_{name}"), note=lambda text: None)
