"""Measures `routed_ffn`, forward and backward, against every alternative and the roofline.

    python -m kernels_pallas.routed_ffn.bench [--shape=NAME --dtype=float32 --rounds=15 --tokens=T --rows=M] [--json]

`plain` is the FFN without experts, `act(g) * u`: what is above it is the price of routing. `naive` is K separate FFN
hidden states in `[T, K, F]` under autodiff, with each slot's factors gathered. With many columns E*R only the form that
the op chooses and `tiled` run: the others would compute every expert, or copy its factors.
"""

import functools

import jax
import jax.numpy as jnp

from kernels_pallas import timing
from kernels_pallas.routed_ffn import api, shapes, tiled

CPU = ["smollm2-135m, 8 experts", "smollm2-135m, 8 experts of 8", "smollm2-135m, 128 experts"]
DENSE_COLUMNS = 512  # beyond, the masked product only costs time


def plain(g, u, *_):
    return jax.nn.silu(g) * u


def naive(g, u, z_g, z_u, B_g, B_u, A_d, gates, base_gate, idx):
    spread = lambda z, B: jnp.einsum("tkr,tkrf->tkf", z, B[idx])  # noqa: E731
    h = jax.nn.silu(g[:, None] + spread(z_g, B_g)) * (u[:, None] + spread(z_u, B_u))
    mix = base_gate[:, None] * plain(g, u) + jnp.einsum("tk,tkf->tf", gates, h)
    return mix, jnp.einsum("tkf,tkrf->tkr", h, A_d[idx])


def form(name):
    def op(g, u, z_g, z_u, B_g, B_u, A_d, gates, base_gate, idx):
        return api.routed_ffn(g, u, z_g, z_u, B_g, B_u, A_d, idx, gates, base_gate, implementation=name)

    return op


def tiles_of(rows):
    def op(g, u, z_g, z_u, B_g, B_u, A_d, gates, base_gate, idx):
        return tiled.routed_ffn(g, u, z_g, z_u, B_g, B_u, A_d, idx, gates, base_gate, rows=rows)

    return op


def main():
    args = timing.begin(__doc__, shapes.SHAPES, CPU, timing.ROWS)
    dtype, rows = jnp.dtype(args.dtype), []
    chip = timing.roofline(dtype)
    for name, s in args.shapes.items():
        T, F, E, K, R = (s[key] for key in "TFEKR")
        make = functools.partial(timing.normal, dtype=dtype)
        idx, gates = timing.decision(T, E, K)
        factors = [timing.normal(E, R, F, scale=0.1) for _ in range(3)]
        inputs = (make(T, F), make(T, F), make(T, K, R), make(T, K, R), *factors, gates, 1 - gates.sum(1), idx)
        chosen = api.choose(inputs[0], factors[0], idx)
        forms = {"plain": plain, chosen[0]: form(chosen[0]), "tiled": form("tiled")}
        if E * R <= DENSE_COLUMNS:
            forms |= {other: form(other) for other in ("dense", "reference")} | {"naive": naive}
        forms |= {f"tiled {n}": tiles_of(n) for n in args.rows}
        functions = {f: timing.with_gradients(op, 2 if f == "plain" else 9) for f, op in forms.items()}
        times = timing.measure(functions, inputs, args.rounds)
        flops, size = 22 * T * K * R * F, dtype.itemsize  # 3 products forward, 8 backward
        moved = 8 * T * F * size + 2 * 3 * E * R * F * 4  # g, u in twice; mix, dmix, dg, du; factors, their gradients
        rows.append(timing.report(name, s, times, chosen, flops, moved, chip))
    timing.finish(rows, args, chip)


if __name__ == "__main__":
    main()
