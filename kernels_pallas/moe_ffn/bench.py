"""Measures `moe_ffn`, forward and backward, with a LoRA an expert over the frozen block alone, and the roofline.

    python -m kernels_pallas.moe_ffn.bench [--shape=NAME --dtype=float32 --rounds=15 --tokens=T --rows=M] [--json]

`frozen` is the base's own block: its kernels get no gradient, x and the gates do. `own` adds a pair A, B an expert on
gate, up and down, `one` a pair for all experts: with them all that a layer does, the products with A of gate and up and
with B of down included. What is above `frozen` is the price of adapting.
"""

import jax.numpy as jnp

from kernels_pallas import grouped_expand, grouped_shrink, timing
from kernels_pallas.moe_ffn import shapes, tiled

CPU = ["olmoe-1b-7b", "qwen1.5-moe-a2.7b"]


def frozen(rows=None):
    def op(x, gates, A_g, A_u, B_g, B_u, A_d, B_d, idx, *kernels):
        return tiled.moe_ffn(x, *kernels, None, idx, gates, rows=rows)[0]

    return op


def own(rows=None):
    def op(x, gates, A_g, A_u, B_g, B_u, A_d, B_d, idx, *kernels):
        z = [grouped_shrink(x, A, idx) for A in (A_g, A_u)]
        y, z_d = tiled.moe_ffn(x, *kernels, (*z, B_g, B_u, A_d), idx, gates, rows=rows)
        return y + grouped_expand(z_d, B_d, idx, gates, dtype=x.dtype)

    return op


def one(x, gates, A_g, A_u, B_g, B_u, A_d, B_d, idx, *kernels):
    spread = lambda z: jnp.broadcast_to(z[:, None], (*idx.shape, z.shape[1]))  # noqa: E731
    z = [spread(x @ A[0].T) for A in (A_g, A_u)]
    y, z_d = tiled.moe_ffn(x, *kernels, (*z, B_g[:1], B_u[:1], A_d[:1]), idx, gates)
    return y + jnp.einsum("tk,tkr->tr", gates, z_d) @ B_d[0]


def main():
    args = timing.begin(__doc__, shapes.SHAPES, CPU, timing.ROWS)
    dtype, rows = jnp.dtype(args.dtype), []
    chip = timing.roofline(dtype)
    for name, s in args.shapes.items():
        T, D, F, E, K, R = (s[key] for key in "TDFEKR")
        idx, gates = timing.decision(T, E, K)
        A_g, A_u, B_d = (timing.normal(E, R, D, scale=0.02, dtype=dtype) for _ in range(3))
        B_g, B_u, A_d = (timing.normal(E, R, F, scale=0.02, dtype=dtype) for _ in range(3))
        kernels = [timing.normal(E, *shape, scale=0.02, dtype=dtype) for shape in ((D, F), (D, F), (F, D))]
        inputs = (timing.normal(T, D, dtype=dtype), gates, A_g, A_u, B_g, B_u, A_d, B_d, idx, *kernels)
        forms = {"frozen": frozen(), "own": own(), "one": one}
        forms |= {f"frozen {n}": frozen(n) for n in args.rows} | {f"own {n}": own(n) for n in args.rows}
        wrt = {form: 2 if form.startswith("frozen") else 8 for form in forms}
        functions = {form: timing.with_gradients(op, wrt[form]) for form, op in forms.items()}
        times = timing.measure(functions, inputs, args.rounds)
        # forward 3 products a slot; backward gate and up again, then 3 for the input: the kernels have no gradient
        flops = 8 * 2 * T * K * D * F
        moved = 2 * 3 * E * D * F * dtype.itemsize  # every kernel once forward, once backward
        rows.append(timing.report(name, s, times, ("frozen", "the block that is adapted"), flops, moved, chip))
    timing.finish(rows, args, chip)


if __name__ == "__main__":
    main()
