"""SteloCoder: the acceptance list of its specification, item by item (the numbers are the list's)."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import stelocoder
from molora_jax import config as schema
from molora_jax.catalogue import formulas
from molora_jax.core import trees
from molora_jax.decode import generate as decoding
from molora_jax.regimes.stages import stages
from molora_jax.routers import ROUTERS
from molora_jax.training.loop import train
from molora_jax.training.programs import compile_optimizer, knobs_of
from molora_jax.training.setup import setup
from tests.acceptance import helpers, small

GATE = ROUTERS["sequence_gate"]
E, D = 5, 16
RULE = "method__rules__mix__"


def build(hard="eval", **changes):
    """On `q` and `down`, and without stages."""
    return small.build("stelocoder", **{f"{RULE}sites": "q,down", f"{RULE}router__hard": hard} | changes)


def gate_scaled(adapters, factor):
    shared = jax.tree.map(lambda W: factor * W, adapters["mix"]["shared"])
    return {"mix": adapters["mix"] | {"shared": shared}}


def hidden(model, params, adapters, data):
    return np.asarray(helpers.hidden(model, params, adapters, data))


def gates_of(model, params, adapters, data, **options):
    return np.asarray(small.gates(model, params, adapters, {}, data, **options)["mix"]["model"]["model"][0])


def test_acceptance_1_parameters_of_an_expert_and_of_the_gate():
    shapes = dict(qkv=(6144, 6400), o=(6144, 6144), down=(24576, 6144))
    starcoder = types.SimpleNamespace(dims=shapes.get, layers=40, width=6144)
    assert starcoder.layers * formulas.low_rank(starcoder, shapes, 4) == 8_888_320
    W = GATE().init_leaves(jax.random.key(0), types.SimpleNamespace(experts=5, d_in=6144), 0)["W"]
    assert W.size == 30_720
    (rule,) = build()[0].rules
    assert rule.adapter.scale() == 8.0 and rule.adapter.rank == 4


def test_acceptance_2_a_gate_of_one_expert_is_that_expert_soft_or_hard():
    model, params, adapters, _ = build()
    adapters, data = gate_scaled(adapters, 1e4), small.batch()
    keep, soft = data["segment_ids"] > 0, build(hard="never")[0]
    gates = gates_of(model, params, adapters, data)
    np.testing.assert_allclose(gates_of(soft, params, adapters, data), gates, atol=1e-6)
    np.testing.assert_array_equal(np.sort(gates[keep], axis=-1), np.eye(E)[-1:].repeat(keep.sum(), 0))
    got = hidden(model, params, adapters, data)
    np.testing.assert_allclose(hidden(soft, params, adapters, data)[keep], got[keep], atol=2e-5)
    alone = dataclasses.replace(model, rules=(dataclasses.replace(model.rules[0], experts=(1, 1), router=None),))
    assert len(np.unique(gates[keep].argmax(-1))) > 1
    for e in np.unique(gates[keep].argmax(-1)):
        one = {"mix": {"000-001": jax.tree.map(lambda x, e=e: x[:, e : e + 1], adapters["mix"]["000-001"])}}
        here = keep & (gates.argmax(-1) == e)
        np.testing.assert_allclose(hidden(alone, params, one, data)[here], got[here], atol=2e-5)


def test_acceptance_3_the_gate_reads_embeddings_alone():
    model, params, adapters, _ = build(hard="never")
    data, rng = small.batch(), np.random.default_rng(1)
    gates = gates_of(model, params, adapters, data)
    other = params | {"blocks": jax.tree.map(lambda w: w + 0.1, params["blocks"])}
    np.testing.assert_array_equal(gates_of(model, other, adapters, data), gates)
    moved = data["tokens"].copy()
    for row, ids in enumerate(data["segment_ids"]):
        for segment in (1, 2):
            at = np.flatnonzero(ids == segment)
            moved[row, at] = moved[row, rng.permutation(at)]
    assert (moved != data["tokens"]).any()
    np.testing.assert_array_equal(gates_of(model, params, adapters, data | {"tokens": moved}), gates)
    changed = gates_of(model, params | {"embed": params["embed"][::-1]}, adapters, data)
    assert np.abs(changed - gates)[data["segment_ids"] > 0].max() > 1e-3


def route(router, W, x, **changes):
    return small.routed(router, {"W": W}, {}, x, small.context(*x.shape[:2], **changes))[0]


def inputs(rows=2, length=6):
    rng = np.random.default_rng(2)
    W, x = rng.standard_normal((E, D)) / 2, rng.standard_normal((rows, length, D))
    return jnp.asarray(W, jnp.float32), jnp.asarray(x, jnp.float32)


def test_acceptance_4_each_expert_has_a_maximum_of_its_own_that_never_falls():
    W, x = inputs()
    z = np.asarray(x @ W.T)
    tops = []
    for n in range(6):
        there = jnp.broadcast_to(jnp.arange(6) <= n, (2, 6))
        longer = route(GATE(), W, x, valid=there, segment_ids=there.astype(jnp.int32))
        tops.append(np.asarray(longer.logits[:, 0]))
    for n, top in enumerate(tops):
        np.testing.assert_allclose(top, z[:, : n + 1].max(1), atol=1e-6)
        assert (top >= tops[max(n - 1, 0)]).all()
    assert len(np.unique(z[0].argmax(0))) > 1, "experts find their maximum at other tokens"
    soft = np.exp(tops[-1]) / np.exp(tops[-1]).sum(-1, keepdims=True)
    np.testing.assert_allclose(route(GATE(), W, x, train=True).gates, np.repeat(soft[:, None], 6, 1), atol=1e-6)
    packed = jnp.asarray([[1, 1, 2, 2, 2, 0]] * 2, jnp.int32)
    found = route(GATE(), W, x, segment_ids=packed, valid=packed > 0, max_segments=2)
    np.testing.assert_allclose(found.logits[:, 0], z[:, :2].max(1), atol=1e-6, err_msg="an example of its own")
    np.testing.assert_allclose(found.logits[:, 3], z[:, 2:5].max(1), atol=1e-6)


def test_acceptance_5_only_the_gate_trains_and_equal_experts_teach_it_nothing():
    model, params, adapters, state = build(hard="never")
    last = stages(small.config("stelocoder"))[-1]
    trainable = trees.split(adapters, model.frozen_patterns() + last.freeze)[0]
    assert trainable["mix"].keys() == {"shared"} and jax.tree.leaves(trainable)[0].shape == (1, E, 32)
    of_gate = lambda a: small.lm_gradient(model, params, a, state, small.batch())["mix"]["shared"]  # noqa: E731
    assert np.abs(jax.tree.leaves(of_gate(adapters))[0]).max() > 1e-4
    same = jax.tree.map(lambda x: jnp.broadcast_to(x[:, :1], x.shape), adapters["mix"]["000-001"])
    np.testing.assert_allclose(jax.tree.leaves(of_gate({"mix": adapters["mix"] | {"000-001": same}}))[0], 0, atol=1e-6)


PROMPTS = [[5, 6, 7], [9, 11], [20, 3, 41, 40]]


def test_acceptance_6_the_prompt_chooses_once_so_a_cache_changes_nothing():
    model, params, adapters, state = build()
    answers = [
        decoding.generate(model, params, adapters, state, PROMPTS, max_new_tokens=8, eos_id=None, cache=cache)
        for cache in (True, False)
    ]
    assert answers[0] == answers[1]
    flips = 0
    for prompt, answer in zip(PROMPTS, answers[0], strict=True):
        text = np.array([prompt + answer], np.int32)
        data = dict(tokens=text, segment_ids=np.ones_like(text), positions=np.arange(text.shape[1])[None])
        first = {name: value[:, : len(prompt)] for name, value in data.items()}
        settled = jax.jit(model.settle)(params, adapters, state, first)
        chosen = gates_of(model, params, adapters, first)[0, 0].argmax()
        assert int(settled["mix"][0].argmax()) == chosen
        h = hidden(model, params, adapters, data | {"settled": settled})
        ids = np.asarray(model.logits(params, h))[0, len(prompt) - 1 : -1].argmax(-1)
        np.testing.assert_array_equal(ids, answer)
        flips += chosen != gates_of(model, params, adapters, data)[0, 0].argmax()
    assert flips, "chosen again over the longer text, the expert changes"


def test_acceptance_7_padding_has_no_part_in_the_maximum():
    W, x = inputs()
    x = x.at[:, 4:].multiply(9.0)  # what stands in the padding would win
    valid = lambda n: dict(valid=jnp.arange(n)[None] < jnp.full((2, 1), 4),  # noqa: E731
                           segment_ids=jnp.broadcast_to((jnp.arange(n) < 4).astype(jnp.int32), (2, n)))  # fmt: skip
    ours, theirs = GATE(hard="never"), GATE(hard="never", pool_padding=True)
    short = route(ours, W, x[:, :4]).gates
    for n in (4, 5, 6):
        np.testing.assert_allclose(route(ours, W, x[:, :n], **valid(n)).gates[:, :4], short, atol=1e-6)
    unmasked = route(theirs, W, x, **valid(6))
    np.testing.assert_allclose(unmasked.logits[:, 0], np.asarray(x @ W.T).max(1), atol=1e-5)
    assert np.abs(unmasked.gates[:, :4] - short).max() > 0.05


def write(path, rows):
    path.write_text("".join(json.dumps(dict(prompt=p, completion=c)) + "\n" for p, c in rows))
    return f"jsonl:{path}"


def curriculum(tmp_path):
    files = {
        name: write(tmp_path / f"{name}.jsonl", [(f"{name} {i}", str(i)) for i in range(30)])
        for name in ("cpp", "java", "cpp_long", "java_long")
    }
    config = stelocoder.get_config(snippets=(files["cpp"], files["java"]),
                                   programs=(files["cpp_long"], files["java_long"]))  # fmt: skip
    config.base.source, config.train.steps = "random:tiny", 30
    return config, files


def test_acceptance_8_snippets_before_programs_before_the_gate(tmp_path):
    config, files = curriculum(tmp_path)
    schema.validate(config)
    first, second, gate = stages(config)
    assert (first.tasks, second.tasks, gate.tasks) == (
        f"{files['cpp']},{files['java']}", f"{files['cpp_long']},{files['java_long']}", "",
    )  # fmt: skip
    assert (first.start, first.stop, second.stop, gate.stop) == (0, 10, 20, 30)
    assert [s.config.optim.learning_rate for s in (first, second, gate)] == [9e-5, 5e-5, 5e-5]
    assert (first.route, second.route, gate.route) == ("task", "task", "")
    experts = [i % 2 for i, _ in enumerate(config.data.tasks.split(","))]
    assert experts == [0, 1, 0, 1], "both levels of a language have one expert"
    rates = []
    for part in (first, second, gate):
        optimizer, knobs = compile_optimizer(part.config), knobs_of(part.config, part.start)
        rate = dataclasses.replace(optimizer, learning_rate=1.0).at(knobs.rates).schedule(part.stop - part.start)
        rates.append([float(rate(step)) / part.config.optim.learning_rate for step in range(part.start, part.stop)])
    np.testing.assert_allclose(rates, [np.arange(1, 11) / 10] * 3, rtol=1e-5, err_msg="a warm-up in each stage")


@pytest.mark.slow
def test_acceptance_8_a_run_sees_no_program_in_its_first_stage_and_restarts_its_rate(tmp_path):
    config, files = curriculum(tmp_path)
    config.optim.warmup = 1
    config.train.update(steps=12, batch_size=8, save_every=0, log_every=1)
    prepared = setup(config)
    for part, own in zip(stages(config), ({0, 1}, {2, 3}, {0, 1, 2, 3}), strict=True):
        source = prepared.data.train.for_tasks(part.tasks) if part.tasks else prepared.data.train
        rows = [source.batch(step) for step in range(4)]
        seen = np.concatenate([row["task_ids"][row["segment_ids"] > 0] for row in rows])
        assert set(np.unique(seen)) <= own and len(np.unique(seen)) > 1
    train(config, str(tmp_path / "run"), note=lambda text: None)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    lr = np.array([json.loads(line)["lr"] for line in lines]).reshape(3, 4)
    np.testing.assert_allclose(lr[:, 0], [9e-5, 5e-5, 5e-5], rtol=1e-5)
    np.testing.assert_allclose(lr / lr[:, :1], np.repeat(lr[:1] / lr[0, 0], 3, 0), rtol=1e-5)
    assert (np.diff(lr[:, 1:], axis=1) < 0).all()
