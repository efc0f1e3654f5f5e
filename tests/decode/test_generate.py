"""Generation: with a cache as without, a row as alone, sampled by seed and prompt, stopped by the end token."""

import jax
import numpy as np
import pytest

from molora_jax.decode import generate as decoding
from molora_jax.errors import InputError
from tests.tiny import METHODS, tiny_model

PROMPTS = [[5, 6, 7], list(range(40, 75)), [9], list(range(100, 131))]  # one longer than 32, one of 31
N = 12


def _decode(made, prompts, *, cache=True, temperature=0.0, eos_id=-1, max_new_tokens=N):
    model = made[0]
    batch = decoding.pad(prompts, max_new_tokens, model.config.context, seed=3, rows=4 if len(prompts) > 1 else 1)
    size = decoding.new_slots(batch[0].shape[1], max_new_tokens)
    out = decoding.decode(
        *made[1:], *batch, np.float32(temperature), np.int32(eos_id), model=model, size=size, sample=temperature > 0,
        cache=cache, keep_logits=True,
    )  # fmt: skip
    return jax.device_get(out)


SLOW = ("mola",)  # four segments, 28 routers: half a minute of compilation


@pytest.mark.parametrize(
    "method", ["base", *(pytest.param(m, marks=[pytest.mark.slow] * (m in SLOW)) for m in METHODS)]
)
def test_cached_equals_uncached(method):
    made = tiny_model(method)
    with_cache, without = _decode(made, PROMPTS), _decode(made, PROMPTS, cache=False)
    assert (with_cache[1] == N).all()
    np.testing.assert_array_equal(with_cache[0], without[0])
    np.testing.assert_allclose(with_cache[2][:, :N], without[2][:, :N], atol=1e-4)


@pytest.mark.parametrize("method", ["mixlora", "dynamic_moe"])
def test_a_row_is_what_it_is_alone(method):
    made = tiny_model(method)
    together = _decode(made, PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        if len(prompt) > 32:  # in as many slots as together: `test_samples_depend_on_seed_and_prompt_only`
            continue
        alone = _decode(made, [prompt])
        np.testing.assert_array_equal(together[0][row, :N], alone[0][0, :N])
        np.testing.assert_allclose(together[2][row, :N], alone[2][0, :N], atol=1e-4)


def test_greedy_is_the_argmax_of_the_plain_forward_pass():
    made = tiny_model("mixlora")
    model, params, adapters, state = made
    ids, _, logits = _decode(made, [PROMPTS[0]])
    text = np.array([PROMPTS[0] + ids[0, :N].tolist()], np.int32)
    batch = dict(tokens=text, segment_ids=np.ones_like(text), positions=np.arange(text.shape[1], dtype=np.int32)[None])
    forward = jax.jit(lambda *given: model.logits(given[0], model.hidden(*given)[0]))
    plain = np.asarray(forward(params, adapters, state, batch))[0, len(PROMPTS[0]) - 1 : -1]
    np.testing.assert_allclose(logits[0, :N], plain, atol=1e-4)
    np.testing.assert_array_equal(ids[0, :N], np.argmax(plain, -1))


def test_padding_and_finished_rows_do_not_touch_the_others():
    made = tiny_model("mixlora")
    ids, counts, _ = _decode(made, PROMPTS[:3])  # padded to four rows
    assert counts.tolist() == [N, N, N, 0]
    end = int(ids[0, 2])  # row 0 ends at its third token
    stopped, counts, _ = _decode(made, PROMPTS[:3], eos_id=end)
    assert counts[0] == ids[0].tolist().index(end) + 1
    for row in (1, 2):
        np.testing.assert_array_equal(stopped[row, : counts[row]], ids[row, : counts[row]])


def test_samples_depend_on_seed_and_prompt_only():
    made = tiny_model("lora")
    model, *trees = made

    def draw(prompts, seed=0, **more):
        return decoding.generate(
            model, *trees, prompts, max_new_tokens=N, eos_id=None, temperature=1.5, seed=seed, **more
        )

    prompts = PROMPTS[:3]  # the short two are a batch of fewer slots, the long one is alone
    together = draw(prompts, batch_size=2)
    assert together == draw(prompts) and together[1:2] == draw(prompts[1:2])
    assert together == draw(prompts, cache=False)
    assert together != draw(prompts, seed=1)
    greedy = decoding.generate(model, *trees, prompts, max_new_tokens=N, eos_id=None)
    assert together != greedy and all(len(ids) == N for ids in greedy)


def test_answers_end_at_the_context():
    model, *trees = tiny_model("base")
    full = list(np.arange(model.config.context - 3) % 200)
    (ids,) = decoding.generate(model, *trees, [full], max_new_tokens=N, eos_id=None)
    assert len(ids) == 3


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[]], {}, "prompt: got 0 tokens"),
        ([[1] * 512], {}, "prompt: got 512 tokens"),
        ([[1], [2, 10**6]], {}, "prompt: got the token id 1000000"),
        ([[-1]], {}, "prompt: got the token id -1"),
        ([[1]], dict(max_new_tokens=0), "max_new_tokens"),
        ([[1]], dict(temperature=-1.0), "temperature"),
        ([[1]], dict(temperature=float("nan")), "temperature"),
        ([[1]], dict(temperature=1e-40), "temperature"),
        ([[1]], dict(temperature="warm"), "temperature"),
        ([[1]], dict(seed=2**40), "seed"),
        ([[1]], dict(max_new_tokens=2.5), "max_new_tokens"),
    ],
)
def test_bad_input(prompts, options, message):
    model, *trees = tiny_model("base")
    with pytest.raises(InputError, match=message):
        decoding.generate(model, *trees, prompts, **(dict(max_new_tokens=4, eos_id=None) | options))
