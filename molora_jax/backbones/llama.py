"""The Llama family of decoders: attention (q k v o) and gated feed-forward (gate up down), rotary positions.

    x = x + attention(norm x);   x = x + ffn(norm x)          norms "pre"; "both", "post": of what is added

    embed [V, D]   final_norm [D]   head [D, V] (absent when tied)
    blocks/{attn_norm, ffn_norm} [L, D]   blocks/{attn_out_norm, ffn_out_norm} [L, D]   as `norms` says
    blocks/{q, k, v, o, gate, up, down}/kernel [L, D_in, D_out]   and /bias [L, D_out] where the model has one
    blocks/{q_norm, k_norm} [L, H_d]    where the family has one (Qwen3); [L, H * H_d], over all heads together (OLMo)

Kernels are `[D_in, D_out]`. Switches say how families differ (`families.py` has a row for each).
B batch, S sequence, D width, F FFN width, H heads, H_d head size, L layers, V vocabulary.
"""

import dataclasses
import functools
import itertools
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from molora_jax.backbones import rope
from molora_jax.backbones.attention import attend, capped, rms_norm, rotary, rotate, text_lengths, window_mask
from molora_jax.backbones.base import TABLES, WHOLE, Backbone, Leaf, Part, Stack, projection

AT = "model.layers.{}."
NORMS = {  # where the norms stand -> ours -> Hugging Face's
    "pre": {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"},
    "both": {
        "attn_norm": "input_layernorm",
        "attn_out_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "ffn_out_norm": "post_feedforward_layernorm",
    },
    "post": {"attn_out_norm": "post_attention_layernorm", "ffn_out_norm": "post_feedforward_layernorm"},
}
NAMES = {  # ours -> Hugging Face's, inside a layer
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
}


@dataclasses.dataclass(frozen=True)
class Llama(Backbone):
    """Shape and switches of a decoder-only model. `D = width`, `F = ffn_width`, `H_d = head_dim`."""

    family: str
    layers: int
    width: int
    ffn_width: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    rope_base: float
    norm_eps: float
    tied: bool
    activation: str = "silu"
    qkv_bias: bool = False
    qk_norm: bool = False
    rope_scaling: rope.RopeScaling | None = None
    o_bias: bool = False
    window: int | None = None  # a query of a sliding layer sees so many keys, its own the last; None: no layer slides
    sliding: tuple[int, ...] = ()  # the layers that slide
    unrotated: tuple[int, ...] = ()  # the layers without positions (SmolLM3)
    norms: str = "pre"  # a key of NORMS
    plus_one: bool = False  # norms multiply with 1 + weight (Gemma)
    scaled_embedding: bool = False  # by the root of D, rounded as the embedding is (Gemma)
    query_scalar: float | None = None  # scores are divided by its root; None: by that of H_d
    score_cap: float | None = None  # see `attention.capped`
    logit_cap: float | None = None
    qk_norm_all: bool = False
    rotated: int | None = None  # the first entries of a head, which turn; None: all
    fused: bool = False  # q, k, v are one tensor of a checkpoint, gate and up another (Phi-3)
    local_base: float | None = None  # the rope_base of the layers that slide, unscaled; None: that of the others

    TITLE: ClassVar[str] = "DecoderConfig"

    @property
    def stacks(self) -> tuple[Stack, ...]:
        marked = (("slides", self.sliding if self._differ else ()), ("unrotated", self.unrotated))
        arrays = tuple((name, tuple(i in at for i in range(self.layers))) for name, at in marked if at)
        return (Stack("blocks", 0, self.layers, ("q", "k", "v", "o", "gate", "up", "down"), arrays),)

    @property
    def _differ(self) -> bool:
        """Whether layers that slide differ from the others."""
        return self.window is not None or self.local_base is not None

    def dims(self, site: str) -> tuple[int, int]:
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        d, f = self.width, self.ffn_width
        table = dict(q=(d, q), k=(d, kv), v=(d, kv), o=(q, d), gate=(d, f), up=(d, f), down=(f, d))
        return table[site]

    def biased(self, site: str) -> bool:
        return self.qkv_bias if site in ("q", "k", "v") else self.o_bias and site == "o"

    def shapes(self) -> dict[str, Leaf]:
        table = (self.vocab, self.width)
        out = {"embed": Leaf(table, tuple(P(v, d) for v, d in TABLES), "model.embed_tokens.weight", scale=0.02)}
        out["final_norm"] = Leaf((self.width,), WHOLE, "model.norm.weight", fill=self._one)
        if not self.tied:
            specs = tuple(P(d, v) for v, d in TABLES)
            out["head"] = Leaf(table[::-1], specs, "lm_head.weight", turned=True, scale=0.02)
        return out | self._norms() | self._projections() | self._qk_norms()

    def _norms(self):
        return {f"blocks/{n}": self._vector(n, self.width) for n in NORMS[self.norms]}

    @property
    def _one(self) -> float:
        """The weight of a norm that changes no scale."""
        return 0.0 if self.plus_one else 1.0

    def _qk_norms(self):
        sizes = {f"{site}_norm": self.dims(site)[1] if self.qk_norm_all else self.head_dim for site in "qk"}
        has = self.qk_norm or self.qk_norm_all
        return {f"blocks/{name}": self._vector(name, size) for name, size in sizes.items() if has}

    def _vector(self, name, width):
        theirs = NORMS[self.norms].get(name) or NAMES[name]
        return Leaf((self.layers, width), WHOLE, f"{AT}{theirs}.weight", stacked=1, fill=self._one)

    def _projections(self):
        out = {}
        for site in self.sites:
            (d_in, d_out), name = self.dims(site), AT + NAMES[site]
            inward = site in ("o", "down")
            kernel = projection(self.layers, d_in, d_out, name, inward=inward)
            out[f"blocks/{site}/kernel"] = self._fused(site, kernel) if self.fused and not inward else kernel
            if self.biased(site):
                specs = WHOLE if inward else (P(None, "tensor"),)
                out[f"blocks/{site}/bias"] = Leaf((self.layers, d_out), specs, f"{name}.bias", 1, fill=0.0)
        return out

    def _fused(self, site, leaf):
        """The leaf as a part of the tensor that it shares with its neighbours."""
        beside, name = (("q", "k", "v"), "qkv_proj") if site in "qkv" else (("gate", "up"), "gate_up_proj")
        ends = list(itertools.accumulate(self.dims(other)[1] for other in beside))
        stop = ends[beside.index(site)]
        whole = leaf.name.replace(NAMES[site].rpartition(".")[2], name)
        return dataclasses.replace(leaf, name=whole, part=Part(0, stop - self.dims(site)[1], stop, ends[-1]))

    def embed(self, params, batch):
        x = super().embed(params, batch)
        return x * jnp.asarray(self.width**0.5, x.dtype) if self.scaled_embedding else x

    def norm(self, params, x):
        return self._norm(x, params["final_norm"])

    def _norm(self, x, weight):
        return rms_norm(x, weight, self.norm_eps, plus_one=self.plus_one)

    def logits(self, params, hidden):
        return capped(super().logits(params, hidden), self.logit_cap)

    def once(self, positions, mask, *, cached, segment_ids=None):
        scaling, lengths = self.rope_scaling, None
        if scaling is not None and scaling.by_length:
            segment_ids = jnp.ones_like(positions) if segment_ids is None else segment_ids
            lengths = text_lengths(positions, segment_ids, cached=cached)
        r = self.rotated or self.head_dim
        shared = {"mask": mask, "turn": rotary(positions, self.rope_base, r, scaling, lengths)}
        if self.local_base is not None and self.sliding:
            shared["local_turn"] = rotary(positions, self.local_base, self.head_dim)
        if self.window is not None and self.sliding:
            # a cache has position p in slot p; packed rows start anew with each example, so there the place in the row
            at = positions if cached else jnp.arange(mask.shape[2])[None]
            shared["narrow"] = window_mask(mask, at, self.window)
        return shared

    def block(self, p, x, at, adapt, cache):
        normed = lambda y, name: self._norm(y, p[name]) if name in p else y  # noqa: E731
        with jax.named_scope("attention"):
            change, cache = self._attention(p, normed(x, "attn_norm"), at, adapt, cache)
            x = x + normed(change, "attn_out_norm")
        with jax.named_scope("ffn"):
            x = x + normed(self._feed_forward(p, normed(x, "ffn_norm"), at, adapt), "ffn_out_norm")
        return x, cache

    def _attention(self, p, h, at, adapt, cache):
        weights = weights_of(p, ("q", "k", "v", "o"))

        def core(q, k, v):
            nonlocal cache
            both = lambda q, k: (self._norm(q, p["q_norm"]), self._norm(k, p["k_norm"]))  # noqa: E731

            def keys(prompt, q=q):  # normed as a text's, without positions
                prompt = self._norm(prompt, p["k_norm"]) if self.qk_norm_all else prompt
                prompt = prompt.reshape(*prompt.shape[:2], -1, self.head_dim)
                return self._norm(prompt, p["k_norm"]) if self.qk_norm else prompt

            q, k = both(q, k) if self.qk_norm_all else (q, k)
            q, k, v = (y.reshape(*h.shape[:2], -1, self.head_dim) for y in (q, k, v))
            q, k = both(q, k) if self.qk_norm else (q, k)
            q, k = self._positioned(q, at), self._positioned(k, at)
            if cache is not None:
                k, v, cache = cache(k, v)
            mask = at.once["mask"]
            if "narrow" in at.once:
                mask = jnp.where(at.arrays["slides"], at.once["narrow"], mask)
            alone = cache is None
            out = attend(
                q, k, v, mask, asked=at.attention, train=at.train and alone, causal=alone, cap=self.score_cap,
                scale=None if self.query_scalar is None else self.query_scalar**-0.5, sinks=p.get("sinks"),
            )  # fmt: skip
            if self.query_scalar is not None:  # `attend_prompt` divides by the root of the head's width
                q = q * (self.head_dim / self.query_scalar) ** 0.5
            return adapt.prompted(out, q, weights, keys)

        return adapt.attention(h, weights, core), cache

    def _positioned(self, y, at):
        turn = at.once["turn"]
        if "local_turn" in at.once:
            turn = jax.tree.map(functools.partial(jnp.where, at.arrays["slides"]), at.once["local_turn"], turn)
        turned = rotate(y, turn)
        return jnp.where(at.arrays["unrotated"], y, turned) if "unrotated" in at.arrays else turned

    def _feed_forward(self, p, h, at, adapt):
        return adapt.feed_forward(h, weights_of(p, ("gate", "up", "down")), self.activation)

    def cacheable(self, first, last):
        return self.rope_scaling is None or self.rope_scaling.stays(first, last)

    def init_cache(self, rows, slots, dtype):
        empty = lambda: jnp.zeros((self.layers, rows, slots, self.kv_heads, self.head_dim), dtype)  # noqa: E731
        return empty(), empty()


def weights_of(p: dict, sites) -> dict:
    """Site -> (kernel, bias or None) of one layer."""
    return {site: (p[site]["kernel"], p[site].get("bias")) for site in sites}
