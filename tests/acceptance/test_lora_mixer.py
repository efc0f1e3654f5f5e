"""LoRA-Mixer: the acceptance list of its specification, item by item (the numbers are the list's)."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from configs import common, lora_mixer
from molora_jax import config as schema
from molora_jax.backbones.families import TINY_MAMBA
from molora_jax.core import routing
from molora_jax.core.types import Routing, Site
from molora_jax.errors import InputError
from molora_jax.losses import LOSSES
from molora_jax.regimes.stages import stages
from molora_jax.routers import ROUTERS
from molora_jax.training.loop import train
from tests.acceptance import small
from tests.regimes import small as runs
from tests.surgery import make

ROUTER, RSL, KEPT = ROUTERS["soft_topk"], LOSSES["specialisation"], LOSSES["preservation"]
E, D = 4, 16
RULE = "method__rules__mix__"
MAMBA = dataclasses.replace(TINY_MAMBA, layers=2, width=32, inner=48, state=4, rank=3, vocab=64)
BASES = {"attention": (small.DECODER, "q,o"), "state space": (MAMBA, "in_proj,out_proj")}
# acceptance 6: what stands under `on_both` holds of either block, by the same rule with other sites
on_both = pytest.mark.parametrize("base", BASES)


def build(base="attention", k=2, **changes):
    """Four experts on the projections into and out of a block, without dropout and stages; every leaf random."""
    decoder, sites = BASES[base]
    fixed = {f"{RULE}experts": str(E), f"{RULE}router__k": k, f"{RULE}sites": sites}
    return small.build("lora_mixer", decoder=decoder, **fixed | changes)


@functools.partial(jax.jit, static_argnames=("model", "train"))
def hidden(model, params, adapters, data, train=False):
    return model.hidden(params, adapters, {}, data, train=train, key=jax.random.key(0) if train else None)[0]


def by_task(model):
    return dataclasses.replace(model, route="task")


@on_both
def test_acceptance_1_and_6_gates_by_task_are_the_weight_of_the_tasks_own_expert(base):
    """`small.batch`: the first example of a row has task 3, the second task 0; the weights are merged in float64."""
    model, params, adapters, _ = build(base)
    (segment,) = (name for name in adapters["mix"] if name != "shared")
    data, rule = small.batch(), model.rules[0]
    got, keep = np.asarray(hidden(by_task(model), params, adapters, data)), data["segment_ids"] > 0
    own = adapters["mix"][segment]
    for task in (3, 0):
        changed = {name: dict(kernels) for name, kernels in params["blocks"].items() if isinstance(kernels, dict)}
        for site in rule.sites:
            A, B = (np.asarray(own[site][leaf][:, task % E], np.float64) for leaf in "AB")  # [L, R, D]
            W = np.asarray(params["blocks"][site]["kernel"], np.float64)
            W = W + rule.adapter.scale() * np.einsum("lrd,lro->ldo", A, B)
            changed[site]["kernel"] = jnp.asarray(W, jnp.float32)
        merged = params | {"blocks": params["blocks"] | changed}
        wanted = np.asarray(hidden(model.without_rules(), merged, {}, data))
        here = keep & (data["task_ids"] == task)
        np.testing.assert_allclose(got[here], wanted[here], atol=2e-5)
    assert np.abs(got - np.asarray(hidden(model.without_rules(), params, {}, data)))[keep].max() > 0.1


@on_both
def test_acceptance_1_and_6_other_experts_and_the_router_get_no_gradient_in_stage_a(base):
    model, params, adapters, state = build(base)
    gradients = flatten_dict(small.lm_gradient(by_task(model), params, adapters, state, small.batch()), sep="/")
    for path, g in gradients.items():
        if "/router/" in path:
            assert not np.asarray(g).any(), path
            continue
        largest = np.abs(g).max(axis=(0, 2, 3))
        assert (largest[[1, 2]] == 0).all() and (largest[[0, 3]] > 0).all(), (path, largest)


def test_acceptance_1_stage_a_routes_by_task_and_leaves_the_router_alone():
    config = small.config("lora_mixer")
    first, second = stages(config)
    assert (first.route, second.route) == ("task", "") and first.freeze == ("*/router/*",) and second.freeze == ()
    assert (first.start, first.stop, second.stop) == (0, 100, 200)


@pytest.fixture(scope="module", params=BASES)
def mixed(request, tmp_path_factory):
    """Two LoRA runs of other ranks and scales, and a run of three steps that mixes them."""
    folder, ssm = tmp_path_factory.mktemp("mixed"), request.param == "state space"
    source, sites = ("random:tiny-mamba", "in_proj,dt_proj,out_proj") if ssm else ("random:tiny", "q,k,o")
    few = ",".join(site for site in sites.split(",") if site not in ("k", "dt_proj"))
    for seed, (name, rank, alpha) in enumerate((("one", 2, 8.0), ("two", 3, 1.5))):
        make.new_run(folder / name, make.lora_rules(rank, alpha, sites=few), seed=seed, source=source)
    config = lora_mixer.get_config(load=tuple(str(folder / name) for name in ("one", "two")), sites=sites)
    config.base.source = source
    config.data.update(tasks=f"jsonl:{folder / 'task.jsonl'}", seq_len=96)
    config.train.update(steps=3, batch_size=8, save_every=1, keep=9, log_every=99)
    config.optim.update(learning_rate=1e-2, warmup=0)
    config.eval.update(num_items=4, num_generated=0)
    train(config, str(folder / "run"), note=lambda text: None)
    return folder


def test_acceptance_2_and_6_imported_experts_keep_their_bits_while_the_router_learns(mixed):
    before, after = (runs.arrays(mixed / "run", step) for step in (0, 3))
    assert before.keys() == after.keys()
    for path in before:
        same = np.array_equal(before[path], after[path])
        assert same != ("/router/" in path), path
    opt = runs.arrays(mixed / "run", 3, "opt")
    assert not [path for path in opt if path.endswith(("/A", "/B"))], "no optimizer state for what is frozen"


def test_acceptance_2_and_6_alpha_over_rank_of_an_imported_expert_is_folded_in(mixed):
    ours = runs.arrays(mixed / "run", 3)
    sites = {path.split("/")[2] for path in runs.arrays(mixed / "one", 0)}
    assert len(sites) == 2
    for e, (name, scale) in enumerate((("one", 8.0 / 2), ("two", 1.5 / 3))):
        theirs = runs.arrays(mixed / name, 0)
        for site in sites:
            A, B = (theirs[f"all/000-003/{site}/{leaf}"][:, 0].astype(np.float64) for leaf in "AB")
            wanted = scale * np.einsum("lrd,lro->ldo", A, B)
            A, B = (ours[f"mix/000-003/{site}/{leaf}"][:, e].astype(np.float64) for leaf in "AB")
            np.testing.assert_allclose(2.0 * np.einsum("lrd,lro->ldo", A, B), wanted, atol=1e-6)
    (left,) = {path.split("/")[2] for path in ours} - {*sites, "router"}
    assert not ours[f"mix/000-003/{left}/B"].any(), "a projection that the runs leave alone"


def test_acceptance_2_paradigm_two_has_one_stage_and_no_preservation():
    config = lora_mixer.get_config(load=("runs/a", "runs/b"))
    assert list(config.schedule) == ["s00"] and config.schedule.s00.route == "" and "preservation" not in config.losses
    assert (config.method.rules.mix.experts, config.method.rules.mix.router.k) == ("2", 2)


@on_both
def test_acceptance_3_and_6_all_experts_in_use_are_the_soft_mixture_of_training(base):
    params, adapters = build(base)[1:3]
    data = small.batch()
    keep = data["segment_ids"] > 0
    trained = np.asarray(hidden(build(base, k=E)[0], params, adapters, data, train=True))[keep]
    for options in (dict(k=E), dict(k=1, **{f"{RULE}router__hard": "never"})):
        used = np.asarray(hidden(build(base, **options)[0], params, adapters, data))[keep]
        np.testing.assert_allclose(used, trained, atol=1e-5)
    top = np.asarray(hidden(build(base, k=1)[0], params, adapters, data))[keep]
    assert np.abs(top - trained).max() > 1e-2, "with fewer there is a gap"


def test_acceptance_3_the_three_strongest_are_kept_and_renormalised():
    probs = np.array([0.4, 0.3, 0.2, 0.1])
    np.testing.assert_allclose(small.from_probs(ROUTER(k=3), probs).gates[0, 0], [4 / 9, 3 / 9, 2 / 9, 0], rtol=1e-6)
    kept = small.from_probs(ROUTER(k=3, renormalise=False), probs)
    np.testing.assert_allclose(kept.gates[0, 0], [0.4, 0.3, 0.2, 0], rtol=1e-6)
    np.testing.assert_allclose(kept.probs[0, 0], probs, rtol=1e-6)
    soft = small.from_probs(ROUTER(k=3), probs, train=True)
    np.testing.assert_allclose(soft.gates[0, 0], probs, rtol=1e-6)
    assert (kept.k_max, soft.k_max) == (3, 4), "what is not used is not paid for"
    shut = small.from_probs(ROUTER(k=3), probs, allowed=jnp.array([True, False, True, False]))
    np.testing.assert_allclose(shut.gates[0, 0], [2 / 3, 0, 1 / 3, 0], rtol=1e-6)


@functools.partial(jax.jit, static_argnames=("loss", "max_segments"))
def loss_of(z, loss, **changes):
    """On logits `z [T, E]` of one router."""
    z = z[None]
    ctx = small.context(1, z.shape[1], **changes)
    p = routing.softmax(z)
    sums = loss.stats(Routing(p, p > 0, z, p, ctx.valid), ctx)
    return loss.value({"r": {"0": {"q": jax.tree.map(lambda v: v[None], sums)}}})


slope_of = jax.jit(jax.grad(loss_of), static_argnames=("loss", "max_segments"))


def test_acceptance_4_at_uniform_load_the_first_term_is_one_over_E():
    z = jnp.zeros((6, E))
    for loss in (
        RSL(lam=0.0, assigned="soft"),
        RSL(lam=0.0),
    ):  # of equal experts the first is the likeliest: f = 1, 0, ..
        np.testing.assert_allclose(loss_of(z, loss), 1 / E, rtol=1e-6)
    even = 1e-4 * jnp.tile(jnp.eye(E), (3, 1))  # each expert barely ahead in a quarter of the tokens
    np.testing.assert_allclose(loss_of(even, RSL(lam=0.0)), 1 / E, rtol=1e-6)
    np.testing.assert_allclose(loss_of(z, RSL(lam=0.5)), 1 / E + 0.5 * np.log(E), rtol=1e-6)
    np.testing.assert_allclose(loss_of(z, RSL(lam=0.5, entropy_sign=-1)), 1 / E - 0.5 * np.log(E), rtol=1e-6)


@pytest.mark.parametrize("sign", [1, -1])
def test_acceptance_4_both_signs_of_the_entropy(sign):
    """Gradient descent on the loss alone, on the logits of 64 tokens."""
    loss, z = (
        RSL(lam=0.2, entropy_sign=sign),
        jax.device_put(np.float32(np.random.default_rng(0).standard_normal((64, E)))),
    )

    def measures(z):
        p = np.asarray(jax.nn.softmax(z), np.float64)
        return p.mean(0), -(p * np.log(p)).sum(-1).mean()

    @jax.jit
    def descend(z):
        return jax.lax.fori_loop(0, 3000, lambda _, z: z - 5.0 * jax.grad(loss_of)(z, loss), z)

    (_, before), (load, after) = measures(z), measures(descend(z))
    np.testing.assert_allclose(load, 1 / E, atol=0.06)
    if sign > 0:
        assert after < 0.1 * before, "tokens become sure"
    else:
        assert after > 0.995 * np.log(E) > before, "the printed sign: they become unsure"


def closed_form(z, loss, f, share):
    """d l / d z in float64; `f` as assigned, `share`: the part of the slope of `sum pbar f` (2 where f is pbar)."""
    p = np.exp(z - z.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    h = -(p * np.log(p)).sum(-1, keepdims=True)
    balance = share * p * (f - (p * f).sum(-1, keepdims=True))
    return (balance + loss.entropy_sign * loss.lam * -p * (np.log(p) + h)) / len(z)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("assigned", ["tokens", "samples", "soft"])
def test_acceptance_5_the_gradient_is_the_closed_form(assigned, sign):
    loss, T = RSL(lam=0.3, entropy_sign=sign, assigned=assigned), 40
    z = np.random.default_rng(1).standard_normal((T, E))
    segment = jnp.asarray(1 + np.arange(T) // 8, jnp.int32)[None]
    got = slope_of(jnp.asarray(z, jnp.float32), loss, segment_ids=segment, max_segments=5)
    p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    scores = {"tokens": p, "samples": p.reshape(5, 8, E).mean(1), "soft": None}[assigned]
    f = p.mean(0) if scores is None else np.bincount(scores.argmax(-1), minlength=E) / len(scores)
    wanted = closed_form(z, loss, f, 2 if assigned == "soft" else 1)
    np.testing.assert_allclose(got, wanted, atol=1e-5 * np.abs(wanted).max())

    def value(z):
        p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
        held = p.mean(0) if assigned == "soft" else f  # the printed f has no slope
        return (p.mean(0) * held).sum() - sign * loss.lam * (p * np.log(p)).sum(-1).mean()

    np.testing.assert_allclose(
        loss_of(jnp.asarray(z, jnp.float32), loss, segment_ids=segment, max_segments=5), value(z), rtol=1e-5
    )
    move = np.random.default_rng(2).standard_normal(z.shape)
    slope = (value(z + 1e-6 * move) - value(z - 1e-6 * move)) / 2e-6
    np.testing.assert_allclose((wanted * move).sum(), slope, rtol=1e-5)


@pytest.mark.parametrize("assigned", ["tokens", "samples", "soft"])
def test_acceptance_5_padding_is_in_no_sum(assigned):
    loss, z = (
        RSL(lam=0.3, assigned=assigned),
        jax.device_put(np.float32(np.random.default_rng(3).standard_normal((12, E)))),
    )
    segment = jnp.asarray([1] * 4 + [2] * 4 + [0] * 4, jnp.int32)[None]
    padded = loss_of(z, loss, segment_ids=segment, valid=segment > 0, max_segments=3)
    plain = loss_of(z[:8], loss, segment_ids=segment[:, :8], max_segments=3)
    np.testing.assert_allclose(padded, plain, rtol=1e-6)
    slopes = slope_of(z, loss, segment_ids=segment, valid=segment > 0, max_segments=3)
    assert not np.asarray(slopes[8:]).any() and np.isfinite(slopes).all()


def leaves(seed=0):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jax.device_put(np.float32(rng.standard_normal(shape)))  # noqa: E731
    return {
        "mix": {
            "000-001": {
                "q": {"A": normal(2, E, 3, 5), "B": normal(2, E, 3, 6)},
                "router": {"attn": {"W": normal(2, E, 5)}},
            }
        }
    }


@pytest.mark.parametrize("chosen", ["", "0,2"])
def test_acceptance_7_preservation_is_0_where_it_begins_and_pulls_back_from_there(chosen):
    beta, loss, start, now = 0.7, KEPT(experts=chosen), leaves(), leaves(1)
    fresh = loss.fresh(start)
    assert float(loss.penalty(start, fresh)) == 0 and float(loss.penalty(now, fresh)) == 0, "nothing came before"
    memory = loss.remember(fresh, start, {})
    assert float(loss.penalty(start, memory)) == 0
    value, slope = jax.value_and_grad(lambda now: beta * loss.penalty(now, memory))(now)
    picked = np.isin(np.arange(E), [int(e) for e in chosen.split(",")] if chosen else range(E))[None, :, None, None]
    flat, total = flatten_dict(slope, sep="/"), 0.0
    for path, leaf in flatten_dict(now, sep="/").items():
        if "/router/" in path:
            assert not np.asarray(flat[path]).any()
            continue
        away = np.asarray(leaf, np.float64) - np.asarray(flatten_dict(start, sep="/")[path], np.float64)
        np.testing.assert_allclose(flat[path], 2 * beta * away * picked, rtol=1e-5, atol=1e-6)
        total += beta * (away**2 * picked).sum()
    np.testing.assert_allclose(value, total, rtol=1e-5)


def test_acceptance_7_frozen_experts_are_not_held_and_a_wrong_number_is_refused():
    loss = KEPT()
    memory = loss.remember(loss.fresh(leaves()), leaves(), {})
    router = {"mix": {"000-001": {"router": leaves(1)["mix"]["000-001"]["router"]}}}
    assert float(loss.penalty(router, memory)) == 0
    for wrong in ("4", "a", "0,-1"):
        with pytest.raises(InputError, match="losses.preservation.experts.*numbers of experts, 0 to 3"):
            KEPT(experts=wrong).penalty(leaves(1), memory)


def staged(data, **fields):
    """Two stages of three steps of a plain LoRA, the second held to where the first ended."""
    made = runs.config(data, regime=dict(name="stages"), losses=dict(preservation=dict(weight=0.5)), optim="adamw",
                       steps=6, **fields)  # fmt: skip
    stage = dict(steps=0, tasks="", freeze="", set={}, route="", objective={})
    made.schedule = dict(s00=dict(stage), s01=dict(stage))
    schema.validate(made)
    return made


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    folder = tmp_path_factory.mktemp("held")
    data = runs.write(folder)
    runs.start(staged(data), folder / "run")
    return folder / "run", data


def test_acceptance_7_a_run_is_held_to_where_its_first_stage_ended(held):
    values = [row["aux/preservation"] for row in runs.rows(held[0])]
    assert values[:4] == [0, 0, 0, 0] and min(values[4:]) > 0
    memory = runs.arrays(held[0], 6, "memory")
    for path, leaf in runs.arrays(held[0], 3).items():
        np.testing.assert_array_equal(memory[f"penalties/preservation/start/{path}"], leaf)
    away = lambda step: sum(  # noqa: E731
        ((leaf.astype(np.float64) - memory[f"penalties/preservation/start/{path}"]) ** 2).sum()
        for path, leaf in runs.arrays(held[0], step).items()
    )
    np.testing.assert_allclose(values[4], away(4), rtol=1e-5)  # of the leaves before the fifth step


@pytest.mark.parametrize("stop", [4, pytest.param(3, marks=pytest.mark.slow)])
def test_acceptance_7_a_kill_in_stage_b_changes_no_bit(held, tmp_path, stop):
    folder = runs.cut(held[0], tmp_path / "run", stop)
    runs.start(staged(held[1]), folder)
    assert runs.digests(folder, 6) == runs.digests(held[0], 6), "the memory included"
    assert runs.rows(folder) == runs.rows(held[0])


@pytest.mark.slow
def test_acceptance_7_a_run_that_starts_from_another_is_held_to_it(held, tmp_path):
    made = staged(held[1], init_from=str(held[0]))
    runs.start(made, tmp_path / "run")
    memory = runs.arrays(tmp_path / "run", 0, "memory")
    assert memory["penalties/preservation/begun"] == 1
    for path, leaf in runs.arrays(held[0], 6).items():
        np.testing.assert_array_equal(memory[f"penalties/preservation/start/{path}"], leaf)


@pytest.mark.slow
def test_acceptance_7_exact_runs_hold_it_too(held, tmp_path):
    made = common.get_config()
    made.base.source = "random:tiny"
    made.method.rules = dict(all=common.rule("q", adapter=common.adapter(rank=2, dropout=0.0)))
    made.losses = dict(preservation=dict(weight=0.5))
    made.data.update(tasks=held[1].replace("rows.jsonl", "text.jsonl"), seq_len=32)
    path = held[1].removeprefix("jsonl:").replace("rows.jsonl", "text.jsonl")
    with open(path, "w") as file:
        file.writelines(json.dumps(dict(prompt=f"say {i}", target=str(i))) + "\n" for i in range(60))
    stage = dict(steps=0, tasks="", freeze="", set={}, route="", objective={})
    made.schedule = dict(s00=dict(stage), s01=dict(stage))
    made.train.update(steps=4, batch_size=8, save_every=2, keep=9, exact=True)
    made.optim.update(learning_rate=1e-2, warmup=0)
    train(made, str(tmp_path / "run"), note=lambda text: None)
    values = [row["aux/preservation"] for row in runs.rows(tmp_path / "run")]
    assert values[:3] == [0, 0, 0] and values[3] > 0


def test_preservation_is_refused_where_nothing_keeps_it():
    config = small.config("lora_mixer")
    config.losses.ewc = dict(weight=1.0)
    with pytest.raises(InputError, match="losses.ewc.*a penalty under regime 'stages'.*among continual"):
        schema.validate(config)
    del config.losses.ewc
    config.regime = dict(name="federated")
    with pytest.raises(InputError, match="losses.preservation.*among continual, stages"):
        schema.validate(config)


def test_acceptance_6_experts_see_the_fused_width_of_in_proj():
    model, _, adapters, _ = build("state space")
    assert adapters["mix"]["000-001"]["in_proj"]["B"].shape == (2, E, 8, 2 * MAMBA.inner)
    assert adapters["mix"]["000-001"]["router"]["attn"]["W"].shape == (2, E, MAMBA.width)
    assert type(model.rules[0].router) is ROUTER and model.rules[0].share == "attn"


def test_one_router_serves_the_projections_of_a_layer_or_each_has_its_own():
    shapes = {}
    for share in ("attn", "site"):
        model, _, adapters, _ = build(**{f"{RULE}router__share": share})
        shapes[share] = adapters["mix"]["000-001"]["router"].keys()
    assert shapes["attn"] == {"attn"} and shapes["site"] == {"q", "o"}
    W = ROUTER().init_leaves(jax.random.key(0), Site("attn", D, D, (0,), E), 0)["W"]
    assert W.shape == (E, D)
