"""Rows that come and go: answers of different ages in one compiled decode step, which a server needs.

    prompt -> one row of a cache and the first token's logits;   the row goes into a free slot;   step: a token a slot

A slot is a row of the cache. Row b keeps its own position, key, number of drawn tokens and sampling settings; they are
arguments of the step, so nothing compiles when a row comes or goes. Slots without an answer have segment id 0, like
rows of `generate.py` that are done: never routed, never counted. The functions are `generate.py`'s own, and so are the
draws: by seed and prompt. A step has as many rows, of 1, 4, 16, ..., as the last slot in use asks for: a request alone
does not pay for slots that are empty.

B slots, S_p padded prompt length, S_k cached positions of a row, V vocabulary, L layers.
"""

import dataclasses
import functools
import heapq
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from molora_jax.backbones.base import needs_head
from molora_jax.decode import sampling
from molora_jax.decode.generate import (
    MULTIPLE,
    advanced,
    check_ids,
    digest,
    may_cache,
    prefilled,
    prompt_batch,
    round_up,
)
from molora_jax.errors import InputError

SMALLEST = 128  # positions of a cache; caches and padded prompts grow by doubling, so that few programs compile
TOP = 20  # the likeliest tokens that a row may be told of


@dataclasses.dataclass(frozen=True)
class Draw:
    """How a row's tokens are taken: as `generate` of the same names."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self):
        sampling.settings(
            temperature=1.0, top_p=self.top_p, top_k=self.top_k, min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Token:
    """`logprob` of the id under the model itself (no temperature, no filter); `top`: the TOP likeliest `(id, logprob)`,
    () where no row asked."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass
class Prompt:
    """What a prompt leaves behind: one row of a cache, logits `[1, V]`, what routers settled; several answers may start
    from it."""

    ids: list[int]
    memory: dict
    logits: jax.Array
    settled: dict


class Slots:
    """Answers in the making, at most `count`, of a model and its arrays.

    Args:
      context: most tokens of a prompt with its answer; at most the model's own are taken.
    """

    def __init__(self, model, params, adapters, router_state, *, count: int, context: int):
        needs_head(model.config, "generation", "base.source")
        self.model, self.trees = model, (params, adapters, router_state)
        self.count, self.context = count, min(context, model.config.context)
        self.dtype = params["embed"].dtype
        self.clear()

    def clear(self) -> None:
        """Every slot empty."""
        B = self.count
        self.free = list(range(B))  # a heap: the first ones are taken first
        self.width, self.size = 1, self._bucket(1, SMALLEST)
        self.memory = self.model.init_cache(self.width, self.size, self.dtype)
        self.seen = jnp.zeros((self.width, self.model.config.vocab), bool)
        self.settled = None  # known from the first prompt
        zeros, ones = lambda kind: np.zeros(B, kind), np.ones(B, np.float32)  # noqa: E731
        self.rows = dict(
            token=zeros(np.int32), at=zeros(np.int32), t=zeros(np.int32), live=zeros(bool),
            keys=np.zeros((B, 2), np.uint32),
            temperature=zeros(np.float32), top_p=ones.copy(), top_k=zeros(np.int32), min_p=zeros(np.float32),
            repetition_penalty=ones.copy(), logprobs=zeros(bool),
        )  # fmt: skip

    def room(self, ids) -> int:
        """How many tokens an answer to a prompt of so many may have."""
        return self.context - len(ids)

    def check(self, ids, max_new_tokens: int) -> None:
        """Raises InputError for a prompt that is empty, leaves no room, has a wrong id, or that no cache can hold."""
        if not 0 < len(ids) < self.context:
            raise InputError(
                "prompt", got=f"{len(ids)} tokens", expected=f"1 to {self.context - 1}, to fit with its answer",
                fix="Shorten it." if ids else "Write something.",
            )  # fmt: skip
        check_ids(ids, self.model.config.vocab)
        if not may_cache(self.model, [ids], max_new_tokens):
            raise InputError(
                "max_new_tokens", got=f"{len(ids)} tokens that may grow to {len(ids) + max_new_tokens}",
                expected="a text that does not cross the length at which this base scales its positions anew",
                fix="Ask for fewer tokens.",
            )  # fmt: skip

    def read(self, ids) -> Prompt:
        """The prefill, one row `[1, S_p]`."""
        tokens, lengths = prompt_batch([ids], rows=1)
        tokens = np.pad(tokens, ((0, 0), (0, self._bucket(len(ids), MULTIPLE) - tokens.shape[1])))
        memory, logits, settled = _read(*self.trees, tokens, lengths, model=self.model, dtype=self.dtype)
        return Prompt(list(ids), memory, logits, settled)

    def put(self, prompt: Prompt, draw: Draw, *, logprobs: bool = False) -> tuple[int, Token]:
        """A free slot for an answer, and its first token."""
        slot, n = heapq.heappop(self.free), len(prompt.ids)
        key = np.asarray(jax.random.fold_in(jax.random.PRNGKey(draw.seed), digest(prompt.ids)))
        own = dict(token=0, at=0, t=0, keys=key, live=True, logprobs=logprobs, **_settings(draw))
        for name, value in own.items():
            self.rows[name][slot] = value
        if self.settled is None:
            self.settled = _wide(prompt.settled, self.model, self.width)
        self._hold(max(n + 1, self._bucket(n, MULTIPLE)))
        seen = np.zeros((1, self.model.config.vocab), bool)
        seen[0, prompt.ids] = True
        one = {name: value[slot : slot + 1] for name, value in self.rows.items()}
        out, seen = _choose(prompt.logits, seen, one)
        row = (prompt.memory, seen, prompt.settled)
        self.memory, self.seen, self.settled = _insert(
            (self.memory, self.seen, self.settled), row, np.int32(slot), model=self.model
        )
        (token,) = _told(out, [0], one["logprobs"])
        self.rows["token"][slot], self.rows["at"][slot], self.rows["t"][slot] = token.id, n, 1
        return slot, token

    def take(self, slot: int) -> None:
        """The slot is free again."""
        self.rows["live"][slot] = False
        heapq.heappush(self.free, slot)

    def step(self) -> dict[int, Token]:
        """The next token of every answer, by slot."""
        live = np.flatnonzero(self.rows["live"]).tolist()
        if not live:
            return {}
        self._hold()
        rows = {name: value[: self.width] for name, value in self.rows.items()}
        out, self.memory, self.seen = _step(
            *self.trees, self.memory, self.seen, self.settled, rows, model=self.model, size=self.size
        )
        tokens = _told(out, live, rows["logprobs"])
        for slot, token in zip(live, tokens, strict=True):
            self.rows["token"][slot] = token.id
            self.rows["at"][slot] += 1
            self.rows["t"][slot] += 1
        return dict(zip(live, tokens, strict=True))

    def _bucket(self, positions: int, smallest: int) -> int:
        size = smallest
        while size < positions:
            size *= 2
        return min(size, round_up(self.context))

    def _hold(self, positions: int = 0) -> None:
        """Caches of a row for each slot in use, and of positions for the next token of each, at least so many; smaller
        ones again where no answer needs them."""
        live = np.flatnonzero(self.rows["live"])
        size = self._bucket(max(positions, int(self.rows["at"][live].max()) + 1), SMALLEST)
        width = next(width for width in self.widths if width > live[-1])
        size = size if size > self.size or size * 4 <= self.size else self.size
        if (width, size) != (self.width, self.size):
            memory = jax.eval_shape(lambda: self.model.init_cache(width, size, self.dtype))
            settled = jax.eval_shape(lambda: _wide(self.settled, self.model, width))
            seen = jax.ShapeDtypeStruct((width, self.seen.shape[1]), bool)
            shapes = tuple(leaf.shape for leaf in jax.tree.leaves((memory, seen, settled)))
            self.memory, self.seen, self.settled = _resized((self.memory, self.seen, self.settled), shapes=shapes)
            self.width, self.size = width, size

    @property
    def widths(self) -> list[int]:
        """Rows that a step may have."""
        return [*itertools.takewhile(lambda width: width < self.count, (4**i for i in itertools.count())), self.count]


def _told(out, rows, asked) -> list[Token]:
    """The tokens of some rows of a step's results."""
    ids, logprobs, top, tops = jax.device_get(out)
    pairs = lambda b: tuple(zip(top[b].tolist(), tops[b].tolist(), strict=True)) if asked[b] else ()  # noqa: E731
    return [Token(int(ids[b]), float(logprobs[b]), pairs(b)) for b in rows]


def _settings(draw: Draw) -> dict:
    return {f.name: getattr(draw, f.name) for f in dataclasses.fields(draw) if f.name != "seed"}


@functools.partial(jax.jit, static_argnames=("model", "dtype"))
def _read(params, adapters, router_state, tokens, lengths, *, model, dtype):
    S = tokens.shape[1]
    positions = jnp.arange(S)[None]
    batch = {"tokens": tokens, "positions": positions, "segment_ids": (positions < lengths[:, None]).astype(jnp.int32)}
    settled = model.settle(params, adapters, router_state, batch)
    hidden = _hidden(params, adapters, router_state, settled, model)
    h, memory = prefilled(hidden, model, tokens, lengths, S, dtype)
    return memory, model.logits(params, h), settled


@functools.partial(jax.jit, static_argnames=("model", "size"), donate_argnums=(3, 4))
def _step(params, adapters, router_state, memory, seen, settled, rows, *, model, size):
    hidden = _hidden(params, adapters, router_state, settled, model)
    h, memory = advanced(hidden, memory, rows["token"], rows["at"], rows["live"], size)
    with jax.named_scope("choose"):
        out, seen = _chosen(model.logits(params, h), seen, rows)
    return out, memory, seen


def _hidden(params, adapters, router_state, settled, model):
    return lambda batch, **options: model.hidden(
        params, adapters, router_state, batch | {"settled": settled}, **options
    )


@jax.jit
def _choose(logits, seen, rows):
    return _chosen(logits, seen, rows)


def _chosen(logits, seen, rows):
    """`(ids [B], logprobs [B], top ids [B, TOP], their logprobs), seen`; what no row asked for is not computed."""
    B, n, live = len(logits), min(TOP, logits.shape[-1]), rows["live"]
    some = lambda name, off: jnp.any(live & (rows[name] != off))  # noqa: E731
    z = jax.lax.cond(
        some("repetition_penalty", 1), lambda z: sampling.penalised(z, seen, rows["repetition_penalty"]), lambda z: z,
        logits,
    )  # fmt: skip
    draws = rows["temperature"] > 0

    def filtered(z):
        return sampling.filtered(z, {name: rows[name] for name in ("top_k", "top_p", "min_p")})

    def drawn(z):
        z = z / jnp.where(draws, rows["temperature"], 1.0)[:, None]
        filters = some("top_k", 0) | some("top_p", 1) | some("min_p", 0)
        z = jax.lax.cond(filters, filtered, lambda z: z, z)
        return sampling.drawn(z, rows["keys"], rows["t"]).astype(jnp.int32)

    likeliest = jnp.argmax(z, axis=-1).astype(jnp.int32)
    ids = jnp.where(draws, jax.lax.cond(jnp.any(live & draws), drawn, lambda _: likeliest, z), likeliest)

    def told(logits):
        logprobs = jax.nn.log_softmax(logits, axis=-1)
        tops, top = jax.lax.top_k(logprobs, n)
        return jnp.take_along_axis(logprobs, ids[:, None], axis=-1)[:, 0], top.astype(jnp.int32), tops

    silent = lambda _: (jnp.zeros(B), jnp.zeros((B, n), jnp.int32), jnp.zeros((B, n)))  # noqa: E731
    more = jax.lax.cond(jnp.any(live & rows["logprobs"]), told, silent, logits)
    return (ids, *more), seen.at[jnp.arange(B), jnp.where(live, ids, logits.shape[-1])].set(True, mode="drop")


def _row_axis(path, model) -> int:
    """Of an entry of `settled`: gates `[B, E]` of a router for the whole model, else `[L, B, E]`."""
    rule = next(rule for rule in model.rules if rule.name == path[0].key)
    return 0 if rule.share == "model" else 1


def _wide(settled, model, count):
    def wide(path, leaf):
        shape = list(leaf.shape)
        shape[_row_axis(path, model)] = count
        return jnp.zeros(shape, leaf.dtype)

    return jax.tree_util.tree_map_with_path(wide, settled)


@functools.partial(jax.jit, static_argnames="model", donate_argnums=0)
def _insert(slots, row, slot, *, model):
    (memory, seen, settled), (new, new_seen, new_settled) = slots, row

    def at(axis):
        return lambda old, own: jax.lax.dynamic_update_slice(
            old, own.astype(old.dtype), [slot if i == axis else 0 for i in range(old.ndim)]
        )

    memory = jax.tree.map(at(1), memory, new)  # `[L, B, ...]`; a shorter row leaves what no query sees
    settled = jax.tree_util.tree_map_with_path(
        lambda path, old, own: at(_row_axis(path, model))(old, own), settled, new_settled
    )
    return memory, at(0)(seen, new_seen), settled


@functools.partial(jax.jit, static_argnames="shapes")
def _resized(held, *, shapes):
    leaves, tree = jax.tree.flatten(held)

    def resized(leaf, shape):
        kept = leaf[tuple(slice(min(a, b)) for a, b in zip(leaf.shape, shape, strict=True))]
        return jnp.zeros(shape, leaf.dtype).at[tuple(map(slice, kept.shape))].set(kept)

    return jax.tree.unflatten(tree, [resized(leaf, shape) for leaf, shape in zip(leaves, shapes, strict=True)])
