"""The routed FFN on TPU (Mosaic), in one pass over g and u: every h_k lives in VMEM only.

Token order, no sort: a slot's rank activations are placed in its expert's columns, `zz_k [rows, E*R]`, and meet all of
B_g, B_u in one product. The MXU contracts 128 or 256 deep whatever R is, so up to there this costs what rank R costs.

    dg_k = zz_k B_g,  h_k = act(g + dg_k) * (u + zz_k' B_u),  mix = c h_0 + sum_k w_k h_k,  z_d[k] = A_d h_k at e_k

The grid is (blocks of F, tiles of T): a block of the factors is fetched once, and the backward sums its gradient in
VMEM while rows stream past. What is summed over F (z_d, dz_g, dz_u, dgates, dbase_gate; rank-wide) leaves as one part a
block. A slot that is not used, a base_gate of 0, a row past the end: `where`, never a product by zero.

T tokens, F FFN width, E experts, K slots, R rank.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas.mosaic import F32, NN, NT, TN, dot, fit, params, row_mask
from kernels_pallas.routed_ffn.activations import core, pair
from kernels_pallas.zeros import gated, masked

ROWS, BLOCKS = (256, 128, 64, 32, 16, 8), (1024, 512, 256, 128)


def _bytes(rows, block, columns, KR, size, backward):
    wide = rows * block
    streams = 2 * wide * size * (6 if backward else 4) + 2 * rows * max(KR, 128) * 4 * (8 if backward else 4)
    factors = 2 * 3 * columns * block * (size + (4 if backward else 0))
    temporaries = wide * 4 * (16 if backward else 8) + rows * max(columns, 128) * 4 * 8
    if size == 4:  # float32 operands split into bfloat16 parts
        temporaries += 6 * (3 * columns * block + 4 * wide)
    return streams + factors + temporaries + 2 * max(KR, 8) * max(columns, 128) * 4


def tiles_that_fit(T, F, columns, KR, size, backward, device_kind=None) -> tuple[int, int]:
    """`(rows, block of F)`. Raises ValueError where none fits in VMEM."""
    blocks = [b for b in BLOCKS if b <= F] or [F]
    rows = [r for r in ROWS if r == ROWS[-1] or r < 2 * T]
    candidates = [(r, b) for r in rows for b in blocks]
    candidates.sort(key=lambda rb: (-rb[0] * rb[1], -rb[0]))
    need = functools.partial(_bytes, columns=columns, KR=KR, size=size, backward=backward)
    return fit("routed_ffn", candidates, lambda r, b: need(r, b), device_kind)


def _slot(k, real, idx, z, Q, expert_of, slot_of, E):
    """`hot [rows, E*R]`, `used [rows, 1]` and z's slot k spread to its expert's columns."""
    i = idx[:, k : k + 1]
    used = real & (i < E)
    hot = used & (expert_of == i)
    spread = lambda a: jnp.where(hot, dot(jnp.where(slot_of == k, a, 0), Q, NN), 0.0)  # noqa: E731
    return hot, used, [spread(a) for a in z]


def _collect(k, hot, wide, Q, slot_of):
    return jnp.where(slot_of == k, dot(jnp.where(hot, wide, 0.0), Q.astype(F32), NT), 0.0)


def _forward_kernel(T, K, E, activation, has_mask, *refs):
    g, u, z_g, z_u, idx, gates, base_gate, expert_of, slot_of, Q, B_g, B_u, A_d = (r[...] for r in refs[:13])
    mask = refs[13][...] if has_mask else None
    mix_ref, z_d_ref = refs[-2:]
    rows, dtype = g.shape[0], g.dtype
    real = row_mask(pl.program_id(1) * rows, rows, 0, T)
    g, u = g.astype(F32), u.astype(F32)
    mix = gated(base_gate, pair(activation, g, core(activation, g))[0] * u)
    z_d = jnp.zeros(z_g.shape, F32)
    for k in range(K):
        hot, used, (zg, zu) = _slot(k, real, idx, (z_g, z_u), Q, expert_of, slot_of, E)
        g_k = g + dot(zg.astype(dtype), B_g, NN)
        u_k = u + dot(zu.astype(dtype), B_u, NN)
        h = pair(activation, g_k, core(activation, g_k))[0] * u_k
        w = jnp.where(used, gates[:, k : k + 1], 0.0)
        mix = mix + gated(w, h)
        z_d = z_d + _collect(k, hot, dot(masked(h, mask).astype(dtype), A_d, NT), Q, slot_of)
    mix_ref[...] = mix.astype(dtype)
    z_d_ref[...] = z_d


def _backward_kernel(T, K, E, activation, has_mask, *refs):
    g, u, z_g, z_u, idx, gates, base_gate, expert_of, slot_of, Q, B_g, B_u, A_d = (r[...] for r in refs[:13])
    mask = refs[13][...] if has_mask else None
    dmix, dz_d = (r[...] for r in refs[13 + has_mask : 15 + has_mask])
    dg_ref, du_ref, dz_g_ref, dz_u_ref, dgates_ref, dbase_gate_ref, dB_g_ref, dB_u_ref, dA_ref = refs[15 + has_mask :]
    rows, dtype = g.shape[0], g.dtype
    real = row_mask(pl.program_id(1) * rows, rows, 0, T)
    g, u, dmix = g.astype(F32), u.astype(F32), dmix.astype(F32)
    a, da = pair(activation, g, core(activation, g))
    dbase_gate = jnp.sum(dmix * a * u, axis=1, keepdims=True)
    dbase_gate_ref[...] = jnp.where((base_gate != 0) | (jnp.abs(dbase_gate) < jnp.inf), dbase_gate, 0.0)
    dg, du = gated(base_gate, dmix * da * u), gated(base_gate, dmix * a)
    dz_g = dz_u = jnp.zeros(z_g.shape, F32)
    dgates = jnp.zeros(gates.shape, F32)
    slot = jax.lax.broadcasted_iota(jnp.int32, gates.shape, 1)

    @pl.when(pl.program_id(1) == 0)
    def _():
        for ref in (dB_g_ref, dB_u_ref, dA_ref):
            ref[...] = jnp.zeros_like(ref)

    for k in range(K):
        hot, used, (zg, zu, dz) = _slot(k, real, idx, (z_g, z_u, dz_d), Q, expert_of, slot_of, E)
        zg, zu, dz = zg.astype(dtype), zu.astype(dtype), dz.astype(dtype)
        g_k, u_k = g + dot(zg, B_g, NN), u + dot(zu, B_u, NN)
        a, da = pair(activation, g_k, core(activation, g_k))
        h = jnp.where(used, a * u_k, 0.0)
        w = jnp.where(used, gates[:, k : k + 1], 0.0)
        dw = jnp.sum(jnp.where(used, dmix, 0.0) * h, axis=1, keepdims=True)
        dgates = jnp.where(slot == k, dw, dgates)
        dh = gated(w, dmix) + masked(dot(dz, A_d, NN), mask)
        dg_k, du_k = jnp.where(used, dh * da * u_k, 0.0), jnp.where(used, dh * a, 0.0)
        dg, du = dg + dg_k, du + du_k
        dg_k, du_k = dg_k.astype(dtype), du_k.astype(dtype)
        dz_g = dz_g + _collect(k, hot, dot(dg_k, B_g, NT), Q, slot_of)
        dz_u = dz_u + _collect(k, hot, dot(du_k, B_u, NT), Q, slot_of)
        dB_g_ref[...] += dot(zg, dg_k, TN)
        dB_u_ref[...] += dot(zu, du_k, TN)
        seen = h if mask is None else jnp.where(used, masked(h, mask), 0.0)
        dA_ref[...] += dot(dz, seen.astype(dtype), TN)
    dg_ref[...], du_ref[...] = dg.astype(dtype), du.astype(dtype)
    dz_g_ref[...], dz_u_ref[...], dgates_ref[...] = dz_g, dz_u, dgates


def _flat(A, dtype):
    return A.reshape(-1, A.shape[-1]).astype(dtype)


def _call(kernel, tiles, activation, arrays, extra, out, flops, interpret, device_kind):
    """`out`: ("wide" | "rank" | "factor", shape, dtype) of every output."""
    g, u, z_g, z_u, B_g, B_u, A_d, idx, gates, base_gate, mask = arrays
    (T, F), (_, K, R), E, dtype = g.shape, z_g.shape, B_g.shape[0], g.dtype
    rows, block = tiles
    wide = pl.BlockSpec((rows, block), lambda f, t: (t, f))
    factor = pl.BlockSpec((E * R, block), lambda f, t: (0, f))
    narrow = lambda width: pl.BlockSpec((rows, width), lambda f, t: (t, 0))  # noqa: E731
    part = lambda width: pl.BlockSpec((None, rows, width), lambda f, t: (f, t, 0))  # noqa: E731
    whole = lambda a: pl.BlockSpec(a.shape, lambda f, t: (0, 0))  # noqa: E731
    columns, lanes = jnp.arange(E * R, dtype=jnp.int32), jnp.arange(K * R, dtype=jnp.int32)
    Q = (lanes[:, None] % R == columns[None, :] % R).astype(dtype)
    tables = [(columns // R)[None, :], (lanes // R)[None, :], Q]
    flat = lambda z: z.reshape(T, K * R).astype(dtype)  # noqa: E731
    inputs = [g, u, flat(z_g), flat(z_u), idx, gates.astype(F32), base_gate.astype(F32)[:, None], *tables]
    inputs += [_flat(B, dtype) for B in (B_g, B_u, A_d)]
    specs = [wide, wide, narrow(K * R), narrow(K * R), narrow(K), narrow(K), narrow(1), *map(whole, tables)]
    specs += [factor] * 3
    if mask is not None:
        inputs, specs = [*inputs, mask], [*specs, wide]
    if extra:
        inputs, specs = [*inputs, extra[0].astype(dtype), flat(extra[1])], [*specs, wide, narrow(K * R)]
    blocks = pl.cdiv(F, block)
    shapes, out_specs = [], []
    for kind, width in out:
        shape = {"wide": (T, F), "rank": (blocks, T, width), "factor": (E * R, F)}[kind]
        shapes.append(jax.ShapeDtypeStruct(shape, dtype if kind == "wide" else F32))
        out_specs.append(wide if kind == "wide" else factor if kind == "factor" else part(width))
    moved = sum(a.size * a.dtype.itemsize for a in (*inputs, *shapes))
    return pl.pallas_call(
        functools.partial(kernel, T, K, E, activation, mask is not None),
        grid=(blocks, pl.cdiv(T, rows)),
        in_specs=specs,
        out_specs=out_specs,
        out_shape=shapes,
        compiler_params=params(device_kind, "parallel", "arbitrary"),
        cost_estimate=pl.CostEstimate(
            flops=flops * T * F * K * E * R, bytes_accessed=moved, transcendentals=(K + 1) * T * F
        ),
        interpret=interpret,
    )(*inputs)


def _columns(F, block):
    """F padded to whole blocks: a partial block would bring columns that nobody wrote into sums over F."""
    return -(-F // block) * block - F


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _op(activation, interpret, device_kind, *arrays):
    return _forward(activation, interpret, device_kind, *arrays)[0]


def _padded(arrays, pad):
    if not pad:
        return arrays
    g, u, z_g, z_u, B_g, B_u, A_d, idx, gates, base_gate, mask = arrays
    wide = lambda a: None if a is None else jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, pad)])  # noqa: E731
    return wide(g), wide(u), z_g, z_u, wide(B_g), wide(B_u), wide(A_d), idx, gates, base_gate, wide(mask)


def _forward(activation, interpret, device_kind, *arrays):
    g, _, z_g, _, B_g = arrays[:5]
    (T, F), (_, K, R), E = g.shape, z_g.shape, B_g.shape[0]
    tiles = tiles_that_fit(T, F, E * R, K * R, g.dtype.itemsize, False, device_kind)
    padded = _padded(arrays, _columns(F, tiles[1]))
    out = [("wide", 0), ("rank", K * R)]
    mix, z_d = _call(_forward_kernel, tiles, activation, padded, (), out, 6, interpret, device_kind)
    z_d = jnp.sum(z_d, axis=0).reshape(T, K, R)
    return (mix[:, :F], z_d.astype(g.dtype)), arrays


def _backward(activation, interpret, device_kind, arrays, cotangents):
    g, u, z_g, z_u, B_g, B_u, A_d, idx, gates, base_gate, mask = arrays
    dmix, dz_d = cotangents
    (T, F), (_, K, R), E = g.shape, z_g.shape, B_g.shape[0]
    tiles = tiles_that_fit(T, F, E * R, K * R, g.dtype.itemsize, True, device_kind)
    pad = _columns(F, tiles[1])
    out = [("wide", 0)] * 2 + [("rank", K * R)] * 2 + [("rank", K), ("rank", 1)] + [("factor", 0)] * 3
    dg, du, dz_g, dz_u, dgates, dbase_gate, dB_g, dB_u, dA = _call(
        _backward_kernel, tiles, activation, _padded(arrays, pad), (jnp.pad(dmix, [(0, 0), (0, pad)]), dz_d), out, 16,
        interpret, device_kind,
    )  # fmt: skip
    total = lambda part, like: jnp.sum(part, axis=0).reshape(like.shape).astype(like.dtype)  # noqa: E731
    factor = lambda d, like: d[:, :F].reshape(like.shape).astype(like.dtype)  # noqa: E731
    dbase_gate = None if base_gate.dtype == bool else total(dbase_gate, base_gate)
    return (
        dg[:, :F], du[:, :F], total(dz_g, z_g), total(dz_u, z_u), factor(dB_g, B_g), factor(dB_u, B_u),
        factor(dA, A_d), None, total(dgates, gates), dbase_gate, None,
    )  # fmt: skip


_op.defvjp(_forward, _backward)


def routed_ffn(
    g, u, z_g, z_u, B_g, B_u, A_d, idx, gates, base_gate, *, activation="silu", mask=None, interpret=False,
    device_kind=None,
):  # fmt: skip
    """Shapes as in `api.routed_ffn`; `interpret` as in `pallas_call`; `device_kind` sizes the tiles."""
    A_d = jnp.broadcast_to(A_d, (B_g.shape[0], *A_d.shape[1:]))
    return _op(activation, interpret, device_kind, g, u, z_g, z_u, B_g, B_u, A_d, idx, gates, base_gate, mask)
