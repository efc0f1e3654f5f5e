"""One decoder block with named sites: attention (q k v o) and feed-forward (gate up down), pre-norm, rotary positions.

A Linen module that owns the frozen parameters and calls plain functions; every site goes through `Layer`, which adds
the rules' experts. B batch, S sequence, D width, H heads, H_d head size.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.platform import platform_of
from molora_jax.backbones.families import DecoderConfig
from molora_jax.backbones.layer import Layer


def rms_norm(x, weight, eps):
    """In float32 whatever x is."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * weight.astype(jnp.float32)).astype(x.dtype)


def rotary(config: DecoderConfig, positions):
    """`positions [B, S]` -> cosines and sines `[B, S, 1, H_d]`, scaled as `rope.py` says."""
    half = config.head_dim // 2
    frequency = config.rope_base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    scaling, attention = config.rope_scaling, 1.0
    if scaling is not None:
        frequency = frequency * scaling.multipliers(config.rope_base, config.head_dim).astype(np.float32)
        attention = scaling.attention
    angle = positions[..., None].astype(jnp.float32) * jnp.concatenate([frequency, frequency])
    return (jnp.cos(angle) * attention)[:, :, None], (jnp.sin(angle) * attention)[:, :, None]


def rotate(x, turn):
    """Rotate-half convention, in float32."""
    cos, sin = turn
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return (jnp.concatenate([a, b], -1) * cos + jnp.concatenate([-b, a], -1) * sin).astype(x.dtype)


def attention_form(q, asked: str, *, train: bool, platform: str | None = None, device=None) -> str | None:
    """`cudnn`, which keeps no scores `[B, H, S, S]` in memory, or None for what jax takes. `q [B, S, H, H_d]`.

    For `asked="fused"`, and where its speed was measured: training in half precision on one NVIDIA GPU (1.65 times as
    fast a step of plain LoRA, docs/performance.md). float32 and GPUs before capability 8 it does not have. It has to be
    asked for because its values and gradients were not yet compared with float64.
    """
    if asked != "fused" or not train or platform_of(platform) != "gpu" or jax.device_count() > 1:
        return None
    capability = str(getattr(device or jax.local_devices()[0], "compute_capability", ""))  # "9.0"; AMD's is a word
    capable = capability[:1].isdigit() and float(capability) >= 8
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    fits = q.shape[1] % 2 == 0 and q.shape[3] % 8 == 0 and q.shape[3] <= 128
    return "cudnn" if capable and half and fits else None


class Kernel(nn.Module):
    """Owns one frozen `[D_in, D_out]` kernel, and a bias where the family has one."""

    shape: tuple[int, int]
    bias: bool = False

    @nn.compact
    def __call__(self):
        kernel = self.param("kernel", nn.initializers.normal(0.02), self.shape)
        return kernel, self.param("bias", nn.initializers.zeros, (self.shape[1],)) if self.bias else None


class Block(nn.Module):
    config: DecoderConfig
    attention: str = "xla"

    @nn.compact
    def __call__(self, x, layer: Layer, turn, mask, cache=None):
        """`x [B, S, D]`; `mask [B, 1, S, S_k]`; `cache` maps new `(k, v) [B, S, H_kv, H_d]` to all that may be seen.

        Returns `[B, S, D]` and the new cache (None without one).
        """
        c = self.config
        norm = {n: self.param(n, nn.initializers.ones, (c.width,)) for n in ("attn_norm", "ffn_norm")}
        weights: dict[str, Any] = {}
        for name in ("q", "k", "v", "o", "gate", "up", "down"):
            weights[name] = Kernel(c.dims(name), c.biased(name), name=name)()

        with jax.named_scope("attention"):
            h = rms_norm(x, norm["attn_norm"], c.norm_eps)
            layer.enter("attn", h)
            q, k, v = (layer.project(n, *weights[n], h).reshape(*h.shape[:2], -1, c.head_dim) for n in ("q", "k", "v"))
            if c.qk_norm:
                q = rms_norm(q, self.param("q_norm", nn.initializers.ones, (c.head_dim,)), c.norm_eps)
                k = rms_norm(k, self.param("k_norm", nn.initializers.ones, (c.head_dim,)), c.norm_eps)
            q, k = rotate(q, turn), rotate(k, turn)
            if cache is not None:
                k, v, cache = cache(k, v)
            form = attention_form(q, self.attention, train=layer.ctx.train and cache is None)
            a = jax.nn.dot_product_attention(q, k, v, mask=mask, implementation=form)
            x = x + layer.project("o", *weights["o"], a.reshape(*h.shape[:2], -1))

        with jax.named_scope("ffn"):
            h = rms_norm(x, norm["ffn_norm"], c.norm_eps)
            layer.enter("ffn", h)
            g, u = (layer.project(n, *weights[n], h) for n in ("gate", "up"))
            x = x + layer.feed_forward(h, g, u, weights, c.activation)
        return x, cache
