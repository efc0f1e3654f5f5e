"""A small vision transformer in Flax Linen. It knows nothing of molora_jax.

B images, H x W pixels, P patches, D width.
"""

import flax.linen as nn
import jax.numpy as jnp


class Block(nn.Module):
    width: int
    heads: int

    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(self.heads, name="attention")(nn.LayerNorm()(x))
        h = nn.gelu(nn.Dense(4 * self.width, name="up")(nn.LayerNorm()(x)))
        return x + nn.Dense(self.width, name="down")(h)


class ViT(nn.Module):
    """`images [B, H, W]` -> logits `[B, classes]`."""

    width: int = 32
    heads: int = 2
    layers: int = 2
    patch: int = 2
    classes: int = 10

    @nn.compact
    def __call__(self, images):
        B, H, W = images.shape
        n = self.patch
        x = images.reshape(B, H // n, n, W // n, n).swapaxes(2, 3).reshape(B, -1, n * n)
        x = nn.Dense(self.width, name="patches")(x)
        x = x + self.param("positions", nn.initializers.normal(0.02), x.shape[1:])
        for i in range(self.layers):
            x = Block(self.width, self.heads, name=f"layers_{i}")(x)
        return nn.Dense(self.classes, name="head")(nn.LayerNorm()(jnp.mean(x, axis=1)))
