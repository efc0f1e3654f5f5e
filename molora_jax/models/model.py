"""The model as one static value: a decoder's shape, the compiled rules, the routing losses. Arrays come from outside.

    params (frozen base)  adapters (factors and routers)  router_state (mutable, no gradient)  ->  hidden, sums

Trees are plain nested dicts: `adapters/<rule>/<segment>/<site>/<leaf> [L_segment, E, ...]`,
`adapters/<rule>/<segment>/router/<scope>/<leaf>`, `adapters/<rule>/shared/...` (there `router/model/<leaf> [1, ...]`,
where one router serves all layers); `router_state` mirrors it.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from molora_jax import rules as rules_lib
from molora_jax.core.types import Array, Context, Site
from molora_jax.engines import ALONE, Engine
from molora_jax.models import stack
from molora_jax.models.decoder import rms_norm
from molora_jax.models.families import DecoderConfig
from molora_jax.models.layer import Layer

identity = lambda x: x  # noqa: E731  (no mesh: nothing to constrain)


@dataclasses.dataclass(frozen=True)
class Model:
    config: DecoderConfig
    rules: tuple[rules_lib.Rule, ...] = ()
    losses: tuple[tuple[str, Any], ...] = ()
    remat: str = "dots"
    max_segments: int = 0
    engine: Engine = ALONE

    @functools.cached_property
    def segments(self) -> tuple[rules_lib.Segment, ...]:
        return rules_lib.segments(self.rules, self.config.layers)

    def without_rules(self) -> "Model":
        """The frozen base alone."""
        return dataclasses.replace(self, rules=(), losses=())

    # ---- trees -----------------------------------------------------------------------------------------------------

    def init_adapters(self, key: Array, params: dict, base_grad: dict | None = None) -> dict:
        """Fresh leaves, float32. `params["blocks"]` is read by inits that start from the base; traceable."""
        tree: dict = {}
        for r, rule in enumerate(self.rules):
            out = {}
            rule_key = jax.random.fold_in(key, rule.tag)
            sites = []
            for segment in self.segments:
                E = segment.counts[r]
                if not E:
                    continue
                leaves = {}
                for name in rule.projections:
                    site = rules_lib.site(self.config, name, segment, E)
                    sites.append(site)
                    leaves[name] = self._init_layers(rule.adapter, rule_key, site, params, base_grad)
                for site in self._routers(r, segment):
                    made = self._init_layers(rule.router, rule_key, site, None, None)
                    leaves.setdefault("router", {})[site.name] = made
                out[segment.name] = _without_empty(leaves)
            shared = {}
            if rule.adapter is not None:
                shared |= rule.adapter.init_shared(jax.random.fold_in(rule_key, 1000), tuple(sites))
            if rule.router is not None:
                shared |= rule.router.init_shared(jax.random.fold_in(rule_key, 1001), tuple(sites))
            for site in self._model_router(r):
                shared["router"] = {site.name: self._init_layers(rule.router, rule_key, site, None, None)}
            if shared:
                out["shared"] = shared
            tree[rule.name] = _without_empty(out)
        return tree

    def _routers(self, r: int, segment) -> tuple[Site, ...]:
        """The routers of rule `r` that a segment owns, one a layer and scope."""
        rule, E = self.rules[r], segment.counts[r]
        names = [scope for scope in rule.scopes if scope != "model"] if E else ()
        return tuple(rules_lib.site(self.config, name, segment, E) for name in names)

    def _model_router(self, r: int) -> tuple[Site, ...]:
        """The one router of a rule with `share="model"`: kept with what layers share, its layer axis of length 1."""
        if "model" not in self.rules[r].scopes:
            return ()
        first = next(segment for segment in self.segments if segment.counts[r])
        site = rules_lib.site(self.config, "model", first, first.counts[r])
        return (dataclasses.replace(site, layers=site.layers[:1]),)

    def _init_layers(self, member, key, site, params, base_grad):
        """One layer at a time, with a key of the absolute layer: regrouping layers changes nothing."""
        key = jax.random.fold_in(key, rules_lib.site_tag(site.name) + (100 if params is None else 0))

        def one(layer, site=site):
            layer_key = jax.random.fold_in(key, layer)
            if params is None:
                return member.init_leaves(layer_key, site, layer)
            pick = lambda w: jax.lax.dynamic_index_in_dim(w, layer, 0, False)  # noqa: E731
            base = pick(params["blocks"][site.name]["kernel"])
            grad = None if base_grad is None else pick(base_grad[site.name])
            return member.init_leaves(layer_key, site, layer, base=base, base_grad=grad)

        return jax.lax.map(one, jnp.array(site.layers))

    def init_router_state(self) -> dict:
        tree: dict = {}
        for r, rule in enumerate(self.rules):
            owned = [(segment.name, site) for segment in self.segments for site in self._routers(r, segment)]
            for where, site in owned + [("shared", site) for site in self._model_router(r)]:
                state = rule.router.init_state(site)
                if state:
                    state = jax.tree.map(_stacked(len(site.layers)), state)
                    tree.setdefault(rule.name, {}).setdefault(where, {}).setdefault("router", {})[site.name] = state
        return tree

    def frozen_patterns(self) -> tuple[str, ...]:
        """Paths `rule/.../leaf` that never train, from the members' FROZEN."""
        out = []
        for rule in self.rules:
            names = rule.adapter.FROZEN + (rule.router.FROZEN if rule.router is not None else ())
            out += [f"{rule.name}/*/{name}" for name in names]
        return tuple(out)

    # ---- passes ----------------------------------------------------------------------------------------------------

    def hidden(
        self,
        params: dict,
        adapters: dict,
        state: dict,
        batch: dict,
        *,
        train: bool = False,
        key: Array | None = None,
        step_key: Array | None = None,
        step: Array | int = 0,
        mask: Array | None = None,
        cache=None,
        collect: bool = False,
        constrain=identity,
    ):
        """Final hidden states, after the last norm.

        Args:
          batch: `tokens`, `segment_ids` (0 = padding), `positions`, and for routing analysis `task_ids`, `example_ids`,
            all `[B, S]` int32; optional `allowed [E] | [B, E]`.
          train: dropout and noise on (needs `key`), layers inside `jax.checkpoint`.
          mask: `[B, 1, S, S_k]` attention mask; by default causal and block-diagonal over `segment_ids`.
          cache: see `stack.run`.
          collect: also return the gates.

        Returns:
          `(hidden [B, S, D], sums {rule: {segment: {scope: ...}}}, cache, gates likewise [L_segment, B, S, E])`.
        """
        tokens, segment_ids = batch["tokens"], batch["segment_ids"]
        zeros = jnp.zeros_like(tokens)
        with jax.named_scope("embed"):
            x = constrain(params["embed"][tokens])
        ctx = Context(
            valid=segment_ids > 0,
            segment_ids=segment_ids,
            positions=batch["positions"],
            task_ids=batch.get("task_ids", zeros),
            example_ids=batch.get("example_ids", zeros),
            step=step,
            key=key if train else None,
            step_key=step_key if train else None,
            allowed=batch.get("allowed"),
            train=train,
            max_segments=self.max_segments or tokens.shape[1],
        )
        carry = {
            rule.name: rule.router.init_carry(*tokens.shape)
            for rule in self.rules
            if rule.router is not None and jax.tree.leaves(rule.router.init_carry(*tokens.shape))
        }
        given, stats, gates = self._route_model(adapters, state, x, ctx, collect)
        mask = stack.attention_mask(segment_ids) if mask is None else mask
        x, cache, inner, inner_gates = stack.run(
            self, params["blocks"], adapters, state, x, ctx,
            mask=mask, carry=carry, given=given, cache=cache, collect=collect, constrain=constrain,
        )  # fmt: skip
        for name in inner:
            stats.setdefault(name, {}).update({k: v for k, v in inner[name].items() if v})
            gates.setdefault(name, {}).update({k: v for k, v in inner_gates[name].items() if v})
        return rms_norm(x, params["final_norm"], self.config.norm_eps), stats, cache, gates

    def _route_model(self, adapters, state, x, ctx, collect):
        """Rules with `share="model"`: one decision for all layers, on the embeddings. Sums lead with one "layer"."""
        given, stats, gates = {}, {}, {}
        first = self.segments[0]
        for rule in self.rules:
            if rule.router is None or rule.share != "model":
                continue
            E, pick = max(rule.experts), lambda w: w[0]
            shared = adapters[rule.name].get("shared", {})
            own = {"router": jax.tree.map(pick, shared.get("router", {}))}
            own_state = jax.tree.map(pick, state.get(rule.name, {}).get("shared", {}))
            trees = ({rule.name: own}, {rule.name: shared}, {rule.name: own_state})
            carry = {rule.name: rule.router.init_carry(*x.shape[:2])}
            layer = Layer(
                self.config, first, [(rule, E)], self.losses, trees, carry, ctx.replace(layer=0), {}, collect,
                self.engine,
            )  # fmt: skip
            layer.enter("model", x)
            given[rule.name] = layer.decisions[rule.name, "model"]
            lead = lambda tree: jax.tree.map(lambda v: v[None], tree)  # noqa: E731
            stats[rule.name] = {"model": lead(layer.stats[rule.name])}
            if collect:
                gates[rule.name] = {"model": lead(layer.routings[rule.name])}
        return given, stats, gates

    def logits(self, params: dict, hidden: Array) -> Array:
        """`hidden [..., D]` -> `[..., V]` float32."""
        head = params["head"] if "head" in params else params["embed"].T
        return jnp.dot(hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)


def _without_empty(tree: dict) -> dict:
    """Members may have no leaves of their own; splitting a tree into its trainable part would lose empty dicts."""
    below = {k: _without_empty(v) if isinstance(v, dict) else v for k, v in tree.items()}
    return {k: v for k, v in below.items() if not isinstance(v, dict) or v}


def _stacked(layers: int):
    return lambda x: jnp.broadcast_to(x, (layers, *x.shape)) + 0
