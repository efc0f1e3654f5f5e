"""Attention's parts that backbones share: masks, rotary positions, norms, and which form a device takes.

B batch, S sequence, D width, H heads, H_d head size.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.platform import platform_of

BLOCKS, SMALLEST_BLOCK = (
    8,
    128,
)  # of queries in causal attention: half of a long row's scores, in a program of few parts

MASKED = -0.7 * float(np.finfo(np.float32).max)  # a score that no query sees, as jax has it


def causal_mask(segment_ids):
    """Causal and block-diagonal by example: `[B, S]` -> `[B, 1, S, S]`; padding sees padding (no empty row)."""
    S = segment_ids.shape[1]
    return mask_both_ways(segment_ids) & jnp.tril(jnp.ones((S, S), bool))


def mask_both_ways(segment_ids):
    """Block-diagonal by example: `[B, S]` -> `[B, 1, S, S]`; padding sees padding (no empty row)."""
    return segment_ids[:, None, :, None] == segment_ids[:, None, None, :]


def window_mask(mask, at, window: int):
    """What a sliding layer sees of `mask [B, 1, S, S_k]`: keys less than `window` behind the slots `at [B | 1, S]`."""
    behind = at[:, None, :, None] - jnp.arange(mask.shape[-1])
    return mask & (behind < window)


def rms_norm(x, weight, eps, *, plus_one: bool = False):
    """In float32 whatever x is. `plus_one`: times `1 + weight`."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * (weight.astype(jnp.float32) + (1.0 if plus_one else 0.0))).astype(x.dtype)


def capped(z, cap: float | None):
    """`cap tanh(z / cap)`: numbers below the cap."""
    return z if cap is None else cap * jnp.tanh(z / cap)


def layer_norm(x, weight, bias, eps):
    """In float32 whatever x is."""
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * weight.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


def text_lengths(positions, segment_ids, *, cached: bool):
    """How long each token's own text is: `[B, S]`, of rows with a cache (one text each) `[B, 1]`."""
    if cached:
        return 1 + jnp.max(jnp.where(segment_ids > 0, positions, 0), axis=1, keepdims=True)
    same = segment_ids[:, :, None] == segment_ids[:, None]
    return 1 + jnp.max(jnp.where(same, positions[:, None], 0), axis=-1)


def rotary(positions, base: float, r: int, scaling=None, lengths=None):
    """`positions [B, S]` -> cosines and sines `[B, S, 1, r]`, scaled as `rope.py` says; `lengths [B, S | 1]` of the
    texts, where the scaling follows them."""
    half, attention = r // 2, 1.0 if scaling is None else scaling.attention
    if scaling is not None and scaling.by_length:
        frequency = scaling.frequencies(base, r, lengths)
    else:
        frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
        if scaling is not None:
            frequency = frequency * scaling.multipliers(base, r).astype(np.float32)
    angle = positions[..., None].astype(jnp.float32) * jnp.concatenate([frequency, frequency], axis=-1)
    return (jnp.cos(angle) * attention)[:, :, None], (jnp.sin(angle) * attention)[:, :, None]


def rotate(x, turn):
    """Rotate-half convention, in float32; what lies beyond the cosines' width stays."""
    cos, sin = turn
    r = cos.shape[-1]
    if r < x.shape[-1]:
        return jnp.concatenate([rotate(x[..., :r], turn), x[..., r:]], axis=-1)
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


def attend(
    q, k, v, mask, *, asked: str, train: bool, causal: bool = False, scale: float | None = None,
    cap: float | None = None, sinks=None,
):  # fmt: skip
    """`q [B, S, H, H_d]`, `k, v [B, S_k, H_kv, H_d]` -> `[B, S, H * H_d]`.

    `causal` promises that `mask` lets no query see a later key and that S = S_k: scores that are surely masked are then
    not formed (at S = 512, 10 of 16 blocks are). `scale`: of the scores, 1 over the root of H_d where None; `cap`: see
    `capped`; `sinks [H]`: of each head a score more, of a key whose value is 0.
    """
    plain = cap is None and sinks is None
    form = attention_form(q, asked, train=train) if plain else None
    one = functools.partial(jax.nn.dot_product_attention, scale=scale, implementation=form)
    if not plain:
        one = functools.partial(written_out, scale=scale, cap=cap, sinks=sinks)
    if form is not None or not causal:
        out = one(q, k, v, mask=mask)
    else:
        out = by_blocks(q, k, v, mask, one)
    return out.reshape(*q.shape[:2], -1)


def written_out(q, k, v, *, mask, scale: float | None = None, cap: float | None = None, sinks=None):
    """`dot_product_attention` with what jax's does not have; scores and their softmax in float32."""
    H, kv = q.shape[2], k.shape[2]
    q = q.reshape(*q.shape[:2], kv, H // kv, -1)
    z = jnp.einsum("bsgnd,btgd->bgnst", q, k, preferred_element_type=jnp.float32)
    z = capped(z * (q.shape[-1] ** -0.5 if scale is None else scale), cap)
    z = jnp.where(mask[:, :, None], z, MASKED)
    if sinks is not None:
        sink = sinks.astype(jnp.float32).reshape(1, kv, -1, 1, 1)
        z = jnp.concatenate([z, jnp.broadcast_to(sink, (*z.shape[:-1], 1))], axis=-1)
    p = jax.nn.softmax(z, axis=-1)
    p = p if sinks is None else p[..., :-1]
    out = jnp.einsum("bgnst,btgd->bsgnd", p.astype(v.dtype), v)
    return out.reshape(*out.shape[:2], H, -1)


def by_blocks(q, k, v, mask, one=jax.nn.dot_product_attention):
    """Causal attention, at most BLOCKS blocks of queries one after the other, each with the keys up to its end."""
    S = q.shape[1]
    size = max(SMALLEST_BLOCK, -(-S // BLOCKS))
    ends = [(start, min(start + size, S)) for start in range(0, S, size)]
    parts = [one(q[:, start:end], k[:, :end], v[:, :end], mask=mask[:, :, start:end, :end]) for start, end in ends]
    return jnp.concatenate(parts, axis=1)
