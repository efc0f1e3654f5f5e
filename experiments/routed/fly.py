"""FlyLoRA on a linear problem: two tasks learnt apart, then the mean of both runs' leaves.

    y = T_t x,   T_t of rank 4,   x = m + n,  n ~ N(0, I),  |m| = 8: inputs have a strong mean;   D = 64, 32 outputs

One layer, B (of plain LoRA also A) by Adam; router and matrix are the library's (`sparse_projection`). R = 32, K = 8.
Gini: of how often each rank is chosen, 0 is alike.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from molora_jax.core import sparse_projection
from molora_jax.core.types import Context, Site
from molora_jax.routers import SparseProjection

D, OUT, R, K, STEPS, BATCH, RATE = 64, 32, 32, 8, 1000, 256, 2e-2
SITE = Site("q", D, OUT, (0,), R)
ROWS = {  # rank of A, whether A trains, the router
    "LoRA, R = 8": (8, True, None),
    "frozen A, R = 32": (R, False, None),
    "abs, u = 1e-3": (R, False, SparseProjection(k=K, select="abs", bias_rate=1e-3)),
    "abs, u = 0": (R, False, SparseProjection(k=K, select="abs", bias_rate=0.0)),
    "signed, u = 1e-3": (R, False, SparseProjection(k=K, select="signed", bias_rate=1e-3)),
    "signed, u = 0": (R, False, SparseProjection(k=K, select="signed", bias_rate=0.0)),
}


def problem(seed=0):
    """`(T [2, D, OUT], m [D])`."""
    rng = np.random.default_rng(seed)
    low = rng.standard_normal((2, D, 4)) @ rng.standard_normal((2, 4, OUT)) / np.sqrt(4 * D)
    m = rng.standard_normal(D)
    return jnp.asarray(low, jnp.float32), jnp.asarray(8 * m / np.linalg.norm(m), jnp.float32)


def answer(p, x, router, d):
    """`(y, the router's sums)`."""
    h = x @ p["A"].T
    if router is None:
        return h @ p["B"], {}
    ones = jnp.ones((1, len(x)), jnp.int32)
    ctx = Context(ones > 0, *[ones] * 4, state={"d": d}, site=SITE)
    decision, _, sums = router.route({"W": p["A"]}, {}, x[None], ctx)
    return (decision.gates[0] * h) @ p["B"], sums


def gini(count) -> float:
    ranked, n = np.sort(np.asarray(count, np.float64)), len(count)
    return float((ranked * (2 * np.arange(1, n + 1) - n - 1)).sum() / (n * ranked.sum()))


def learnt(p, router, trains, T, m):
    """A task's leaves, its load bias, and how often each rank was chosen in the first and last step."""
    optimizer, A = optax.adam(RATE), p["A"]
    free = p if trains else {"B": p["B"]}

    def error(free, d, key):
        x = m + jax.random.normal(key, (BATCH, D))
        y, sums = answer({"A": A} | free, x, router, d)
        return jnp.mean((y - x @ T) ** 2), sums

    def step(carry, i):
        free, state, d = carry
        (_, sums), g = jax.value_and_grad(error, has_aux=True)(free, d, jax.random.fold_in(jax.random.key(2), i))
        updates, state = optimizer.update(g, state)
        d = d if router is None else router.update({"d": d}, sums)["d"]
        return (optax.apply_updates(free, updates), state, d), sums.get("count", jnp.zeros(R))

    start = (free, optimizer.init(free), jnp.zeros(R))
    (free, _, d), counts = jax.jit(lambda start: jax.lax.scan(step, start, jnp.arange(STEPS)))(start)
    return {"A": A} | free, d, np.asarray(counts[0]), np.asarray(counts[-1])


def run(workdir, steps, found, keep):
    T, m = problem()
    x = m + jax.random.normal(jax.random.key(9), (4096, D))
    for name, (rank, trains, router) in ROWS.items():
        name = f"flylora: {name}"
        if name in found:
            continue
        A = sparse_projection.rows(0, SITE, 0, R, K / R) * R / np.sqrt(D * K / R)  # rows of length 1
        A = jax.random.normal(jax.random.key(1), (rank, D)) * D**-0.5 if router is None else A
        p = {"A": A, "B": jnp.zeros((rank, OUT))}
        each = [learnt(p, router, trains, T[t], m) for t in range(2)]
        error = lambda p, d, t, router=router: float(jnp.mean((answer(p, x, router, d)[0] - x @ T[t]) ** 2))  # noqa: E731
        mean = jax.tree.map(lambda a, b: (a + b) / 2, *((p, d) for p, d, *_ in each))
        zero = {f"task {t}": float(jnp.mean((x @ T[t]) ** 2)) for t in range(2)}
        share = lambda of, zero=zero: {task: round(value / zero[task], 5) for task, value in of.items()}  # noqa: E731
        result = {
            "error of its own": share({f"task {t}": error(*each[t][:2], t) for t in range(2)}),
            "error of the mean": share({f"task {t}": error(*mean, t) for t in range(2)}),
        }
        if router is not None:
            result |= {"Gini at first": gini(each[0][2]), "Gini at last": gini(each[0][3])}
        keep(name, result)
