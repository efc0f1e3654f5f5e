"""Batched generation with a KV cache: a prefill of right-padded prompts, then one token a row until all rows are done.

    h = model(prompt);  y_0 ~ softmax(W h[n_b - 1] / temperature);  y_t from y_{t-1} at position n_b + t - 1

Row b keeps token t of its answer in slot `n_b + t`; a query at position p sees slots j <= p, so padding behind a
prompt is overwritten before it is seen. Padding and rows that are done have segment id 0: never routed, never counted.
`train=False` is all that is ever passed, so there is no dropout and no noise.

Prompts are padded to a multiple of 32 and the cache to the next multiple that holds the answers, batches to a power of
two (at most `batch_size`), so that few shapes compile. A row's answer depends on its own prompt and seed alone, not on
its neighbours.

B rows, S_p padded prompt length, N most new tokens, S_k = S_p + N slots, D width, V vocabulary, L layers.
"""

import dataclasses
import functools
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from molora_jax.backbones.base import needs_head
from molora_jax.decode import sampling
from molora_jax.errors import InputError

MULTIPLE = 32
STOP_EVERY = 8  # tokens between two looks for a stop string: a look waits for the device


def generate(
    model, params, adapters, router_state, prompts, *, max_new_tokens: int, eos_id, temperature: float = 0.0,
    top_p: float = 1.0, top_k: int = 0, min_p: float = 0.0, repetition_penalty: float = 1.0, stop=None, seed: int = 0,
    cache: bool = True, batch_size: int = 16, done=lambda rows: None,
) -> list[list[int]]:  # fmt: skip
    """Answers to many prompts, those of similar length together.

    Args:
      prompts: lists of token ids, none empty.
      max_new_tokens: of one answer, the end token included; an answer also ends at the model's context.
      eos_id: the id that ends an answer, several of them, or None.
      temperature: 0 takes the likeliest token; else tokens are drawn, by `seed` and the prompt.
      top_p, top_k, min_p, repetition_penalty: see `sampling.py`.
      stop: `stop(ids) -> how many of them to keep, or None` also ends an answer; asked every few tokens.
      cache: False recomputes everything for each token (slow; the same answers). So it is done whatever is asked for
        where positions are scaled by the length of a text that may grow over the bound (`rope.py`).
      done: called with the number of rows after each batch.

    Returns:
      The new ids of each prompt, the end token included where it came.

    Raises:
      InputError: an empty prompt or one that fills the context, a bad number, no room for a token.
    """
    needs_head(model.config, "generation", "base.source")
    _check(prompts, max_new_tokens, temperature, seed, model.config)
    filters = sampling.settings(
        temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, repetition_penalty=repetition_penalty
    )
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: list[list[int]] = [[] for _ in prompts]
    for first in range(0, len(order), batch_size):
        rows = order[first : first + batch_size]
        room = min(batch_size, 1 << (len(rows) - 1).bit_length())
        limit = min(max_new_tokens, model.config.context - len(prompts[rows[0]]))  # the cache is no larger than needed
        batch = pad([prompts[i] for i in rows], limit, model.config.context, seed, rows=room)
        inputs = (params, adapters, router_state, *batch, np.float32(temperature), end_ids(eos_id), filters)
        held = cache and may_cache(model, [prompts[i] for i in rows], limit)
        static = dict(model=model, size=new_slots(batch[0].shape[1], limit), sample=temperature > 0, cache=held)
        if stop is None:
            ids, counts, _ = jax.device_get(decode(*inputs, **static))
        else:
            ids, counts = _until_stopped(inputs, static, stop)
        for row, i in enumerate(rows):
            answers[i] = ids[row, : counts[row]].tolist()
        done(len(rows))
    return answers


def _until_stopped(inputs, static, stop):
    """`ids [B, N]`, `counts [B]`: a few tokens at a time, between which `stop` sees each row's ids."""
    state, shown = begin(*inputs, **static), 0
    while True:
        t, done, (ids, counts, _) = jax.device_get((state.t, state.done, state.out))
        done, counts = done.copy(), counts.copy()
        stopped = {}
        for row in np.flatnonzero(counts > shown):
            keep = stop(ids[row, : counts[row]].tolist())
            if keep is not None:
                done[row], stopped[int(row)] = True, keep
        for row, keep in stopped.items():
            counts[row] = keep
        if t >= static["size"] or done.all():
            return ids, counts
        shown = int(t)
        state = dataclasses.replace(state, done=done, out=(state.out[0], counts, state.out[2]))
        state = go_on(*inputs, state, np.int32(t + STOP_EVERY), **static)


def end_ids(eos_id) -> np.ndarray:
    """int32 `[ends]` of one id, several or None."""
    ids = [] if eos_id is None else [eos_id] if isinstance(eos_id, (int, np.integer)) else list(eos_id)
    return np.asarray(ids or [-1], np.int32)


def _check(prompts, max_new_tokens, temperature, seed, config):
    whole = (int, np.integer)
    for name, value in (("max_new_tokens", max_new_tokens), ("seed", seed)):
        if isinstance(value, bool) or not isinstance(value, whole):
            raise InputError(name, got=sampling.shown(value), expected="an integer")
    if isinstance(temperature, bool) or not isinstance(temperature, (*whole, float, np.floating)):
        raise InputError("temperature", got=sampling.shown(temperature), expected="a number")
    if max_new_tokens < 1:
        raise InputError("max_new_tokens", got=sampling.shown(max_new_tokens), expected="at least 1")
    if not 0 <= seed < 2**31:
        raise InputError("seed", got=sampling.shown(seed), expected="0 to 2147483647")
    if temperature != 0 and not 1e-3 <= temperature <= 1e3:  # beyond, float32 logits overflow
        raise InputError(
            "temperature", got=sampling.shown(temperature), expected="0 (the likeliest token), or 0.001 to 1000"
        )
    for prompt in prompts:
        if not 0 < len(prompt) < config.context:
            raise InputError(
                "prompt", got=f"{len(prompt)} tokens", expected=f"1 to {config.context - 1}, to fit the context",
                fix="Shorten it." if prompt else "Write something.",
            )  # fmt: skip
        check_ids(prompt, config.vocab)


def check_ids(prompt, vocab: int) -> None:
    """Raises InputError for an id without a row in the embedding: its look-up would give another token's."""
    wrong = next((i for i in prompt if not 0 <= i < vocab), None)
    if wrong is not None:
        raise InputError(
            "prompt", got=f"the token id {wrong}", expected=f"ids below {vocab}, the rows of the model's embedding",
            fix="Use the tokenizer that belongs to these weights.",
        )  # fmt: skip


def may_cache(model, prompts, max_new_tokens: int) -> bool:
    """Whether keys and values may be kept from token to token: for every prompt up to its longest answer."""
    return all(model.config.cacheable(len(ids), len(ids) + max_new_tokens) for ids in prompts)


def round_up(n: int) -> int:
    return -(-n // MULTIPLE) * MULTIPLE


def new_slots(padded: int, max_new_tokens: int) -> int:
    """N: what the cache holds beyond the padded prompts."""
    return round_up(padded + max_new_tokens) - padded


def pad(prompts, max_new_tokens: int, context: int, seed: int, *, rows: int):
    """`tokens [B, S_p]`, `lengths [B]`, `limits [B]` and keys `[B, 2]`, B = `rows`.

    A row's key comes from the seed and its prompt. Rows that fill up the batch have length 0.
    """
    tokens, lengths = prompt_batch(prompts, rows=rows)
    limits, digests = np.zeros(rows, np.int32), np.zeros(rows, np.uint32)
    for row, ids in enumerate(prompts):
        limits[row], digests[row] = min(max_new_tokens, context - len(ids)), digest(ids)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.PRNGKey(seed), digests)
    return tokens, lengths, limits, keys


def prompt_batch(prompts, *, rows: int):
    """`tokens [B, S_p]` and `lengths [B]`, B = `rows`."""
    tokens, lengths = np.zeros((rows, round_up(max(map(len, prompts)))), np.int32), np.zeros(rows, np.int32)
    for row, ids in enumerate(prompts):
        tokens[row, : len(ids)], lengths[row] = ids, len(ids)
    return tokens, lengths


def digest(ids) -> np.uint32:
    """What a prompt adds to the seed of its draws."""
    return np.uint32(zlib.crc32(np.asarray(ids, np.int32).tobytes()))


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
    """Between two tokens: `t` tokens were taken; `done [B]`; `out` as `decode` returns it; the cache (or the text so
    far); `seen [B, V]`, the ids that stand in a row so far, None without a penalty for repeats."""

    t: jax.Array
    done: jax.Array
    out: tuple
    memory: Any
    seen: jax.Array | None


_STATIC = ("model", "size", "sample", "cache", "keep_logits")


@functools.partial(jax.jit, static_argnames=_STATIC)
def decode(*inputs, size, **static):
    """One batch. Inputs: params, adapters, router_state, `tokens [B, S_p]` padded on the right, `lengths`, `limits
    [B]`, `keys [B, 2]`, temperature, end ids `[ends]` (or one), and perhaps the filters of `sampling.py`; `size` is N.

    Returns `ids [B, N]`, `counts [B]` (the end token counts), and the logits `[B, N, V]` that each id was taken from
    with `keep_logits` (else None).
    """
    start, loop = _machine(*inputs, size=size, **static)
    return loop(start(), size).out


@functools.partial(jax.jit, static_argnames=_STATIC)
def begin(*inputs, **static) -> State:
    """The prefill and the first token of `decode`."""
    return _machine(*inputs, **static)[0]()


@functools.partial(jax.jit, static_argnames=_STATIC, donate_argnums=10)
def go_on(*inputs_state_until, size, **static) -> State:
    """`decode` from a state on, until `until` tokens were taken (or all rows are done)."""
    *inputs, state, until = inputs_state_until
    return _machine(*inputs, size=size, **static)[1](state, jnp.minimum(until, size))


def _machine(
    params, adapters, router_state, tokens, lengths, limits, keys, temperature, eos_id, filters=None,
    *, model, size, sample, cache=True, keep_logits=False,
):  # fmt: skip
    """`start() -> State` after the first token, and `loop(state, until) -> State`."""
    B = tokens.shape[0]
    rows = jnp.arange(B)
    filters = filters or {}
    whole = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    settled = model.settle(params, adapters, router_state, _batch(tokens, whole, whole < lengths[:, None]))

    def with_settled(params, adapters, state, batch, **options):
        return model.hidden(params, adapters, state, batch | {"settled": settled}, **options)

    hidden = functools.partial(with_settled, params, adapters, router_state)
    prefill, advance = (_cached if cache else _uncached)(hidden, model, tokens, lengths, size)

    def choose(out, t, h, done, seen):
        """Writes token t of every row that goes on."""
        ids, counts, logits = out
        with jax.named_scope("choose"):
            z = plain = model.logits(params, h)
            if seen is not None:
                z = sampling.penalised(z, seen, filters["repetition_penalty"])
            if sample:
                new = sampling.drawn(sampling.filtered(z / temperature, filters), keys, jnp.full(B, t))
            else:
                new = jnp.argmax(z, axis=-1)
            new = jnp.where(done, 0, new).astype(jnp.int32)
        logits = None if logits is None else logits.at[:, t].set(plain)
        seen = None if seen is None else seen.at[rows, new].set(True)
        out = (ids.at[:, t].set(new), counts + ~done, logits)
        ended = jnp.any(new[:, None] == jnp.atleast_1d(eos_id), axis=-1)
        return out, done | ended | (t + 1 >= limits), seen

    def start():
        h, memory = prefill()
        logits = jnp.zeros((B, size, model.config.vocab), jnp.float32) if keep_logits else None
        seen = sampling.seen_in(tokens, lengths, model.config.vocab) if "repetition_penalty" in filters else None
        out = (jnp.zeros((B, size), jnp.int32), jnp.zeros(B, jnp.int32), logits)
        out, done, seen = choose(out, 0, h, limits <= 0, seen)
        return State(jnp.int32(1), done, out, memory, seen)

    def step(state):
        t = state.t
        h, memory = advance(state.memory, state.out[0][rows, t - 1], t - 1, ~state.done)
        out, done, seen = choose(state.out, t, h, state.done, state.seen)
        return State(t + 1, done, out, memory, seen)

    def loop(state, until):
        return jax.lax.while_loop(lambda state: (state.t < until) & ~jnp.all(state.done), step, state)

    return start, loop


def _batch(tokens, positions, live):
    return {"tokens": tokens, "positions": positions, "segment_ids": live.astype(jnp.int32)}


def _last(h, lengths):
    """`h [B, S, D]` at each row's last token: `[B, D]`, so that the head sees one position a row."""
    return jnp.take_along_axis(h, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]


def prefilled(hidden, model, tokens, lengths, slots: int, dtype):
    """`h [B, D]` at the last token of each of `tokens [B, S]`, padded on the right, and a cache of so many slots that
    holds them. `hidden`: `Model.hidden` with its trees."""
    B, S = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(S), (B, S))

    def write(buffer, new):
        return jax.lax.dynamic_update_slice(buffer, new.astype(buffer.dtype), (0, 0, 0, 0))

    empty = model.init_cache(B, slots, dtype)
    batch = _batch(tokens, positions, positions < lengths[:, None])
    h, _, kv, _ = hidden(batch, mask=_seen(positions, slots), cache=(empty, write))
    return _last(h, lengths), kv


def advanced(hidden, kv, token, at, live, slots: int):
    """`h [B, D]` of one token a row, `token [B]` at position `at [B]`, which goes into the slot of that number."""
    rows = jnp.arange(len(token))

    def write(buffer, new):
        return buffer.at[rows, at].set(new[:, 0].astype(buffer.dtype))

    h, _, kv, _ = hidden(
        _batch(token[:, None], at[:, None], live[:, None]), mask=_seen(at[:, None], slots), cache=(kv, write)
    )
    return h[:, 0], kv


def _seen(positions, slots):
    return jnp.arange(slots) <= positions[:, None, :, None]  # [B, 1, S, S_k]


def _cached(hidden, model, tokens, lengths, size):
    """Keys and values of all layers in buffers `[L, B, S_k, H_kv, H_d]`; a router's base pass has its own."""
    slots = tokens.shape[1] + size

    def start():
        return prefilled(hidden, model, tokens, lengths, slots, hidden.args[0]["embed"].dtype)

    def advance(kv, token, t, live):
        return advanced(hidden, kv, token, lengths + t, live, slots)

    return start, advance


def _uncached(hidden, model, tokens, lengths, size):
    """The whole text again for every token: what the cache must equal."""
    B, S = tokens.shape
    rows = jnp.arange(B)
    positions = jnp.broadcast_to(jnp.arange(S + size), (B, S + size))

    def run(text, lengths, live):
        inside = (positions < lengths[:, None]) & live[:, None]
        h, _, _, _ = hidden(_batch(text, positions, inside))
        return _last(h, lengths)

    def start():
        text = jnp.pad(tokens, ((0, 0), (0, size)))
        return run(text, lengths, lengths > 0), text

    def advance(text, token, t, live):
        text = text.at[rows, lengths + t].set(token)
        return run(text, lengths + t + 1, live), text

    return start, advance
