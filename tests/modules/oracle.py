"""What the modules must equal, written out: float64 numpy for values, einsums of all experts for gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

SCALE = 8.0 / 2  # alpha / R of `members`
E, K, R, D, F = 4, 2, 2, 8, 12


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def random_leaves(tree, seed=3, size=0.3):
    """The same tree with values that are nowhere zero (integers as they are)."""
    leaves, structure = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    draw = lambda x: x + (size * rng.standard_normal(x.shape)).astype(np.float32)  # noqa: E731
    leaves = [draw(np.asarray(x)) if jnp.issubdtype(x.dtype, jnp.floating) else x for x in leaves]
    return jax.tree.unflatten(structure, leaves)


def gates64(x, W, k=K):
    """Softmax over the k largest, a loop over tokens: `x [T, D]` -> `(gates, probs) [T, E]`."""
    z = np.asarray(x, np.float64) @ np.asarray(W, np.float64).T
    p = np.exp(z - z.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    gates = np.zeros_like(p)
    for t in range(len(p)):
        best = np.argsort(-p[t], kind="stable")[:k]
        gates[t, best] = p[t, best] / p[t, best].sum()
    return gates, p


def mixture64(x, W, bias, leaves, valid=None, k=K):
    """`x [..., D]`: W x + b + s sum_e g_e B_e A_e x, in float64."""
    flat = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
    gates, _ = gates64(flat, leaves["router"]["W"], k)
    if valid is not None:
        gates = gates * np.asarray(valid).reshape(-1, 1)
    A, B = (np.asarray(leaves[name], np.float64) for name in "AB")
    y = flat @ np.asarray(W, np.float64) + (0 if bias is None else np.asarray(bias, np.float64))
    for e in range(len(A)):
        y += SCALE * gates[:, e : e + 1] * (flat @ A[e].T @ B[e])
    return y.reshape(*x.shape[:-1], -1)


def mixture(x, W, bias, leaves, k=K):
    """The same, differentiable."""
    z = jnp.einsum("...d,ed->...e", x, leaves["router"]["W"], precision="highest")
    p = jax.nn.softmax(z)
    _, best = jax.lax.top_k(p, k)
    kept = p * jax.nn.one_hot(best, p.shape[-1]).sum(-2)
    gates = kept / kept.sum(-1, keepdims=True)
    change = jnp.einsum("...e,...d,erd,ero->...o", gates, x, leaves["A"], leaves["B"], precision="highest")
    return jnp.einsum("...d,do->...o", x, W, precision="highest") + (0 if bias is None else bias) + SCALE * change


def call(module, variables, *args, train=None, mutable=False, method=None, **arrays):
    """`module.apply`, compiled: op by op each of dozens of operations is compiled for itself."""
    return _once(_applied, module, train, tuple(mutable or ()), method)(variables, args, arrays)


def init(module, *args, **arrays):
    """`module.init` with the key 0, compiled once for equal modules."""
    return _once(_inited, module)(jax.random.key(0), *args, **arrays)


def _once(make, module, *options):
    try:
        hash(module)
    except TypeError:  # it holds a list or a dict
        return make.__wrapped__(module, *options)
    return make(module, *options)


@functools.cache
def _applied(module, train, mutable, method):
    static = {} if train is None else {"train": train}

    @jax.jit
    def run(variables, args, arrays):
        return module.apply(variables, *args, **arrays, **static, mutable=list(mutable) or False, method=method)

    return run


@functools.cache
def _inited(module):
    return jax.jit(module.init)
