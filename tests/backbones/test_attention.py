"""Which form of attention a layer takes, by what it is for and where it runs."""

from types import SimpleNamespace as Thing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from molora_jax.backbones import attention
from molora_jax.backbones.attention import attention_form

H100, T4, AMD = (Thing(compute_capability=version) for version in ("9.0", "7.5", "gfx942"))
Q = jax.ShapeDtypeStruct((2, 64, 9, 64), jnp.bfloat16)


@pytest.fixture
def one_device(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)


def test_the_fused_form_is_taken_where_asked_for_and_measured(one_device):
    assert attention_form(Q, "fused", train=True, platform="gpu", device=H100) == "cudnn"


@pytest.mark.parametrize(
    "changes",
    [
        dict(asked="xla"),
        dict(train=False),
        dict(platform="cpu"),
        dict(platform="tpu"),
        dict(device=T4),
        dict(device=AMD),
        dict(q=jax.ShapeDtypeStruct(Q.shape, jnp.float32)),
        dict(q=jax.ShapeDtypeStruct((2, 63, 9, 64), Q.dtype)),
        dict(q=jax.ShapeDtypeStruct((2, 64, 9, 60), Q.dtype)),
    ],
)
def test_elsewhere_jax_chooses(one_device, changes):
    options = dict(q=Q, asked="fused", train=True, platform="gpu", device=H100) | changes
    assert attention_form(**options) is None


def test_several_devices_were_not_measured():
    assert attention_form(Q, "fused", train=True, platform="gpu", device=H100) is None


def float64(q, k, v, mask, upstream, cap=None, sinks=None):
    """Attention and the gradients of its product with `upstream`, by hand: `[out, dq, dk, dv]`, and of the sinks."""
    q, k, v, upstream = (np.asarray(x, np.float64) for x in (q, k, v, upstream))
    wide = lambda x: np.repeat(x, q.shape[2] // k.shape[2], axis=2)  # noqa: E731
    narrow = lambda x: x.reshape(*k.shape[:3], -1, k.shape[3]).sum(3)  # noqa: E731
    scale = q.shape[-1] ** -0.5
    raw = scale * np.einsum("bshd,bthd->bhst", q, wide(k))
    bent = raw if cap is None else cap * np.tanh(raw / cap)
    p = np.exp(np.where(mask, bent, -np.inf))
    away = 0 if sinks is None else np.exp(np.asarray(sinks, np.float64))[:, None, None]
    total = p.sum(-1, keepdims=True) + away
    p /= total
    out = np.einsum("bhst,bthd->bshd", p, wide(v))
    dp = np.einsum("bshd,bthd->bhst", upstream, wide(v))
    mean = (p * dp).sum(-1, keepdims=True)
    ds = scale * p * (dp - mean) * (1 if cap is None else 1 - (bent / cap) ** 2)
    dv = narrow(np.einsum("bhst,bshd->bthd", p, upstream))
    found = out, np.einsum("bhst,bthd->bshd", ds, wide(k)), narrow(np.einsum("bhst,bshd->bthd", ds, q)), dv
    return found if sinks is None else (*found, -(away / total * mean).sum((0, 2, 3)))


@pytest.mark.parametrize("window", [None, 9])
def test_causal_blocks_equal_float64(monkeypatch, window):
    """Packed rows with padding at the end, a last block that is not whole, a window; values and gradients."""
    monkeypatch.setattr(attention, "SMALLEST_BLOCK", 16)
    keys, S = jax.random.split(jax.random.key(0), 4), 59
    q, upstream = (jax.random.normal(key, (2, S, 4, 8)) for key in keys[:2])
    k, v = (jax.random.normal(key, (2, S, 2, 8)) for key in keys[2:])
    segments = np.repeat([[1, 2, 0], [1, 2, 3]], [23, 30, 6], axis=1)
    mask = attention.causal_mask(jnp.array(segments))
    if window:
        mask = attention.window_mask(mask, jnp.arange(S)[None], window)

    @jax.jit
    def run(q, k, v):
        out, back = jax.vjp(lambda *given: attention.by_blocks(*given, mask), q, k, v)
        return out, *back(upstream)

    for got, expected in zip(run(q, k, v), float64(q, k, v, np.asarray(mask), upstream), strict=True):
        np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("cap", [None, 0.8])
def test_sinks_and_caps_equal_float64(monkeypatch, cap):
    """By blocks, in packed rows with a window; the gradient of the sinks too."""
    monkeypatch.setattr(attention, "SMALLEST_BLOCK", 16)
    keys, S = jax.random.split(jax.random.key(1), 5), 37
    q, upstream = (jax.random.normal(key, (2, S, 4, 8)) for key in keys[:2])
    k, v = (jax.random.normal(key, (2, S, 2, 8)) for key in keys[2:4])
    sinks = jax.random.normal(keys[4], (4,))
    mask = attention.causal_mask(jnp.arange(S)[None] // np.array([[20], [50]]))
    mask = attention.window_mask(mask, jnp.arange(S)[None], 9)

    @jax.jit
    def run(*given):
        form = dict(mask=mask, asked="xla", train=True, causal=True, cap=cap)
        out, back = jax.vjp(
            lambda q, k, v, sinks: attention.attend(q, k, v, sinks=sinks, **form).reshape(q.shape), *given
        )
        return out, *back(upstream)

    wanted = float64(q, k, v, np.asarray(mask), upstream, cap, sinks)
    for got, expected in zip(run(q, k, v, sinks), wanted, strict=True):
        np.testing.assert_allclose(got, expected, rtol=3e-5, atol=3e-6)


def test_scores_that_are_surely_masked_are_not_formed():
    q, kv = jax.ShapeDtypeStruct((1, 1024, 4, 8), jnp.float32), jax.ShapeDtypeStruct((1, 1024, 2, 8), jnp.float32)
    mask = jax.ShapeDtypeStruct((1, 1, 1024, 1024), bool)
    flops = lambda causal: jax.jit(  # noqa: E731
        lambda *given: attention.attend(*given, asked="xla", train=True, causal=causal)
    ).lower(q, kv, kv, mask).compile().cost_analysis()["flops"]  # fmt: skip
    assert flops(True) < 0.6 * flops(False)
