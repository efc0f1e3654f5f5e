"""Bookkeeping of one layer's pass, given to a block as `adapt`: who routes where, what is shared, the sums that leave.

A router is asked once a scope: a site's own input (`share="site"`), the normed input of the attention or feed-forward
sub-block (`attn`, `ffn`; reused at o and down), what enters the block (`block`, of the placement of that name), or the
whole model (`model`; decided before the stack).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from molora_jax import engines, placements
from molora_jax.backbones.base import Backbone
from molora_jax.core import routing as routing_math
from molora_jax.core import rules as rules_lib
from molora_jax.core import turns
from molora_jax.core.quant import dense
from molora_jax.core.types import Array, Context
from molora_jax.placements import base_experts, ffn
from molora_jax.routers.asked import decide


class Layer:
    """One layer of one trace. `rules` are (rule, experts) that act here; trees are this layer's slices by rule name.

    `whole`: the adapters of all layers of the segment and this layer's place among them, None where an engine splits
    them. `settled` by rule and scope: gates of whole answers at this layer.
    """

    def __init__(
        self, config: Backbone, segment, active, losses, trees, carry, ctx: Context, given, collect, engine,
        whole=None, settled=None,
    ):  # fmt: skip
        self.config, self.segment, self.active, self.losses = config, segment, active, losses
        self.adapters, self.shared, self.state = trees
        routed = [(rule, experts) for rule, experts in active if rule.router is not None]
        self.adapters = self.adapters | {
            rule.name: turns.held(rule, experts, self.adapters[rule.name], self.state[rule.name])
            for rule, experts in routed
        }
        self.carry, self.ctx, self.given, self.collect = dict(carry), ctx, given, collect
        self.engine, self.whole, self.settled = engine, whole, settled or {}
        self.decisions, self.stats, self.routings = {}, {}, {}

    def _context(self, rule, name: str, base=None) -> Context:
        key = None
        if self.ctx.key is not None:
            key = jax.random.fold_in(jax.random.fold_in(self.ctx.key, rule.tag), rules_lib.site_tag(name))
            key = jax.random.fold_in(key, self.ctx.layer)
        site = rules_lib.site(self.config, name, self.segment, rule)
        stack = None if self.whole is None else (self.whole[0][rule.name].get(name, {}), self.whole[1])
        base = None if base is None else dense(base)  # of this layer, and only where the adapter reads it
        return self.ctx.replace(key=key, site=site, base=base, stack=stack, dropout=rule.adapter.dropout)

    def enter(self, scope: str, x: Array) -> None:
        """Routes every rule that shares a decision over this sub-block. `x [B, S, D]`, after the norm; of a `block`
        before it, and once more after it, for rules that read it there."""
        for rule, experts in self.active:
            if rule.router is not None and rule.share == scope.removesuffix("_normed"):
                if scope not in ("block", "block_normed") or scope in rule.placement.enters:
                    self._route(rule, experts, rule.share, x)

    def _route(self, rule, experts, scope, x, iteration=0):
        own = rule.leaves_of(scope)
        ctx = self._context(rule, scope).replace(
            state=self.state[rule.name].get("router", {}).get(own, {}), carry=self.carry.get(rule.name, ()),
            iteration=iteration, settled=self.settled.get(rule.name, {}).get(scope, self.ctx.settled),
        )  # fmt: skip
        with jax.named_scope("route"):
            if ctx.route == "task":
                decision, carry, sums = routing_math.by_task(ctx, ctx.site.experts), ctx.carry, {}
            elif ctx.settled is not None:
                decision, carry, sums = routing_math.settled(ctx, rule.router.k_max(ctx.site.experts)), ctx.carry, {}
            else:
                if ctx.route == "apart":
                    own_expert = routing_math.of_task(ctx, ctx.site.experts)
                    ctx = ctx.replace(allowed=own_expert & routing_math.permitted(ctx.allowed))
                x = ctx.base_features[rule.name] if rule.router.INPUT else x
                x = rule.router.input_of(x, self.adapters[rule.name].get(scope, {}), ctx)
                leaves = self.adapters[rule.name].get("router", {}).get(own, {})  # a router may have none of its own
                where, shared = f"method.rules.{rule.name}.router", self.shared.get(rule.name, {})
                decision, carry, sums = decide(rule.router, leaves, shared, x, ctx, where)
        if rule.name in self.carry:
            self.carry[rule.name] = carry
        self.record(rule, scope, decision, sums, ctx)
        return decision

    def record(self, rule, scope, decision, sums, ctx):
        self.decisions[rule.name, scope] = decision
        self.stats.setdefault(rule.name, {})[scope] = {
            "expert_load": routing_math.sums(decision),
            "losses": {name: loss.stats(decision, ctx) for name, loss in self.losses},
            "router": sums,
        }
        owner = self.stats[rule.name].get(rule.leaves_of(scope))
        if sums and rule.leaves_of(scope) != scope:  # a router that is asked again: its state sees all that it decided
            owner["router"] = jax.tree.map(jnp.add, owner["router"], sums)
        if self._counted(rule, decision.gates.shape[-1]):
            self.stats[rule.name][scope]["expert_load"] |= {"sent": jnp.float32(0), "dropped": jnp.float32(0)}
        if self.collect:
            self.routings.setdefault(rule.name, {})[scope] = decision.gates

    def _decision(self, rule, experts, site: str, x: Array):
        if rule.router is None:
            return None
        if rule.share == "model":
            return self.given[rule.name]
        scope = rule.share if rule.share in rules_lib.SCOPES else site
        found = self.decisions.get((rule.name, scope))
        return self._route(rule, experts, scope, x) if found is None else found

    def _counted(self, rule, experts) -> bool:
        """Whether an engine may drop slots of this rule."""
        on = self.engine
        return bool(on.capacity) and on.moves_tokens and on.split(experts, rule.router is not None)

    def _count(self, acting, site: str, counts) -> None:
        for (rule, experts), count in zip(acting, counts, strict=True):
            if count is not None and self._counted(rule, experts):
                scope = rule.share if rule.share in rules_lib.SCOPES else site
                sums, total = self.stats[rule.name][scope]["expert_load"], jax.lax.stop_gradient(count).sum(axis=0)
                sums["sent"], sums["dropped"] = sums["sent"] + total[0], sums["dropped"] + total[1]

    def project(self, site: str, W: Array, bias: Array | None, x: Array, rest: Array | None = None) -> Array:
        """A projection with every rule's change of it, plus `rest` (see `engines.project`).

        `x [B, S, D_in]` -> `[B, S, D_out]`.
        """
        flat = x.reshape(-1, x.shape[-1])
        each = [((rule, E), self._parts(rule, E, site, x, {site: W})) for rule, E in self._acting(site)]
        acting, parts = [pair for pair, own in each for _ in own], [part for _, own in each for part in own]
        with jax.named_scope(site):
            y, counts = engines.project(self.engine, site, W, bias, flat, parts, rest)
        self._count(acting, site, counts)
        return y.reshape(*x.shape[:-1], -1)

    def _acting(self, site: str):
        """The rules that a part of the block asks for."""
        return [(rule, experts) for rule, experts in self.active if site in placements.of(rule).acts(rule)]

    def _parts(self, rule, experts, site, x, kernels):
        """A rule's experts at a site whose frozen kernels are `kernels`; `x [B, S, D_in]`."""
        decision = self._decision(rule, experts, site, x)
        context = lambda name: self._context(rule, name, base=kernels.get(name))  # noqa: E731
        return placements.of(rule).parts(
            rule, site, self.adapters[rule.name], self.shared.get(rule.name, {}), decision, context,
            x.reshape(-1, x.shape[-1]),
        )  # fmt: skip

    def attention(self, h: Array, weights: dict, core) -> Array:
        """The attention sub-block `[B, S, D]` of its normed input: `weights` (kernel, bias) of q, k, v and o;
        `core(q, k, v [B, S, *]) -> [B, S, *]` all between the projections."""
        self.enter("block_normed", h)
        self.enter("attn", h)
        q, k, v = (self.project(site, *weights[site], h) for site in ("q", "k", "v"))
        return self.project("o", *weights["o"], core(q, k, v))

    def prompted(self, out: Array, q: Array, weights: dict, keys) -> Array:
        """Attention's output `[B, S, H * H_d]` with what prompts add to it (`Placement.prompted`)."""
        for rule, experts in self._acting("prompt"):
            with jax.named_scope("prompt"):
                decision = self._decision(rule, experts, "prompt", out)
                change = placements.of(rule).prompted(rule, self.adapters[rule.name], decision, q, weights, keys)
                out = out + change.astype(out.dtype)
        return out

    def feed_forward(self, x: Array, weights: dict, act: str) -> Array:
        """The feed-forward sub-block `[B, S, D]` of its normed input: `weights` (kernel, bias) of gate (where there is
        one), up and down; `down(act(gate x) * up x)`, or `down(act(up x))`."""
        self.enter("ffn", x)
        if "gate" in weights:
            g, u = (self.project(site, *weights[site], x) for site in ("gate", "up"))
            out = self._feed_forward(x, g, u, weights, act)
        else:
            out = self.project("down", *weights["down"], ffn.ACTIVATIONS[act](self.project("up", *weights["up"], x)))
        for rule, experts in self._acting("beside"):
            out = out + self._beside(rule, experts, x)
        return out

    def base_router(self, W: Array) -> Array:
        """The router `[D, E]` of a base that routes itself: frozen `W`, or the copy that a rule trains."""
        for rule, _ in self._acting("experts"):
            if rule.base_router == "trained":
                return self.adapters[rule.name]["router"]["base"]["W"].T
        return W

    def experts(self, x: Array, routing, kernels: dict, act: str) -> Array:
        """The feed-forward sub-block `[B, S, D]` of a base's own experts; `x [B, S, D]` normed, `routing` the base's
        decision, `kernels` frozen by site: a `tiles.InStack` of `[L, E, D_in, D_out]`."""
        self.enter("ffn", x)
        flat, E, change = x.reshape(-1, x.shape[-1]), kernels["gate"].shape[0], {}
        if not self.engine.alone:  # shards of a mesh are a layer's
            kernels = {site: of_all.stack[of_all.layer] for site, of_all in kernels.items()}
        for rule, _ in self._acting("experts"):  # one at most (`compile_model`)
            context = functools.partial(self._context, rule)
            change = dict(rule=rule, leaves=self.adapters[rule.name], shared=self.shared.get(rule.name, {}))
            change["context"] = context
            if rule.base_router == "trained":
                self.record(rule, "base", routing, {}, context("base"))
        part = base_experts.part(kernels, routing, act, E, **change)
        on = dataclasses.replace(self.engine, capacity=0.0, rank_space=False)  # a base drops no token
        with jax.named_scope("experts"):
            out, _ = engines.meet(on, base_experts.Experts(), {"x": flat}, [part])
        out = out.reshape(x.shape)
        for rule, experts in self._acting("beside"):
            out = out + self._beside(rule, experts, x)
        return out

    def _feed_forward(self, x, g, u, weights, act):
        W_down, b_down = weights["down"]
        acting = self._acting("ffn")
        if not acting:
            return self.project("down", W_down, b_down, ffn.ACTIVATIONS[act](g) * u)
        kernels = {s: weights[s][0] for s in ffn.SITES}
        flat = [a.reshape(-1, a.shape[-1]) for a in (x, g, u)]
        parts = [self._parts(rule, experts, "ffn", x, kernels)[0] for rule, experts in acting]
        with jax.named_scope("experts"):
            mix, rest, counts = engines.feed_forward(self.engine, *flat, kernels, parts, act)
        self._count(acting, "ffn", counts)
        return self.project("down", W_down, b_down, mix.reshape(g.shape), rest)

    def _beside(self, rule, experts, x):
        """What a rule adds to the block's output; each of its scopes' decisions is recorded as its own."""
        placement = placements.of(rule)

        def decide(t, z):
            if rule.router is None:
                return None
            scope = rule.scopes[t]
            taken = placement.decided_by(scope)
            first = self.decisions.get((rule.name, taken))
            if first is None:
                return self._route(rule, experts, scope, z, iteration=t)
            if taken != scope:  # its own was recorded when it was made
                self.record(rule, scope, first, {}, self._context(rule, scope))
            return first

        def meet(t, part, z):
            y, counts = engines.beside(self.engine, z, part)
            if rule.router is not None:
                self._count([(rule, experts)], rule.scopes[t], [counts])
            return y

        shared, ctx = self.shared.get(rule.name, {}), self._context(rule, "ffn")
        return placement.beside(rule, self.adapters[rule.name], shared, ctx, x, decide, meet)
