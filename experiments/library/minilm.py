"""MiniLM (a BERT of six layers) as a Flax Linen model that was written here, and its weights from the package.

Post-norm blocks under one nn.scan; the `variable_axes` beyond `params` are those that `mj.attach` needs. B texts, S
tokens, D width.
"""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

import molora_jax as mj

AXES = dict(params=0, adapters=0, router_state=0, frozen=0, routing=0)


class Block(nn.Module):
    heads: int
    ffn_width: int

    @nn.compact
    def __call__(self, x, mask):
        q, k, v = (nn.Dense(x.shape[-1], name=name)(x).reshape(*x.shape[:2], self.heads, -1) for name in "qkv")
        h = nn.dot_product_attention(q, k, v, mask=mask[:, None, None, :]).reshape(x.shape)
        x = nn.LayerNorm(1e-12, name="attn_norm")(x + nn.Dense(x.shape[-1], name="o")(h))
        h = nn.gelu(nn.Dense(self.ffn_width, name="up")(x), approximate=False)
        return nn.LayerNorm(1e-12, name="ffn_norm")(x + nn.Dense(x.shape[-1], name="down")(h)), None


class MiniLM(nn.Module):
    """`tokens [B, S]`, `mask [B, S]` (True at tokens) -> one vector a text `[B, D]`, the mean over its tokens."""

    vocab: int = 30522
    width: int = 384
    ffn_width: int = 1536
    heads: int = 12
    layers: int = 6
    context: int = 512

    @nn.compact
    def __call__(self, tokens, mask):
        x = nn.Embed(self.vocab, self.width, name="embed")(tokens)
        x = x + self.param("positions", nn.initializers.normal(0.02), (self.context, self.width))[: tokens.shape[1]]
        x = nn.LayerNorm(1e-12, name="embed_norm")(x + self.param("token_type", nn.initializers.zeros, (self.width,)))
        stack = nn.scan(
            Block, variable_axes=AXES, split_rngs={"params": True, "dropout": True}, in_axes=nn.broadcast,
            length=self.layers,
        )  # fmt: skip
        x, _ = stack(self.heads, self.ffn_width, name="layers")(x, mask)
        return jnp.where(mask[..., None], x, 0).sum(1) / mask.sum(1, keepdims=True)


def weights(source: str = "pkg:all-minilm-l6-v2"):
    """`(model, params, tokenizer)` of a BERT that molora_jax can read; the arrays are renamed, not changed."""
    base = mj.load_base(source)
    own, shape = base.params, base.config
    norm = lambda tree: {"scale": tree["weight"], "bias": tree["bias"]}  # noqa: E731
    layers = {name: norm(leaf) if name.endswith("norm") else leaf for name, leaf in own["blocks"].items()}
    params = {
        "embed": {"embedding": own["embed"]}, "positions": own["positions"], "token_type": own["token_types"][0],
        "embed_norm": norm(own["embed_norm"]), "layers": layers,
    }  # fmt: skip
    model = MiniLM(shape.vocab, shape.width, shape.ffn_width, shape.heads, shape.layers, shape.context)
    return model, params, base.tokenizer


def tokenize(tokenizer, texts, length: int):
    """`(tokens, mask) [N, length]`, with the tokens that MiniLM was trained to see around a text."""
    tokens, mask = np.zeros((len(texts), length), np.int32), np.zeros((len(texts), length), bool)
    for row, text in enumerate(texts):
        ids = [*tokenizer.encode_plain(text), tokenizer.eos_id][:length]
        tokens[row, : len(ids)], mask[row, : len(ids)] = ids, True
    return tokens, mask
