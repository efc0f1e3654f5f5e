"""Inputs and the float64 yardstick of the kernel tests.

T tokens, D width, F FFN width, E experts, K slots, R rank.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

INTERPRETERS = {"plain": True, "nan": pltpu.InterpretParams(uninitialized_memory="nan")}

# What bit before: an expert without tokens, all tokens on one, slots that are not used, no slot in use at all.
DECISIONS = ("random", "empty", "one", "padded", "unused")


def normal(rng, *shape, scale=1.0):
    return (rng.standard_normal(shape) * scale).astype(np.float32)


def decision(rng, T, E, K, kind):
    """`idx [T, K]` rising, padded with E; `gates [T, K]` of either sign, some exactly 0."""
    order = np.argsort(rng.random((T, E)), axis=1)
    if kind == "empty":  # nobody picks expert E // 2
        order = np.concatenate([np.delete(np.arange(E), E // 2), [E]])[np.argsort(rng.random((T, E)), axis=1)]
    if kind == "one":
        order = np.full((T, E), E)
        order[:, 0] = E - 1
    idx = np.sort(order[:, :K], axis=1).astype(np.int32)
    if kind == "padded":
        idx = np.sort(np.where(rng.random((T, K)) < 0.4, E, idx), axis=1).astype(np.int32)
    if kind == "unused":
        idx[:] = E
    gates = normal(rng, T, K)
    gates[rng.random((T, K)) < 0.1] = 0
    return idx, gates


def dense_gates(idx, gates, E):
    """`[T, E]` from slots."""
    return np.sum(np.where(idx[:, :, None] == np.arange(E), gates[:, :, None], 0), axis=1).astype(np.float32)


def float64(function, args, cotangents):
    """Value and gradients of `function(*args)` in float64, as numpy; integer arguments get no gradient."""
    with jax.enable_x64(True):
        up = [jnp.asarray(a, jnp.float64 if np.issubdtype(a.dtype, np.floating) else a.dtype) for a in args]
        down = jax.tree.map(lambda c: jnp.asarray(c, jnp.float64), cotangents)
        return [np.asarray(a) for a in compiled(function)(up, down)]


def both(function, args, cotangents):
    """The flat list of `function(*args)` and its gradients at the arguments that have one."""
    moving = [i for i, a in enumerate(args) if jnp.issubdtype(a.dtype, jnp.floating)]

    def of(*some):
        full = list(args)
        for i, a in zip(moving, some, strict=True):
            full[i] = a
        return function(*full)

    value, pull = jax.vjp(of, *(args[i] for i in moving))
    return [*jax.tree.leaves(value), *pull(cotangents)]


def compare(function, reference, args, cotangents, tolerance=2e-6, dtype=jnp.float32):
    """`function` in dtype against `reference` in float64: every output and gradient, by its largest entry.

    The reference sees the rounded inputs.
    """
    low = [a.astype(dtype) if i in WIDE(args) else jnp.asarray(a) for i, a in enumerate(map(jnp.asarray, args))]
    cotangents = jax.tree.map(lambda c: jnp.asarray(c, dtype), cotangents)
    got = compiled(function)(low, cotangents)
    rounded = [
        np.asarray(a.astype(jnp.float32)) if jnp.issubdtype(a.dtype, jnp.floating) else np.asarray(a) for a in low
    ]
    wanted = float64(reference, rounded, jax.tree.map(lambda c: np.asarray(c.astype(jnp.float32)), cotangents))
    assert len(got) == len(wanted)
    for i, (a, b) in enumerate(zip(got, wanted, strict=True)):
        a = np.asarray(a.astype(jnp.float32), np.float64)
        limit = tolerance * max(np.abs(b).max(initial=0.0), 1e-3)
        np.testing.assert_allclose(a, b, rtol=0, atol=limit, err_msg=f"output {i} of {function}")


@functools.cache
def compiled(function):
    """`(args, cotangents) -> both(function, args, cotangents)`, as one program."""
    return jax.jit(lambda args, cotangents: both(function, args, cotangents))


def WIDE(args):
    """Positions of the arguments whose dtype follows the model's: all floating ones but gates `[T, K]`, `[T]`."""
    return [i for i, a in enumerate(args) if np.issubdtype(a.dtype, np.floating) and a.ndim != 1]
