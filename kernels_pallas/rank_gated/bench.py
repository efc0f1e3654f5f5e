"""Measures `rank_gated`, forward and backward, against every alternative and the roofline.

    python -m kernels_pallas.rank_gated.bench [--shape=NAME --dtype=float32 --rounds=15 --tokens=T] [--json]

`autodiff` is the same product without the custom derivative; `reference` the einsum of three arrays as it reads.
`grouped_lora` is not among them: these gates `[T, E]` leave no expert out. With K < E its own bench compares the two.
"""

import functools

import jax.numpy as jnp

from kernels_pallas import timing
from kernels_pallas.rank_gated import api, shapes

CPU = [name for name in shapes.SHAPES if "smollm2" in name]


def autodiff(x, A, B, gates):
    z = (x @ A.reshape(-1, A.shape[-1]).T.astype(x.dtype)).reshape(len(x), *A.shape[:2])
    u = (gates[..., None] * z).reshape(len(x), -1).astype(x.dtype)
    return u @ B.reshape(-1, B.shape[-1]).astype(x.dtype)


def main():
    args = timing.begin(__doc__, shapes.SHAPES, CPU)
    dtype, rows = jnp.dtype(args.dtype), []
    chip = timing.roofline(dtype)
    for name, s in args.shapes.items():
        T, D_in, D_out, E, R = (s[key] for key in ("T", "D_in", "D_out", "E", "R"))
        factor = functools.partial(timing.normal, scale=0.1)
        inputs = (timing.normal(T, D_in, dtype=dtype), factor(E, R, D_in), factor(E, R, D_out), timing.normal(T, E))
        chosen = api.choose(*inputs)
        names = {chosen[0], "dense", "reference"}
        forms = {f: functools.partial(api.rank_gated, implementation=f) for f in sorted(names)} | {"autodiff": autodiff}
        functions = {f: timing.with_gradients(op, 4) for f, op in forms.items()}
        times = timing.measure(functions, inputs, args.rounds)
        flops = 6 * T * E * R * (D_in + D_out)
        moved = (2 * T * D_in + 2 * T * D_out) * dtype.itemsize + 2 * E * R * (D_in + D_out) * 4
        rows.append(timing.report(name, s, times, chosen, flops, moved, chip))
    timing.finish(rows, args, chip)


if __name__ == "__main__":
    main()
