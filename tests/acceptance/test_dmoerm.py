"""The acceptance list of DMoERM: pairs, three phases, hidden states of capability experts fused by category."""

import dataclasses
import functools
import json
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common, dmoerm
from molora_jax import config as schema
from molora_jax.backbones.compile import compile_model
from molora_jax.data.pairs import judged, of_ranking
from molora_jax.errors import InputError
from molora_jax.evaluation.rewards import best_of, user_turns
from molora_jax.objectives import Forward, compile_objective
from molora_jax.runs.modules import Modules
from molora_jax.training.step import fresh, make_step
from tests.acceptance import helpers
from tests.acceptance.helpers import SMALL
from tests.battery.cases import eagerly

TASKS = ("chat", "chat.a", "chat.b", "code", "code.a")
POINTS = ("chat:chat.a", "chat:chat.b", "code:code.a")  # categories of two points and of one
HEAD, SEGMENT = "reward_experts", "000-002"
D = SMALL.width


def rows(task="chat", n=24):
    answers = [("yes " * (1 + i % 3), f"no {i % 5}") for i in range(n)]
    return [dict(task=task, prompt=f"{task} {i}?", chosen=a, rejected=b) for i, (a, b) in enumerate(answers)]


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for task in TASKS for row in rows(task)))
    return path


@pytest.fixture(scope="module")
def config(pairs_file):
    made = dmoerm.get_config(POINTS, f"jsonl:{pairs_file}")
    made.base.source = "random:tiny"
    for rule in made.method.rules.values():
        rule.adapter.update(rank=3, alpha=6.0, dropout=0.0)
    schema.validate(made)
    return made


@pytest.fixture(scope="module")
def made(config):
    """`(model, params, adapters and heads away from their start)`."""
    model, params = compile_model(config, SMALL, max_segments=2, tasks=TASKS), helpers.base()
    adapters = helpers.randomised(helpers.fresh_adapters(model, jax.random.key(0), params))
    heads = compile_objective(config.objective).init_heads(jax.random.key(1), D, 0)
    return model, params, adapters, helpers.randomised(heads)


def objective(form="fused", points=POINTS):
    return compile_objective(dict(name=HEAD, form=form, points=points))


def batch(tasks=((0, 3), (3, 0)), length=12, seed=0):
    """Two pairs of rows, two answers a row of 5 and 4 tokens; `tasks` of both answers of each pair of rows."""
    rng = np.random.default_rng(seed)
    segment_ids = np.zeros((4, length), np.int32)
    segment_ids[:, :5], segment_ids[:, 5:9] = 1, 2
    tokens = rng.integers(1, SMALL.vocab, (4, length)).astype(np.int32)
    task_ids = np.zeros((4, length), np.int32)
    for row in range(4):
        task_ids[row, :5], task_ids[row, 5:9] = tasks[row // 2]
    positions = np.array([[*range(5), *range(4), *[0] * (length - 9)]] * 4, np.int32)
    return dict(
        tokens=tokens, targets=tokens, segment_ids=segment_ids, positions=positions, task_ids=task_ids,
        example_ids=segment_ids, loss_weight=(segment_ids > 0).astype(np.float32),
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("model", "objective"))
def rewards(model, params, adapters, heads, data, objective):
    hidden = lambda data: model.hidden(params, adapters, {}, data)[0]  # noqa: E731
    return objective.rewards(Forward(model, params, hidden, 12), heads, {}, data)[0]


@functools.partial(jax.jit, static_argnames="model")
def states(model, params, adapters, data):
    return model.hidden(params, adapters, {}, data)[0]


class Stand(types.SimpleNamespace):
    """A model whose rewards are given: hidden states with the reward in the first place."""

    max_segments, tasks = 1, ("a",)


def loss_of(chosen, rejected, name="preference"):
    """The objective's loss and accuracy of pairs, a row each, whose rewards are given."""
    s = np.stack([np.asarray(chosen), np.asarray(rejected)], axis=1).reshape(-1)
    data = dict(segment_ids=np.ones((len(s), 3), np.int32), tokens=np.zeros((len(s), 3), np.int32),
                task_ids=np.zeros((len(s), 3), np.int32))  # fmt: skip
    hidden = np.zeros((len(s), 3, 2), np.float32)
    hidden[:, 2, 0] = s
    options = dict(name=name) | (dict(form="category", points=("a:a",)) if name == HEAD else {})
    made = compile_objective(options)
    heads = dict(kernel=jnp.array([1.0, 0.0] if name == "preference" else [[1.0, 0.0]]))

    @jax.jit
    def found(hidden):
        return made.loss(Forward(Stand(), {}, lambda _: hidden, 3), heads, {}, data, made.norm(data))

    value, metrics = found(hidden)
    return float(value), float(metrics["accuracy"])


@pytest.mark.parametrize("name", ["preference", HEAD])
def test_acceptance_1_equal_rewards_constants_and_ties(name):
    np.testing.assert_allclose(loss_of([0.3, -2.0], [0.3, -2.0], name)[0], np.log(2), rtol=1e-6)
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 5))
    np.testing.assert_allclose(loss_of(a, b, name)[0], np.mean(np.log1p(np.exp(b - a))), rtol=1e-5)
    np.testing.assert_allclose(loss_of(a + 3, b + 3, name)[0], loss_of(a, b, name)[0], rtol=1e-5)
    assert of_ranking("?", ["x", "y"], [1, 1]) == []
    assert len(of_ranking("?", ["x", "y", "z"], [1, 2, 2])) == 2


def test_acceptance_2_three_ranked_answers_are_three_pairs():
    reward = dict(best=1.0, middle=0.2, worst=-0.7)
    found = of_ranking("?", ["middle", "worst", "best"], [2, 3, 1])
    assert {(r["chosen"], r["rejected"]) for r in found} == {("best", "middle"), ("best", "worst"), ("middle", "worst")}
    value, _ = loss_of([reward[r["chosen"]] for r in found], [reward[r["rejected"]] for r in found])
    pairs = (("best", "middle"), ("best", "worst"), ("middle", "worst"))
    each = [np.log1p(np.exp(-(reward[a] - reward[b]))) for a, b in pairs]
    np.testing.assert_allclose(value, np.mean(each), rtol=1e-6)


def test_trap_a_reward_of_the_true_quality_is_right_every_time_and_large_differences_are_finite():
    quality = np.arange(6.0)
    found = of_ranking("?", list(map(str, range(6))), (6 - quality).astype(int).tolist())  # rank 1 has the most
    value, accuracy = loss_of([float(r["chosen"]) for r in found], [float(r["rejected"]) for r in found])
    assert accuracy == 1.0
    assert loss_of([0.0], [1000.0])[0] == 1000.0 and loss_of([1000.0], [0.0])[0] == 0.0, "softplus, no log(sigmoid)"


def _step(config, made, stage, data, steps=2):
    """`(before, after)`: adapters and heads by path, around a few real steps of a stage."""
    from flax.traverse_util import flatten_dict

    from molora_jax.optim import OPTIMIZERS
    from molora_jax.regimes.stages import stages

    model, params, adapters, heads = made
    (own,) = [s for s in stages(config) if s.name == stage]
    options = dict(own.config.optim)
    member = OPTIMIZERS[options.pop("name")](**options | dict(warmup=0, decay="constant"))
    frozen = model.frozen_patterns() + own.freeze
    modules = Modules(((HEAD, objective()),), (), D, 0)
    optimizer = member.make(10, {})
    state = eagerly(fresh, model, optimizer, params, frozen, jax.random.key(0), modules.init)
    state = state.replace(adapters=adapters, modules={HEAD: heads})
    step = jax.jit(make_step(
        model, optimizer, member.schedule(10), clip=0.0, frozen=frozen, seed=0, accumulate=1, targets_per_row=12,
        constrain=lambda x: x, objective=compile_objective(own.config.objective), head=HEAD,
    ))  # fmt: skip
    before = flatten_dict(jax.device_get(state.leaves), sep="/")
    for _ in range(steps):
        state, metrics = step(state, params, data)
    assert np.isfinite(metrics["loss"]) and int(state.skipped) == 0
    return before, flatten_dict(jax.device_get(state.leaves), sep="/")


def _moved(before, after):
    return {path for path in before if not np.array_equal(before[path], after[path])}


def test_acceptance_3_phase_2_trains_one_point_and_phase_3_the_fusion_alone(config, made):
    """The base is no leaf of the state: it cannot move."""
    before, after = _step(config, made, "s01", batch(((1, 1), (1, 1))))  # rows of chat.a, point 0
    moved = _moved(before, after)
    assert moved == {f"points/{SEGMENT}/{site}/{leaf}" for site in "qv" for leaf in "AB"} | {f"modules/{HEAD}/points"}
    for path in moved:  # other points' experts and heads keep their bits
        axis = 1 if path.startswith("points/") else 0
        same = [np.array_equal(*(np.take(x[path], e, axis=axis) for x in (before, after))) for e in range(3)]
        assert same == [False, True, True], path
    before, after = _step(config, made, "s02", batch())
    fuse = {f"modules/{HEAD}/fuse_{leaf}" for leaf in ("U", "b", "slope", "w")}
    assert _moved(before, after) == fuse, "a constant of a category moves no difference of its rewards"
    before, after = _step(config, made, "s00", batch())
    moved = _moved(before, after)
    assert {path.split("/")[0] for path in moved} == {"first", "modules"}
    assert {path for path in moved if path.startswith("modules")} == {f"modules/{HEAD}/kernel"}


@pytest.mark.parametrize("form", ["category", "point", "fused"])
def test_acceptance_4_padding_on_the_right_does_not_change_a_reward(made, form):
    short, long = (batch(length=n) for n in (9, 12))
    long["tokens"][:, :9] = short["tokens"]
    a, b = (rewards(*made, data, objective(form)) for data in (short, long))
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    other = dict(long, tokens=np.where(long["segment_ids"] > 0, long["tokens"], 3))
    np.testing.assert_array_equal(b, rewards(*made, other, objective(form)))


def test_acceptance_5_phase_2_begins_at_the_reward_of_phase_1(made):
    model, params, adapters, heads = made
    silent = jax.tree.map(lambda x: x, adapters)
    for site in "qv":
        silent["points"][SEGMENT][site]["B"] = 0 * silent["points"][SEGMENT][site]["B"]
    start = heads | {"points": 0 * heads["points"]}
    of_category, of_first, of_second = (batch(((t, t), (t, t))) for t in (0, 1, 2))
    h = [states(model, params, silent, data) for data in (of_category, of_first, of_second)]
    keep = of_category["segment_ids"] > 0
    np.testing.assert_allclose(h[0][keep], h[1][keep], atol=1e-6)
    np.testing.assert_allclose(h[0][keep], h[2][keep], atol=1e-6)
    wanted = rewards(model, params, silent, start, of_category, objective("category"))
    for data in (of_first, of_second):
        np.testing.assert_allclose(rewards(model, params, silent, start, data, objective("point")), wanted, atol=1e-5)
    fresh_heads = objective().init_heads(jax.random.key(0), D, 0)
    assert not fresh_heads["points"].any() and (fresh_heads["fuse_slope"] == 0.25).all()
    loud = rewards(model, params, adapters, start, of_first, objective("point"))
    assert np.abs(loud - wanted).max() > 1e-3, "with its own LoRA a point has its own state"


def test_acceptance_6_the_order_of_points_is_that_of_the_blocks(made, config):
    model, params, adapters, heads = made
    data = batch()
    wanted = rewards(model, params, adapters, heads, data, objective())
    swapped = ("chat:chat.b", "chat:chat.a", "code:code.a")
    U = heads["fuse_U"].at[0].set(heads["fuse_U"][0][::-1])
    got = rewards(model, params, adapters, heads | {"fuse_U": U}, data, objective(points=swapped))
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
    wrong = rewards(model, params, adapters, heads, data, objective(points=swapped))
    assert np.abs(wrong - wanted).max() > 1e-3
    # experts in another order, each with its own leaves
    perm = jnp.array([1, 0, 2])
    moved = jax.tree.map(lambda x: x, adapters)
    for site in "qv":
        moved["points"][SEGMENT][site] = {n: x[:, perm] for n, x in adapters["points"][SEGMENT][site].items()}
    router = dataclasses.replace(model.rules[1].router, tasks=("chat.b", "chat.a", "code.a"))
    other = dataclasses.replace(model, rules=(model.rules[0], dataclasses.replace(model.rules[1], router=router)))
    np.testing.assert_allclose(rewards(other, params, moved, heads, data, objective()), wanted, rtol=1e-5, atol=1e-5)
    assert schema.to_dict(config.objective)["points"] == list(POINTS), "kept with the run's config"


def test_the_fused_reward_in_float64(made):
    """Each pass by itself, every token at the expert of that point; PReLU between two linear maps."""
    model, params, adapters, heads = made
    data = batch()
    got = rewards(model, params, adapters, heads, data, objective())
    p = {k: np.asarray(v, np.float64) for k, v in heads.items()}
    tasks_of = {0: (1, 2), 3: (4,)}  # chat: chat.a, chat.b; code: code.a
    for row in range(4):
        for segment, end in ((1, 4), (2, 8)):
            category = int(data["task_ids"][row, end])
            parts = []
            for task in tasks_of[category]:
                own = dict(data, task_ids=np.where(data["segment_ids"] > 0, task, 0).astype(np.int32))
                parts.append(np.asarray(states(model, params, adapters, own), np.float64)[row, end])
            c = 0 if category == 0 else 1
            z = sum(h @ p["fuse_U"][c, j] for j, h in enumerate(parts)) + p["fuse_b"][c]
            z = np.where(z > 0, z, p["fuse_slope"][c] * z)
            np.testing.assert_allclose(got[row, segment - 1], z @ p["fuse_w"][c] + p["fuse_a"][c], rtol=1e-4, atol=1e-5)


def test_acceptance_7_an_input_reaches_exactly_one_inner_model(made):
    model, params, adapters, heads = made
    data = batch(((0, 0), (0, 0)))
    wanted = rewards(model, params, adapters, heads, data, objective())
    other = jax.tree.map(lambda x: x, adapters)
    for rule, expert in (("first", 1), ("points", 2)):  # all that belongs to the category code
        other[rule][SEGMENT] = jax.tree.map(lambda x, e=expert: x.at[:, e].set(7.0), adapters[rule][SEGMENT])
    changed = {n: x.at[1].set(9.0) if n != "points" else x.at[2].set(9.0) for n, x in heads.items()}
    np.testing.assert_array_equal(rewards(model, params, other, changed, data, objective()), wanted)
    gates = np.asarray(helpers.run(model, params, adapters, data, collect=True)[2]["first"]["model"]["model"][0])
    keep = data["segment_ids"] > 0
    np.testing.assert_array_equal(gates[keep], np.array([[1.0, 0.0]] * keep.sum()))


def test_acceptance_7_the_outer_router_is_measured_on_prompts_of_its_own(tmp_path):
    """A run of `classify`: accuracy on the held-out split, none of whose texts train; its class is one category."""
    from molora_jax.evaluation.rewards import categories
    from molora_jax.evaluation.run import load_run
    from molora_jax.training.loop import train

    path = tmp_path / "turns.jsonl"
    asked = lambda c, i: user_turns([dict(role="user", content=f"{c} question {i}")])  # noqa: E731
    texts = [(asked(c, i), c) for i in range(60) for c in ("chat", "code")]
    path.write_text("".join(json.dumps(dict(text=text, label=label)) + "\n" for text, label in texts))
    made = common.get_config()
    made.base.source, made.objective = "random:tiny", dict(name="classify", pooling="last")
    made.data.update(tasks=f"jsonl:{path}", seq_len=64, test_share=0.2)
    made.method.rules = dict(all=common.rule("q,v", adapter=common.adapter(rank=2)))
    made.train.update(steps=2, batch_size=8, save_every=0, eval_every=2)
    schema.validate(made)
    train(made, str(tmp_path / "run"))
    run = load_run(tmp_path / "run")
    split = run.data.splits
    of = lambda name: {split[name].example(i).prompt for i in range(len(split[name].length))}  # noqa: E731
    assert len(of("test")) > 5 and not of("train") & of("test") and not of("train") & of("valid")
    found = categories(run, [text for text, _ in texts[:6]])
    assert set(found) <= {"chat", "code"} and len(found) == 6
    assert np.isfinite(run.metrics()[-1]["valid_nll"])


def test_acceptance_8_a_biased_judge_gives_no_labels():
    rows = [("?", "a", "bb"), ("!", "ccc", "d")]
    longer = lambda prompt, first, second: 1 if len(first) > len(second) else 2  # noqa: E731
    found = [(row["prompt"], row["chosen"], row["rejected"]) for row in judged(rows, longer)]
    assert found == [("?", "bb", "a"), ("!", "ccc", "d")]
    assert judged(rows, lambda *_: 1) == judged(rows, lambda *_: 2) == []
    torn = lambda prompt, first, second: 1 if prompt == "?" else longer(prompt, first, second)  # noqa: E731
    assert [row["prompt"] for row in judged(rows, torn)] == ["!"]


def test_trap_phases_1_and_3_have_no_prompt_in_common(config, pairs_file):
    from molora_jax.data.dataset import build
    from molora_jax.io.base import load_base
    from molora_jax.regimes import compile_regime
    from molora_jax.regimes.stages import stages

    with pairs_file.open("a") as file:  # a prompt with several answers stays whole
        file.writelines(json.dumps(row | dict(rejected="another")) + "\n" for row in rows("chat"))
    tokenizer = load_base("random:tiny").tokenizer
    data = build(config.data, tokenizer=tokenizer, batch_size=8, seed=0, reads="pair", unit=2)
    regime, own = compile_regime(config), {s.name: s for s in stages(config)}
    prompts = {}
    for name in ("s00", "s02"):
        source = regime.source(data, config, own[name])
        members = [m for task in source.task_ids for m in source.members(task).tolist()]
        prompts[name] = {data.splits["train"].example(m).prompt for m in members}
        assert {data.task_names[i] for i in source.task_ids} == {"chat", "code"}
    assert not prompts["s00"] & prompts["s02"]
    share = len(prompts["s00"]) / len(prompts["s00"] | prompts["s02"])
    assert 0.4 < share < 0.8, share


def test_flagged_phase_3_reads_states_without_dropout(config):
    from molora_jax.regimes.stages import stages

    shipped = {s.name: s.config for s in stages(dmoerm.get_config())}
    rates = {name: {rule.adapter.dropout for rule in c.method.rules.values()} for name, c in shipped.items()}
    assert rates == {"s00": {0.05}, "s01": {0.05}, "s02": {0.0}}


def test_a_run_of_three_phases_gives_rewards(config, tmp_path):
    """Trained, opened by name of task, asked for rewards in any order; the best of N."""
    from molora_jax.evaluation.rewards import rewards
    from molora_jax.evaluation.run import load_run
    from molora_jax.training.loop import train

    own = config.copy_and_resolve_references()
    own.train.update(steps=6, batch_size=16, save_every=0)
    train(own, str(tmp_path / "run"))
    run = load_run(tmp_path / "run")
    assert run.model.tasks == TASKS and run.objective.form == "fused"
    prompts, answers = ["chat 1?", "code 2?", "chat 1?"], ["yes", "no", "yes yes"]
    found = rewards(run, prompts, answers, ["chat", "code", "chat"])
    back = rewards(run, prompts[::-1], answers[::-1], ["chat", "code", "chat"])
    assert np.isfinite(found).all() and len(set(found.tolist())) == 3
    np.testing.assert_allclose(found, back[::-1], rtol=1e-4, atol=1e-5)
    assert rewards(run, ["chat 1?"], ["yes"], ["code"])[0] != found[0], "another category, another reward"
    assert best_of(np.array([[0.0, 2.0, 1.0], [3.0, 2.0, 4.0]]), 2).tolist() == [1, 0]
    with pytest.raises(InputError, match="tasks: got 'cheese'"):
        rewards(run, ["a"], ["b"], ["cheese"])
    with pytest.raises(InputError, match="answers"):
        rewards(run, ["a"], ["b", "c"], ["chat"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(points=()), "objective.points: got none"),
        (dict(points=("chat",)), "objective.points: got 'chat'"),
        (dict(points=("a:b", "a:b")), "objective.points: got one of them twice"),
    ],
)
def test_bad_points_are_refused(change, words):
    with pytest.raises(InputError, match=re.escape(words)):
        compile_objective(dict(name=HEAD, form="fused", points=POINTS) | change)


def test_tasks_without_a_place_are_refused(made):
    with pytest.raises(InputError, match=r"data.tasks: got 'poems', of no category"):
        objective().tables((*TASKS, "poems"))
    with pytest.raises(InputError, match=r"objective.points: got 'code:code.a', a point without rows"):
        objective().tables(TASKS[:-1])
    for rows_, good in (("0-60", True), ("60-0", False), ("0-101", False), ("half", False)):
        own = dmoerm.get_config()
        own.schedule.s00.rows = rows_
        if good:
            schema.validate(own)
        else:
            with pytest.raises(InputError, match=r"schedule.s00.rows"):
                schema.validate(own)
    own = dmoerm.get_config()
    own.method.rules.points.router.tasks = ("morph", "sentimant")
    with pytest.raises(InputError, match=r"method.rules.points.router.tasks: got 'sentimant'"):
        schema.validate(own)
