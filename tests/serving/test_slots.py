"""Rows that come and go in one step: each answer is the one that `generate` gives to its prompt."""

import random

import jax
import numpy as np
import pytest

from molora_jax.decode import generate as decoding
from molora_jax.decode.slots import Draw, Slots
from molora_jax.errors import InputError

N = 10
SAMPLED = dict(temperature=0.9, top_p=0.9, top_k=40)


def _slots(run, **options):
    return Slots(run.model, run.params, run.adapters, run.router_state, **options)


def _generated(run, prompts, **options):
    trees = run.model, run.params, run.adapters, run.router_state
    return decoding.generate(*trees, prompts, max_new_tokens=N, eos_id=None, **options)


def _served(slots, prompts, draws, *, seed, **options):
    """Every answer's tokens, with arrivals by chance."""
    rng, answers, of, waiting = random.Random(seed), [[] for _ in prompts], {}, list(range(len(prompts)))
    while waiting or of:
        while waiting and slots.free and rng.random() < 0.7:
            i = waiting.pop(0)
            slot, token = slots.put(slots.read(prompts[i]), draws[i], **options)
            of[slot], answers[i] = i, [token]
        for slot, token in slots.step().items():
            answers[of[slot]].append(token)
            if len(answers[of[slot]]) == N:
                slots.take(slot)
                del of[slot]
    return answers


def _ids(answers):
    return [[token.id for token in answer] for answer in answers]


def test_answers_are_those_of_generate(run):
    rng = np.random.default_rng(0)
    prompts = [rng.integers(4, 200, n).tolist() for n in (3, 30, 1, 32, 17, 9, 25, 2)]
    draws = [Draw(**SAMPLED, seed=5) if i % 2 else Draw() for i in range(8)]
    wanted = [None] * 8
    wanted[::2] = _generated(run, prompts[::2])
    wanted[1::2] = _generated(run, prompts[1::2], seed=5, **SAMPLED)
    slots = _slots(run, count=4, context=192)
    assert _ids(_served(slots, prompts, draws, seed=0)) == wanted
    assert len(slots.free) == 4 and not slots.rows["live"].any()
    assert _ids(_served(slots, prompts[::-1], draws[::-1], seed=1)) == wanted[::-1]  # other neighbours, other slots


def test_a_step_has_no_more_rows_than_the_last_slot_in_use_asks_for(run):
    slots = _slots(run, count=6, context=64)
    assert slots.widths == [1, 4, 6]
    prompts = [[7, 8, 9 + i] for i in range(6)]
    wanted, answers, seen = _generated(run, prompts), {}, []

    def step():
        for slot, token in slots.step().items():
            answers[slot].append(token.id)
        seen.append(slots.width)
        assert jax.tree.leaves(slots.memory)[0].shape[1] == len(slots.seen) == slots.width

    for i, prompt in enumerate(prompts):  # the first free slot is taken first: answer i is in slot i
        slot, token = slots.put(slots.read(prompt), Draw())
        assert slot == i
        answers[slot] = [token.id]
        step()
    for slot in (0, 5, 4, 3, 2, 1):
        while len(answers[slot]) < N:
            step()
        slots.take(slot)
        if slot == 2:
            step()  # only answer 1 is left
    assert seen[:6] == [1, 4, 4, 4, 6, 6] and seen[-1] == 4
    assert [answers[i][:N] for i in range(6)] == wanted
    slots.put(slots.read(prompts[3]), Draw())
    slots.step()
    assert slots.width == 1


def test_bad_prompts(run):
    slots = _slots(run, count=4, context=64)
    for ids in ([], [1] * 64):
        with pytest.raises(InputError, match=f"prompt: got {len(ids)} tokens; expected 1 to 63"):
            slots.check(ids, 1)
    with pytest.raises(InputError, match="top_p"):
        Draw(top_p=2.0)


@pytest.mark.slow
def test_caches_grow_and_shrink(run):
    slots = _slots(run, count=4, context=512)
    small = slots.size
    prompts = [list(range(60, 60 + small - 4)), [5, 6, 7]]
    assert _ids(_served(slots, prompts, [Draw()] * 2, seed=0)) == _generated(run, prompts)
    assert slots.size == 2 * small
    huge = list(np.arange(300) % 200 + 4)
    assert _ids(_served(slots, [huge], [Draw()], seed=0)) == _generated(run, [huge]) and slots.size == 4 * small
    slots.put(slots.read([5, 6, 7]), Draw())
    assert slots.size == small


@pytest.mark.slow
def test_logprobs_are_the_models_own(run):
    slots, prompt = _slots(run, count=4, context=192), [5, 6, 7]
    draw = Draw(temperature=2.0, seed=3, repetition_penalty=1.3)
    (answer,) = _served(slots, [prompt], [draw], seed=0, logprobs=True)
    ids = [token.id for token in answer]
    assert ids == _generated(run, [prompt], temperature=2.0, seed=3, repetition_penalty=1.3)[0]
    logits = run.logits(prompt + ids[:-1])[len(prompt) - 1 :].astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose([t.logprob for t in answer], logprobs[range(N), ids], atol=1e-4)
    for t, row in zip(answer, logprobs, strict=True):
        np.testing.assert_allclose([p for _, p in t.top], np.sort(row)[::-1][: len(t.top)], atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mixlora", "dynamic_moe", "model"])
def test_other_routers(method):
    """Experts of whole FFNs; experts of any number; a router that decides once for all layers."""
    from tests.tiny import tiny_model

    made = tiny_model(method)
    prompts = [[5, 6, 7], [9], list(range(40, 60)), [8, 8]]
    served = _served(Slots(*made, count=2, context=192), prompts, [Draw()] * 4, seed=0)
    assert _ids(served) == decoding.generate(*made, prompts, max_new_tokens=N, eos_id=None)


@pytest.mark.slow
def test_routers_that_settle_and_a_cache_that_is_a_state():
    """A prompt's own decision stays with its slot; Mamba's cache has no positions."""
    import configs.stelocoder
    from configs import common
    from molora_jax.backbones.compile import compile_model
    from molora_jax.io.base import load_base

    mamba = common.get_config()
    mamba.method.rules = dict(
        all=common.rule("in_proj,out_proj", adapter=common.adapter(), experts="4",
                        router=dict(name="softmax_topk", k=2, share="site"))
    )  # fmt: skip
    for source, config in (("random:tiny", configs.stelocoder.get_config()), ("random:tiny-mamba", mamba)):
        base = load_base(source)
        model = compile_model(config, base.config)
        adapters = jax.jit(lambda p, model=model: model.init_adapters(jax.random.key(1), p))(base.params)
        leaves, tree = jax.tree.flatten(adapters)
        rng = np.random.default_rng(0)
        leaves = [np.asarray(x) + 0.1 * rng.standard_normal(x.shape).astype(np.float32) for x in leaves]
        made = (model, base.params, jax.tree.unflatten(tree, leaves), model.init_router_state())
        prompts = [[5, 6, 7], [9], list(range(40, 60)), [8, 8]]
        served = _served(Slots(*made, count=2, context=192), prompts, [Draw()] * 4, seed=0)
        assert _ids(served) == decoding.generate(*made, prompts, max_new_tokens=N, eos_id=None)
