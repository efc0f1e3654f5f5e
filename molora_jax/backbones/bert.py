"""BERT: an encoder that reads both ways. Post-norm blocks, a bias everywhere, learned positions, no head and no cache.

    x = LN(embed[tokens] + token_types[types] + positions[positions])
    x = LN(x + o attention(q x, k x, v x));   x = LN(x + down act(up x))

    embed [V, D]   positions [P, D]   token_types [N, D]   embed_norm/{weight, bias} [D]
    blocks/{attn_norm, ffn_norm}/{weight, bias} [L, D]
    blocks/{q, k, v, o, up, down}/{kernel [L, D_in, D_out], bias [L, D_out]}

An example is one text (token type 0) unless the batch has `token_type_ids`. Devlin et al. 2019, arXiv 1810.04805.
B batch, S sequence, D width, F FFN width, L layers, V vocabulary, P positions, N token types.
"""

import dataclasses
from typing import ClassVar

import jax
from jax.sharding import PartitionSpec as P

from molora_jax.backbones import hf_fields
from molora_jax.backbones.attention import attend, layer_norm, mask_both_ways
from molora_jax.backbones.base import TABLES, WHOLE, Backbone, Leaf, Stack, needs_head, projection
from molora_jax.backbones.llama import weights_of
from molora_jax.errors import InputError

AT = "encoder.layer.{}."
NAMES = {  # ours -> Hugging Face's, inside a layer
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "o": "attention.output.dense",
    "up": "intermediate.dense",
    "down": "output.dense",
    "attn_norm": "attention.output.LayerNorm",
    "ffn_norm": "output.LayerNorm",
}
NO_GATE = "Its feed-forward block is down(act(up x)), without a gate: name up and down."


@dataclasses.dataclass(frozen=True)
class Bert(Backbone):
    """Shape of an encoder. `D = width`, `F = ffn_width`, P = context."""

    family: str
    layers: int
    width: int
    ffn_width: int
    heads: int
    vocab: int
    context: int
    token_types: int
    norm_eps: float
    activation: str = "gelu"

    CAUSAL: ClassVar[bool] = False
    ABSENT: ClassVar[dict[str, str]] = Backbone.ABSENT | {
        "gate": NO_GATE,
        "ffn": f"A routed FFN changes gate, up and down. {NO_GATE}",
    }
    PREFIX: ClassVar[str] = "bert."
    IGNORED: ClassVar[tuple[str, ...]] = ("pooler.*", "embeddings.position_ids", "cls.*", "classifier.*")

    @property
    def stacks(self) -> tuple[Stack, ...]:
        return (Stack("blocks", 0, self.layers, ("q", "k", "v", "o", "up", "down")),)

    def dims(self, site: str) -> tuple[int, int]:
        d, f = self.width, self.ffn_width
        return {"up": (d, f), "down": (f, d)}.get(site, (d, d))

    def shapes(self) -> dict[str, Leaf]:
        d, out = self.width, {}
        for path, rows, specs, name in (
            ("embed", self.vocab, tuple(P(v, w) for v, w in TABLES), "word"),
            ("positions", self.context, WHOLE, "position"),
            ("token_types", self.token_types, WHOLE, "token_type"),
        ):
            out[path] = Leaf((rows, d), specs, f"embeddings.{name}_embeddings.weight", scale=0.02)
        for part, fill in (("weight", 1.0), ("bias", 0.0)):
            out[f"embed_norm/{part}"] = Leaf((d,), WHOLE, f"embeddings.LayerNorm.{part}", fill=fill)
            for norm in ("attn_norm", "ffn_norm"):
                name = f"{AT}{NAMES[norm]}.{part}"
                out[f"blocks/{norm}/{part}"] = Leaf((self.layers, d), WHOLE, name, 1, fill=fill)
        for site in self.sites:
            (d_in, d_out), inward, name = self.dims(site), site in ("o", "down"), AT + NAMES[site]
            out[f"blocks/{site}/kernel"] = projection(self.layers, d_in, d_out, name, inward=inward)
            specs = WHOLE if inward else (P(None, "tensor"),)
            out[f"blocks/{site}/bias"] = Leaf((self.layers, d_out), specs, f"{name}.bias", 1, fill=0.0)
        return out

    def embed(self, params, batch):
        x = params["embed"][batch["tokens"]] + params["positions"][batch["positions"]]
        types = batch.get("token_type_ids")
        x = x + (params["token_types"][0] if types is None else params["token_types"][types])
        return self._normed(x, params["embed_norm"])

    def norm(self, params, x):
        return x  # each block ends with one

    def mask(self, segment_ids):
        return mask_both_ways(segment_ids)

    def block(self, p, x, at, adapt, cache):
        heads = lambda y: y.reshape(*x.shape[:2], self.heads, -1)  # noqa: E731

        weights = weights_of(p, ("q", "k", "v", "o"))

        def core(q, k, v):
            out = attend(heads(q), heads(k), heads(v), at.once["mask"], asked=at.attention, train=at.train)
            return adapt.prompted(out, heads(q), weights, lambda y: y.reshape(*y.shape[:2], self.heads, -1))

        with jax.named_scope("attention"):
            change = adapt.attention(x, weights, core)
            x = self._normed(x + change, p["attn_norm"])
        with jax.named_scope("ffn"):
            change = adapt.feed_forward(x, weights_of(p, ("up", "down")), self.activation)
            x = self._normed(x + change, p["ffn_norm"])
        return x, cache

    def _normed(self, x, p):
        return layer_norm(x, p["weight"], p["bias"], self.norm_eps)

    def logits(self, params, hidden):
        needs_head(self, "a distribution over tokens", "base.source")


def read(config: dict, *, family: str, where: str, number, activation: str) -> Bert:
    """From a Hugging Face `config.json` of `model_type` `family`; `number` as in `hf_config`."""
    heads, width, kind = number("num_attention_heads"), number("hidden_size"), config.get("position_embedding_type")
    wrong = {
        "is_decoder": (config.get("is_decoder"), "false: it reads both ways here", not config.get("is_decoder")),
        "position_embedding_type": (kind, "absolute", kind in (None, "absolute")),
        "num_attention_heads": (heads, f"a divisor of hidden_size, {width}", width % heads == 0),
    }
    for name, (got, expected, fine) in wrong.items():
        if not fine:
            raise InputError(f"{where}: {name}", got=hf_fields.shown(got), expected=expected)
    return Bert(
        family=family, layers=number("num_hidden_layers"), width=width, ffn_width=number("intermediate_size"),
        heads=heads, vocab=number("vocab_size"), context=number("max_position_embeddings", 512),
        token_types=number("type_vocab_size", 2), norm_eps=number("layer_norm_eps", 1e-12, kind=float),
        activation=activation,
    )  # fmt: skip
