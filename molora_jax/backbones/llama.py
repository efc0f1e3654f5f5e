"""The Llama family of decoders: pre-norm attention (q k v o) and gated feed-forward (gate up down), rotary positions.

    embed [V, D]   final_norm [D]   head [D, V] (absent when tied)
    blocks/{attn_norm, ffn_norm} [L, D]
    blocks/{q, k, v, o, gate, up, down}/kernel [L, D_in, D_out]   and /bias [L, D_out] where the model has one
    blocks/{q_norm, k_norm} [L, H_d]    where the family has one (Qwen3)

Kernels are `[D_in, D_out]`. Switches say how families differ (`families.py` has a row for each).
B batch, S sequence, D width, F FFN width, H heads, H_d head size, L layers, V vocabulary.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from molora_jax.backbones import rope
from molora_jax.backbones.attention import attend, rms_norm, rotary, rotate, text_lengths, window_mask
from molora_jax.backbones.base import TABLES, WHOLE, Backbone, Leaf, Stack, projection

AT = "model.layers.{}."
NAMES = {  # ours -> Hugging Face's, inside a layer
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
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

    TITLE: ClassVar[str] = "DecoderConfig"

    @property
    def stacks(self) -> tuple[Stack, ...]:
        marked = (("slides", self.sliding if self.window is not None else ()), ("unrotated", self.unrotated))
        arrays = tuple((name, tuple(i in at for i in range(self.layers))) for name, at in marked if at)
        return (Stack("blocks", 0, self.layers, ("q", "k", "v", "o", "gate", "up", "down"), arrays),)

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
        out["final_norm"] = Leaf((self.width,), WHOLE, "model.norm.weight")
        if not self.tied:
            specs = tuple(P(d, v) for v, d in TABLES)
            out["head"] = Leaf(table[::-1], specs, "lm_head.weight", turned=True, scale=0.02)
        return out | self._norms() | self._projections() | self._qk_norms()

    def _norms(self):
        return {f"blocks/{n}": self._vector(n, self.width) for n in ("attn_norm", "ffn_norm")}

    def _qk_norms(self):
        return {f"blocks/{n}": self._vector(n, self.head_dim) for n in ("q_norm", "k_norm") if self.qk_norm}

    def _vector(self, name, width):
        return Leaf((self.layers, width), WHOLE, f"{AT}{NAMES[name]}.weight", stacked=1)

    def _projections(self):
        out = {}
        for site in self.sites:
            (d_in, d_out), name = self.dims(site), AT + NAMES[site]
            inward = site in ("o", "down")
            out[f"blocks/{site}/kernel"] = projection(self.layers, d_in, d_out, name, inward=inward)
            if self.biased(site):
                specs = WHOLE if inward else (P(None, "tensor"),)
                out[f"blocks/{site}/bias"] = Leaf((self.layers, d_out), specs, f"{name}.bias", 1, fill=0.0)
        return out

    def norm(self, params, x):
        return rms_norm(x, params["final_norm"], self.norm_eps)

    def once(self, positions, mask, *, cached, segment_ids=None):
        scaling, lengths = self.rope_scaling, None
        if scaling is not None and scaling.by_length:
            segment_ids = jnp.ones_like(positions) if segment_ids is None else segment_ids
            lengths = text_lengths(positions, segment_ids, cached=cached)
        shared = {"mask": mask, "turn": rotary(positions, self.rope_base, self.head_dim, scaling, lengths)}
        if self.window is not None:
            # a cache has position p in slot p; packed rows start anew with each example, so there the place in the row
            at = positions if cached else jnp.arange(mask.shape[2])[None]
            shared["narrow"] = window_mask(mask, at, self.window)
        return shared

    def block(self, p, x, at, adapt, cache):
        with jax.named_scope("attention"):
            change, cache = self._attention(p, rms_norm(x, p["attn_norm"], self.norm_eps), at, adapt, cache)
            x = x + change
        with jax.named_scope("ffn"):
            x = x + self._feed_forward(p, rms_norm(x, p["ffn_norm"], self.norm_eps), at, adapt)
        return x, cache

    def _attention(self, p, h, at, adapt, cache):
        def core(q, k, v):
            nonlocal cache
            q, k = self._normed(p, q, k)
            q, k, v = (y.reshape(*h.shape[:2], -1, self.head_dim) for y in (q, k, v))
            if self.qk_norm:
                q, k = (rms_norm(y, p[n], self.norm_eps) for y, n in ((q, "q_norm"), (k, "k_norm")))
            q, k = self._positioned(q, at), self._positioned(k, at)
            if cache is not None:
                k, v, cache = cache(k, v)
            mask = at.once["mask"]
            if "slides" in at.arrays:
                mask = jnp.where(at.arrays["slides"], at.once["narrow"], mask)
            alone = cache is None
            return attend(q, k, v, mask, asked=at.attention, train=at.train and alone, causal=alone)

        return adapt.attention(h, weights_of(p, ("q", "k", "v", "o")), core), cache

    def _normed(self, p, q, k):
        """A norm over all heads together; no Llama has one."""
        return q, k

    def _positioned(self, y, at):
        turned = rotate(y, at.once["turn"])
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
