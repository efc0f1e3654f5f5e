"""Measures `grouped_lora`, forward and backward, against every alternative and the roofline.

    python -m kernels_pallas.grouped_lora.bench [--shape=NAME --dtype=float32 --rounds=15 --tokens=T --rows=M] [--json]

`grouped_lora` is the form that the op chooses here; beside a kernel `tiled` runs too. `rank_gated` computes all experts
with the same gates. Where they are small, `reference` multiplies by one-hot slots and `gathered` takes each slot's
factors, `A[idx] [T, K, R, D]`, under autodiff. The named crossover shapes (`E4` ... `E32`) are the table from which
`select` takes its CPU threshold.
"""

import functools

import jax.numpy as jnp

from kernels_pallas import select, timing
from kernels_pallas.grouped_lora import api, shapes, tiled
from kernels_pallas.rank_gated.api import rank_gated

CROSSOVER = {
    f"D576 E{E} K{K} R{R}": dict(T=512, D_in=576, D_out=576, E=E, K=K, R=R)
    for K, R in ((1, 16), (2, 16), (2, 8), (4, 8))
    for E in (4, 8, 16, 32)
    if E > K
}
SHAPES = shapes.SHAPES | CROSSOVER
CPU = [name for name in SHAPES if "smollm2" in name and "128" not in name] + list(CROSSOVER)
GATHERED_BYTES = 1 << 30


def all_experts(x, A, B, gates, idx):
    hot = idx[:, :, None] == jnp.arange(B.shape[0])
    return rank_gated(x, A, B, jnp.sum(jnp.where(hot, gates[:, :, None], 0.0), axis=1))


def gathered(x, A, B, gates, idx):
    z = jnp.einsum("td,tkrd->tkr", x, A[idx])
    return jnp.einsum("tk,tkr,tkro->to", gates, z, B[idx])


def form(name):
    def op(x, A, B, gates, idx):
        return api.grouped_lora(x, A, B, idx, gates, implementation=name)

    return op


def tiles_of(rows):
    return lambda x, A, B, gates, idx: tiled.grouped_lora(x, A, B, idx, gates, rows=rows)


def main():
    args = timing.begin(__doc__, SHAPES, CPU, timing.ROWS)
    dtype, rows = jnp.dtype(args.dtype), []
    chip = timing.roofline(dtype)
    for name, s in args.shapes.items():
        T, D_in, D_out, E, K, R = (s[key] for key in ("T", "D_in", "D_out", "E", "K", "R"))
        idx, gates = timing.decision(T, E, K)
        factor = functools.partial(timing.normal, scale=0.1)
        inputs = (timing.normal(T, D_in, dtype=dtype), factor(E, R, D_in), factor(E, R, D_out), gates, idx)
        own = api.choose(inputs[0], inputs[1], inputs[2], idx)[0]
        forms = {"rank_gated": all_experts, "grouped_lora": form(own)}
        if own != "tiled":
            forms["tiled"] = form("tiled")
        if T * K * R * (D_in + D_out) * 4 < GATHERED_BYTES and name in shapes.SHAPES:
            forms |= {"gathered": gathered, "reference": form("reference")}
        forms |= {f"tiled {n}": tiles_of(n) for n in args.rows}
        functions = {f: timing.with_gradients(op, 4) for f, op in forms.items()}
        times = timing.measure(functions, inputs, args.rounds)
        flops = 6 * T * K * R * (D_in + D_out)
        moved = (2 * T * D_in + 2 * T * D_out) * dtype.itemsize + 2 * E * R * (D_in + D_out) * 4
        chosen = select.low_rank_op(E, R, K)
        rows.append(timing.report(name, s, times, chosen, flops, moved, chip))
    timing.finish(rows, args, chip)


if __name__ == "__main__":
    main()
