"""DeepSeekMoE on a linear problem: a common map and 3 of 24 tagged skills, by low-rank experts of equal active rank.

    y = C x + sum_{s in S} V_s x,   x ~ N(0, I),   the tag sum_{s in S} 4 t_s, t_s orthonormal;   C of rank 8, V_s of 2

Experts read x, the router the tag (experts' sizes are the question, not whether it can tell skills apart). The router
is the library's (`biased_topk`: softmax over all, top K, no renormalisation). Mean squared error an output.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from molora_jax.core.types import Context, Site
from molora_jax.routers import BiasedTopK

D, SKILLS, ACTIVE, STEPS, BATCH = 24, 24, 3, 3000, 256
ROWS = {  # shared rank, experts, rank of each, K
    "top 2 of 8, rank 8": (0, 8, 8, 2),
    "top 8 of 32, rank 2": (0, 32, 2, 8),
    "1 shared of rank 8, top 1 of 7, rank 8": (8, 7, 8, 1),
    "1 shared of rank 8, top 4 of 28, rank 2": (8, 28, 2, 4),
}


def problem(seed=0):
    rng = np.random.default_rng(seed)
    low = lambda r: rng.standard_normal((D, r)) @ rng.standard_normal((r, D)) / np.sqrt(D * r)  # noqa: E731
    tags = np.linalg.qr(rng.standard_normal((D, D)))[0]
    return tuple(jnp.asarray(v, jnp.float32) for v in (low(8), np.stack([low(2) for _ in range(SKILLS)]), tags))


def batch(key, given):
    C, V, tags = given
    pick, noise = jax.random.split(key)
    ranked = jax.lax.top_k(jax.random.uniform(pick, (BATCH, SKILLS)), ACTIVE)[1]
    on = jax.nn.one_hot(ranked, SKILLS).sum(axis=1)
    x = jax.random.normal(noise, (BATCH, D))
    return x, 4 * on @ tags, x @ C + jnp.einsum("bd,sdo,bs->bo", x, V, on)


def answer(p, x, tag, router, *, shared=True):
    ones = jnp.ones((1, len(x)), jnp.int32)
    ctx = Context(ones > 0, *[ones] * 4, state={"b": jnp.zeros(len(p["B"]))}, site=Site("q", D, D, (0,), len(p["B"])))
    gates = router.route({"W": p["W"]}, {}, tag[None], ctx)[0].gates[0]
    y = jnp.einsum("be,bd,erd,ero->bo", gates, x, p["A"], p["B"])
    return y + (x @ p["SA"].T @ p["SB"] if shared else 0.0)


def run(workdir, steps, found, keep):
    given = problem()
    for name, (shared, E, rank, k) in ROWS.items():
        name = f"deepseek_moe: {name}"
        if name in found:
            continue
        router, keys = BiasedTopK(k=k), jax.random.split(jax.random.key(1), 3)
        p = {
            "A": jax.random.normal(keys[0], (E, rank, D)) * D**-0.5, "B": jnp.zeros((E, rank, D)),
            "W": jax.random.normal(keys[1], (E, D)) * D**-0.5,
            "SA": jax.random.normal(keys[2], (shared, D)) * D**-0.5, "SB": jnp.zeros((shared, D)),
        }  # fmt: skip
        optimizer = optax.adam(optax.cosine_decay_schedule(5e-3, STEPS))

        def error(p, key, router=router, **options):
            x, tag, y = batch(key, given)
            return jnp.mean((answer(p, x, tag, router, **options) - y) ** 2)

        def step(carry, i, error=error, optimizer=optimizer):
            p, state = carry
            value, g = jax.value_and_grad(error)(p, jax.random.fold_in(jax.random.key(2), i))
            updates, state = optimizer.update(g, state)
            return (optax.apply_updates(p, updates), state), value

        (p, _), _ = jax.jit(lambda p: jax.lax.scan(step, (p, optimizer.init(p)), jnp.arange(STEPS)))(p)  # noqa: B023
        held = [jax.random.key(100 + i) for i in range(16)]
        result = {"MSE": float(np.mean([error(p, key) for key in held]))}
        if shared:
            more = BiasedTopK(k=k + 1)
            result["MSE without the shared, one more routed"] = float(
                np.mean([error(p, key, more, shared=False) for key in held])
            )
        keep(name, result | {"MSE of zero": float(np.mean([jnp.mean(batch(key, given)[2] ** 2) for key in held]))})
