"""Every implementation of an op against its reference: values, gradients, unused slots full of NaN; dropout masks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import rank_gated, routed_ffn
from kernels_pallas.rank_gated import api as rank_api
from kernels_pallas.routed_ffn import api as ffn_api
from molora_jax.core import lowrank
from molora_jax.core.types import Factors

OTHERS = lambda api: [name for name in api.IMPLEMENTATIONS if name != "reference"]  # noqa: E731
SHAPES = [(17, 2, 3, 24, 20, 1), (40, 5, 4, 16, 24, 2), (33, 6, 8, 12, 9, 6), (1, 3, 2, 8, 8, 2)]  # T E R D F K


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def decision(rng, T, E, K):
    """Gates of every sign, some tokens with fewer than K experts, some with none: `gates [T, E]`, `idx, w [T, K]`."""
    gates, idx, w = np.zeros((T, E), np.float32), np.full((T, K), E, np.int32), np.zeros((T, K), np.float32)
    for t in range(T):
        chosen = np.sort(rng.permutation(E)[: rng.integers(0, K + 1)])
        gates[t, chosen] = normal(rng, len(chosen)) + 0.1
        idx[t, : len(chosen)], w[t, : len(chosen)] = chosen, gates[t, chosen]
    return gates, idx, w


def near(got, wanted, tolerance, name=""):
    wanted = np.asarray(wanted, np.float64)
    limit = tolerance * max(np.abs(wanted).max(initial=0), 1e-3)
    np.testing.assert_allclose(np.asarray(got, np.float64), wanted, rtol=0, atol=limit, err_msg=name)


@functools.partial(jax.jit, static_argnames="implementation")
def rank_gated_both_ways(args, dy, *, implementation):
    out, pull = jax.vjp(lambda *a: rank_gated(*a, implementation=implementation), *args)
    return out, pull(dy)


@pytest.mark.parametrize("name", OTHERS(rank_api))
@pytest.mark.parametrize("shared_A", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rank_gated(shape, shared_A, name):
    """Against numpy in float64, and the derivative of the reference."""
    T, E, R, D, F, K = shape
    rng = np.random.default_rng(T)
    gates, _, _ = decision(rng, T, E, K)
    args = normal(rng, T, D), normal(rng, 1 if shared_A else E, R, D), normal(rng, E, R, F), gates
    x, A, B, g = (a.astype(np.float64) for a in args)
    wanted = sum(g[:, e : e + 1] * (x @ A[e if len(A) > 1 else 0].T @ B[e]) for e in range(E))
    dy = normal(rng, T, F)
    got, gradients = rank_gated_both_ways(args, dy, implementation=name)
    near(got, wanted, 1e-5)
    _, by_reference = rank_gated_both_ways(args, dy, implementation="reference")
    for part, a, b in zip(("dx", "dA", "dB", "dgates"), gradients, by_reference, strict=True):
        if part == "dgates":  # a gate that is exactly 0 is not selected; both forms give its derivative
            assert a.shape == b.shape
        near(a, b, 1e-5, part)


@pytest.mark.parametrize("name", OTHERS(rank_api))
def test_rank_gated_never_spreads_a_row_that_nobody_wrote(name):
    rng = np.random.default_rng(0)
    gates, _, _ = decision(rng, 9, 4, 2)
    gates[3] = 0
    x = normal(rng, 9, 8)
    x[3] = np.nan
    y = rank_gated(x, normal(rng, 4, 2, 8), normal(rng, 4, 2, 8), gates, implementation=name)
    assert np.isfinite(y).all() and not np.any(y[3])


@functools.partial(jax.jit, static_argnames=("activation", "implementation"))
def both_ways(args, idx, cotangents, *, mask, activation, implementation):
    """`(mix, z_d)` and the gradients of every argument, as one program."""

    def op(g, u, z_g, z_u, B_g, B_u, A_d, w, base):
        return routed_ffn(
            g, u, z_g, z_u, B_g, B_u, A_d, idx, w, base, activation=activation, mask=mask,
            implementation=implementation,
        )  # fmt: skip

    out, pull = jax.vjp(op, *args)
    return out, pull(cotangents)


@pytest.mark.parametrize("name", OTHERS(ffn_api))
@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_routed_ffn(shape, activation, name):
    """Values and every gradient; unused slots hold NaN and nothing of it comes out."""
    T, E, R, D, F, K = shape
    rng = np.random.default_rng(T + 1)
    _, idx, w = decision(rng, T, E, K)
    mask = (rng.random((T, F)) < 0.8).astype(np.float32) / 0.8 if T % 2 else None
    mask = None if mask is None else jnp.asarray(mask)
    args = [normal(rng, T, F), normal(rng, T, F), normal(rng, T, K, R), normal(rng, T, K, R), normal(rng, E, R, F),
            normal(rng, E, R, F), normal(rng, 1 if T == 33 else E, R, F), w, normal(rng, T)]  # fmt: skip
    unused = idx == E

    cotangents = normal(rng, T, F), normal(rng, T, K, R)
    clean = cotangents[0], np.where(unused[..., None], 0, cotangents[1])
    options = dict(activation=activation, mask=mask)
    (mix, z_d), wanted = both_ways(args, idx, clean, implementation="reference", **options)
    dirty = list(args)
    for i in (2, 3):
        dirty[i] = np.where(unused[..., None], np.nan, args[i])
    dirty[7] = np.where(unused, np.nan, w)
    (got_mix, got_z), got = both_ways(dirty, idx, cotangents, implementation=name, **options)
    near(got_mix, mix, 1e-5)
    near(got_z, z_d, 1e-5)
    assert not np.any(np.asarray(got_z)[unused])
    parts = ("g", "u", "z_g", "z_u", "B_g", "B_u", "A_d", "gates", "base")
    for part, a, b in zip(parts, got, wanted, strict=True):
        a, b = np.asarray(a), np.asarray(b)
        if part in ("z_g", "z_u", "gates"):
            assert not np.any(a[unused]), f"{part}: an unused slot got a gradient"
            a, b = a[~unused], b[~unused]
        near(a, b, 2e-5, part)


def test_routed_ffn_reference_is_the_formula_in_float64():
    rng = np.random.default_rng(5)
    T, E, R, F, K = 7, 4, 3, 10, 2
    _, idx, w = decision(rng, T, E, K)
    g, u, z_g, z_u = normal(rng, T, F), normal(rng, T, F), normal(rng, T, K, R), normal(rng, T, K, R)
    B_g, B_u, A_d, base = normal(rng, E, R, F), normal(rng, E, R, F), normal(rng, E, R, F), normal(rng, T)
    mix, z_d = routed_ffn(g, u, z_g, z_u, B_g, B_u, A_d, idx, w, base, implementation="reference")
    silu = lambda x: x / (1 + np.exp(-x))  # noqa: E731
    for t in range(T):
        wanted = base[t] * silu(g[t].astype(np.float64)) * u[t]
        for k in range(K):
            e = idx[t, k]
            if e == E:
                assert not np.any(z_d[t, k])
                continue
            h = silu(g[t].astype(np.float64) + z_g[t, k] @ B_g[e]) * (u[t] + z_u[t, k] @ B_u[e])
            wanted = wanted + w[t, k] * h
            near(z_d[t, k], A_d[e] @ h, 1e-5)
        near(mix[t], wanted, 1e-5)


@pytest.mark.parametrize("op", [rank_api, ffn_api])
def test_an_unknown_implementation_is_named(op):
    args = (None,) * (4 if op is rank_api else 10)
    call = rank_gated if op is rank_api else routed_ffn
    with pytest.raises(ValueError, match="no implementation 'fast'.*dense"):
        call(*args, implementation="fast")


def test_low_rank_with_a_core_equals_its_experts():
    """`mid` (LoRA-XS) and a latent hook go the general way: B (mid (A x)) by expert."""
    rng = np.random.default_rng(0)
    T, E, R, D, F = 11, 3, 4, 8, 6
    gates, _, _ = decision(rng, T, E, 2)
    A, B, mid, x = normal(rng, 1, R, D), normal(rng, E, R, F), normal(rng, E, R, R), normal(rng, T, D)
    got = lowrank.low_rank(x, Factors(A, B, mid=mid), gates, latent=lambda z: 2 * z)
    wanted = sum(gates[:, e : e + 1] * (2 * x @ A[0].T @ mid[e].T @ B[e]) for e in range(E))
    near(got, wanted, 1e-5)


@pytest.mark.parametrize("rate", [0.05, 0.5])
def test_dropout_mask(rate):
    """0 or 1 / keep; the part that is dropped is the rate, also of pairs: of neighbours, of four in a square (rows and
    columns meet by xor), of two keys."""
    made = [
        lowrank.dropped(jnp.ones((2000, 65)), lowrank.Dropout(jax.random.key(k), rate), jnp.arange(2000))
        for k in (1, 2)
    ]
    gone, other = (np.asarray(mask) == 0 for mask in made)
    np.testing.assert_allclose(made[0][~gone], 1 / (1 - rate), rtol=1e-6)

    def near(gone, expected):
        sigma = (expected * (1 - expected) / gone.size) ** 0.5
        assert abs(gone.mean() - expected) < 5 * sigma

    near(gone, rate)
    near(gone[:, 1:] & gone[:, :-1], rate**2)
    near(gone[1:] & gone[:-1], rate**2)
    near(gone & other, rate**2)
    odd = gone[1:, 1:] ^ gone[1:, :-1] ^ gone[:-1, 1:] ^ gone[:-1, :-1]
    near(odd, (1 - (1 - 2 * rate) ** 4) / 2)
    assert lowrank.dropout(None, rate) is None
    assert lowrank.dropout(jax.random.key(1), 0.0) is None


def test_dropout_scales_in_float32():
    """1 / keep of bfloat16 would be 0.2 % too large in every entry."""
    x = jnp.full((256, 256), 1.5, jnp.bfloat16)
    out = lowrank.dropped(x, lowrank.Dropout(jax.random.key(1), 0.05), jnp.arange(256))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.unique(out.astype(np.float32)), [0.0, jnp.bfloat16(1.5 / 0.95)])


def test_dropout_is_made_in_shares():
    drop, x = lowrank.Dropout(jax.random.key(1), 0.4), jnp.ones((7, 12))
    whole = lowrank.dropped(x, drop, jnp.arange(7))
    parts = [lowrank.dropped(x[3:, :4], drop, jnp.arange(3, 7), (i, 3)) for i in range(3)]
    np.testing.assert_array_equal(jnp.concatenate(parts, axis=1), whole[3:])
