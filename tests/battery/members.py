"""Members that the naive form does not write out again: they are asked for their own part, on plain arrays.

A router says its decision, an adapter its factors, a loss its sums; `reference.py` does the rest the naive way.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from molora_jax.core import rules as rules_lib
from molora_jax.core.types import Context, Routing


class Routers:
    """Calls of a model's own routers, layer by layer, with their state and what each hands to the next."""

    def __init__(self, model, adapters, batch):
        self.model, self.adapters, self.state = model, adapters, model.init_router_state()
        zeros = np.zeros_like(batch["tokens"])
        names = ("segment_ids", "positions", "task_ids", "example_ids")
        ids = [jnp.asarray(batch.get(name, zeros)) for name in names]
        segments = model.max_segments or batch["tokens"].shape[1]
        self.plain = Context(
            ids[0] > 0, *ids, max_segments=segments, tasks=model.tasks, tokens=jnp.asarray(batch["tokens"]),
            tasked="task_ids" in batch,
        )  # fmt: skip
        self.carry = {r.name: r.router.init_carry(*zeros.shape) for r in model.rules if r.router is not None}

    def _segment(self, layer):
        return next(s for s in self.model.segments if layer in s.layers)

    def context(self, rule, name, layer, **more):
        site = rules_lib.site(self.model.config, name, self._segment(layer), rule)
        return self.plain.replace(layer=layer, site=site, **more)

    def leaves(self, rule, leaves, scope):
        """A layer's own router, or the model's."""
        if scope == "model":
            return jax.tree.map(
                lambda w: w[0], self.adapters[rule.name].get("shared", {}).get("router", {}).get(scope, {})
            )
        return leaves.get("router", {}).get(scope, {})

    def route(self, xp, rule, leaves, scope, x, layer):
        """`(probs, selected, gates, valid, logits, base_gate, sparsity, averaged, base_logit)`."""
        segment = self._segment(layer)
        where, at = ("shared", 0) if scope == "model" else (segment.name, layer - segment.start)
        state = self.state.get(rule.name, {}).get(where, {}).get("router", {}).get(scope, {})
        ctx = self.context(rule, scope, layer, state=jax.tree.map(lambda v: v[at], state), carry=self.carry[rule.name])
        own, shared = self.leaves(rule, leaves, scope), self.adapters[rule.name].get("shared", {})
        x = rule.router.input_of(jnp.asarray(x, jnp.float32), leaves.get(scope, {}), ctx)
        ask = routed if xp is np else routed.__wrapped__  # one program a router, or a part of the gradient's
        m, self.carry[rule.name] = ask(rule.router, own, shared, x, ctx)
        out = (m.probs, m.selected, m.gates, m.valid, m.logits, m.base_gate, m.sparsity, m.averaged, m.base_logit)
        return tuple(None if v is None else np.asarray(v) for v in out) if xp is np else out


@functools.partial(jax.jit, static_argnums=0)
def routed(router, *args):
    return router.route(*args)[:2]


@functools.partial(jax.jit, static_argnums=0)
def factors(adapter, *args):
    return adapter.factors(*args)


def expert_weights(xp, adapter, leaves, W, shared, ctx):
    """`[E, D_in, D_out]` of any `Factors`: `inp (W) out + s A mid B`."""
    cast = lambda tree: jax.tree.map(  # noqa: E731  (index tables stay integers)
        lambda v: jnp.asarray(v, jnp.int32 if jnp.issubdtype(v.dtype, jnp.integer) else jnp.float32), tree
    )
    # `train`: where a gradient is not that of the value (ALLoRA), it is the one that is asked for
    ctx = ctx.replace(base=jnp.asarray(W, jnp.float32), train=True, step_key=jax.random.key(0))
    f = (factors if xp is np else factors.__wrapped__)(adapter, cast(leaves), cast(shared), ctx)
    f = f if xp is jnp else jax.tree.map(lambda v: np.asarray(v, np.float64), f)
    E = len(f.B)
    A = xp.broadcast_to(f.A, (E, *f.A.shape[1:]))
    if f.mid is not None:
        A = xp.einsum("eqr,erd->eqd", f.mid, A)
    W_e = xp.broadcast_to(W, (E, *W.shape))
    W_e = W_e if f.inp is None else W_e * f.inp[:, :, None]
    W_e = W_e if f.out is None else W_e * f.out[:, None, :]
    return W_e + adapter.scale() * xp.einsum("erd,ero->edo", A, f.B)


def loss(model, member, decisions, batch):
    """A loss on routing by its own sums, each layer as a segment of one."""
    routers, stats = Routers(model, {}, batch), {}
    for (layer, rule, scope), d in decisions.items():
        row = next(r for r in model.rules if r.name == rule)
        made = Routing(*(jnp.asarray(v) for v in (d.gates, d.selected, d.logits, d.probs, d.valid)), k_max=1)
        made = made.replace(sparsity=d.sparsity, base_logit=d.base_logit)
        sums = member.stats(made, routers.context(row, scope, layer))
        segment = "model" if scope == "model" else f"{layer:03d}-{layer:03d}"
        stats.setdefault(rule, {}).setdefault(segment, {})[scope] = jax.tree.map(lambda v: v[None], sums)
    return member.value(stats)
