"""The model as one static value: a backbone, the compiled rules, the routing losses. Arrays come from outside.

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

from molora_jax.backbones import leaves, stack
from molora_jax.backbones.base import Backbone, needs_head
from molora_jax.backbones.layer import Layer
from molora_jax.backbones.tap import Tap
from molora_jax.core import rules as rules_lib
from molora_jax.core.types import Array, Context
from molora_jax.engines import ALONE, Engine
from molora_jax.errors import InputError

identity = lambda x: x  # noqa: E731  (no mesh: nothing to constrain)


@dataclasses.dataclass(frozen=True)
class Model:
    config: Backbone
    rules: tuple[rules_lib.Rule, ...] = ()
    losses: tuple[tuple[str, Any], ...] = ()
    remat: str = "dots"
    attention: str = "xla"  # or fused, see `attention.attention_form`
    max_segments: int = 0
    engine: Engine = ALONE
    route: str = ""  # a stage's own routing: "task" is hard, by task id; "apart": among the task's own
    tasks: tuple[str, ...] = ()  # the names behind `task_ids`

    @functools.cached_property
    def segments(self) -> tuple[rules_lib.Segment, ...]:
        return rules_lib.segments(self.rules, self.config.layers, cuts=[s.start for s in self.config.stacks])

    def without_rules(self) -> "Model":
        """The frozen base alone."""
        return dataclasses.replace(self, rules=(), losses=())

    def init_adapters(self, key: Array, params: dict) -> dict:
        """Fresh leaves, float32 (tables int32). `params` is read by inits that start from the base."""
        return leaves.init_adapters(self.config, self.rules, self.segments, key, params)

    def begun_anew(self, key: Array, params: dict, adapters: dict, layer: Array, base_grad: dict) -> dict:
        """`adapters`, whose leaves of one layer start from the base's gradient there (site -> `[D_in, D_out]`).

        `layer` may be traced where one segment holds all layers; only rules whose start reads the gradient change.
        """
        segments = self.segments if len(self.segments) == 1 else [s for s in self.segments if layer in s.layers]
        return leaves.begun_anew(self.config, self.rules, segments, key, params, adapters, layer, base_grad)

    def init_router_state(self) -> dict:
        return leaves.init_router_state(self.config, self.rules, self.segments)

    def frozen_patterns(self) -> tuple[str, ...]:
        """Paths `rule/.../leaf` that never train, from the members' FROZEN and the rules' loaded experts."""
        return leaves.frozen_patterns(self.rules)

    def init_cache(self, rows: int, slots: int, dtype) -> dict:
        """Empty keys and values, of this model and of the base's own pass."""
        needs_head(self.config, "generation", "base.source")
        names = ("own", "base") if self._reading_base else ("own",)
        return {name: self.config.init_cache(rows, slots, dtype) for name in names}

    @property
    def _reading_base(self) -> tuple[rules_lib.Rule, ...]:
        """Rules whose routers read the frozen base's hidden state."""
        return tuple(
            rule for rule in self.rules if rule.router is not None and rule.router.INPUT and self.route != "task"
        )

    def settle(self, params: dict, adapters: dict, state: dict, batch: dict) -> dict:
        """What prompts decide for their answers: `batch["settled"]` of `hidden` in decoding.

        Of rules whose router says SETTLES; each row of the batch is one prompt. `{rule: gates [B, E]}` of a router that
        decides for the whole model, else `{rule: {segment: {scope: [L_segment, B, E]}}}`.
        """
        rules = [r for r in self.rules if r.router is not None and r.router.SETTLES and self.route != "task"]
        if not rules:
            return {}
        gates = self.hidden(params, adapters, state, batch, collect=True)[3]
        own = {rule.name: jax.tree.map(lambda g: jnp.max(g, axis=2), gates[rule.name]) for rule in rules}
        return {r.name: own[r.name]["model"]["model"][0] if r.share == "model" else own[r.name] for r in rules}

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
        tap: Tap | None = None,
    ):
        """Final hidden states, after the last norm.

        Args:
          batch: `tokens`, `segment_ids` (0 = padding), `positions`, and for routing analysis `task_ids`, `example_ids`,
            all `[B, S]` int32; optional `allowed [E] | [B, E]`, `settled` (see `settle`).
          train: dropout and noise on (needs `key`), layers inside `jax.checkpoint`.
          mask: `[B, 1, S, S_k]` attention mask over a cache's slots; without a cache the backbone's own is used,
            block-diagonal over `segment_ids`.
          cache: `(buffers, write)`: those of `init_cache`, and what puts new keys or values in (see `StackRunner`).
          collect: also return the gates.
          tap: a zero on kernels of one layer, for the gradient of these (`tap.zeros` are then what came out).

        Returns:
          `(hidden [B, S, D], sums {rule: {segment: {scope: ...}}}, buffers, gates likewise [L_segment, B, S, E])`.
        """
        missing = [name for name in self.config.FIELDS if name not in batch]
        if missing:
            raise InputError("batch", got=f"no {', '.join(missing)}", expected=f"what {self.config.family} reads")
        if (mask is None) != (cache is None):
            raise InputError("mask", got="one of mask and cache", expected="both or neither", fix="Leave it out.")
        tokens, segment_ids = batch["tokens"], batch["segment_ids"]
        zeros = jnp.zeros_like(tokens)
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
            route=self.route,
            max_segments=self.max_segments or tokens.shape[1],
            tasks=self.tasks,
            tasked="task_ids" in batch,
            tokens=tokens,
        )
        carry = {
            rule.name: rule.router.init_carry(*tokens.shape)
            for rule in self.rules
            if rule.router is not None and jax.tree.leaves(rule.router.init_carry(*tokens.shape))
        }
        mask = self.config.mask(segment_ids) if mask is None else mask
        buffers, write = ({}, None) if cache is None else cache
        features, base_kv = self._base_features(
            params, adapters, batch, ctx, mask, buffers.get("base"), write, constrain
        )
        ctx = ctx.replace(base_features=features)
        route = functools.partial(self._route_model, adapters, state, batch.get("settled", {}), ctx, collect)
        runner = stack.StackRunner(
            self, adapters, state, ctx, mask=mask, carry=carry, cache=(*buffers["own"], write) if buffers else None,
            route=route, collect=collect, constrain=constrain, tap=tap, settled=batch.get("settled", {}),
        )  # fmt: skip
        x = self.config.forward(params, batch, runner)
        if buffers:
            buffers = {"own": runner.cache[:2]} | ({} if base_kv is None else {"base": base_kv})
        return x, runner.stats, buffers or None, runner.gates

    def _base_features(self, params, adapters, batch, ctx, mask, kv, write, constrain):
        """What routers with an INPUT of the model read, by rule, and the base pass's own keys and values.

        One pass of the frozen base, without rules: no expert is computed and nothing is differentiated.
        """
        if not self._reading_base:
            return {}, kv
        cache = None if kv is None else ({"own": kv}, write)
        with jax.named_scope("base_hidden"):
            h, _, buffers, _ = self.without_rules().hidden(
                params, {}, {}, batch, mask=None if cache is None else mask, cache=cache, constrain=constrain
            )
            h = jax.lax.stop_gradient(h)
        features = {}
        for rule in self._reading_base:
            own = ctx.replace(key=None if ctx.key is None else jax.random.fold_in(ctx.key, rule.tag))
            features[rule.name] = rule.router.base_features(adapters[rule.name].get("shared", {}), h, own)
        return features, None if buffers is None else buffers["own"]

    def _route_model(self, adapters, state, settled, ctx, collect, x):
        """Rules with `share="model"`: one decision for all layers, on the embeddings. Sums lead with one "layer"."""
        given, stats, gates = {}, {}, {}
        for r, rule in enumerate(self.rules):
            if rule.share != "model":
                continue
            E, pick = max(rule.experts), lambda w: w[0]
            segment = next(s for s in self.segments if s.counts[r])
            shared = adapters[rule.name].get("shared", {})
            own = {"router": jax.tree.map(pick, shared.get("router", {}))}
            own_state = jax.tree.map(pick, state.get(rule.name, {}).get("shared", {}))
            trees = ({rule.name: own}, {rule.name: shared}, {rule.name: own_state})
            carry = {rule.name: rule.router.init_carry(*x.shape[:2])}
            own_ctx = ctx.replace(layer=0, settled=settled.get(rule.name))
            layer = Layer(
                self.config, segment, [(rule, E)], self.losses, trees, carry, own_ctx, {}, collect, self.engine
            )
            layer.enter("model", x)
            given[rule.name] = layer.decisions[rule.name, "model"]
            lead = lambda tree: jax.tree.map(lambda v: v[None], tree)  # noqa: E731
            stats[rule.name] = {"model": lead(layer.stats[rule.name])}
            if collect:
                gates[rule.name] = {"model": lead(layer.routings[rule.name])}
        return given, stats, gates

    def logits(self, params: dict, hidden: Array) -> Array:
        """`hidden [..., D]` -> `[..., V]` float32."""
        return self.config.logits(params, hidden)
