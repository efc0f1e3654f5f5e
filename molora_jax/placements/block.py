"""One router a block weights an expert at each of its places: adapters of different kinds in one rule (2506.05928).

    w = router(x) [K]                                     x: what enters the block, asked once for attention and FFN
    at a projection    y += w_j s B_j A_j x               any of `adapters`, with the input of the projection itself
    prompt             o += w_j gate_h softmax(q K_P^T / sqrt(H_d)) V_P,   K_P, V_P = W_k P, W_v P, before `o`
    parallel           FFN(h) += w_j (outward silu(inward h + b) + c)

The places are no alternatives: the weights need not sum to anything, and without a router each is 1. Keys and values
of a prompt go through the frozen W_k and W_v (bias and norm of a family included), without LoRA and without positions;
q is what the text's keys meet, LoRA included. The order of the weights is q, k, v, prompt, o, up, gate, down, parallel;
kinds at one projection follow each other as in `adapters`. Without `adapters` the rule's own adapter stands at each of
its sites, with as many experts each as the rule says.

`form="gathered"` brings the tokens that chose an expert together and forms its change of them alone, where the adapter
is a plain product; `dense` forms it of all tokens and multiplies by 0.
T tokens, D width, K weights, R rank, H heads, H_d head size.
"""

import dataclasses
from typing import ClassVar, Literal

import flax.struct
import jax
import jax.numpy as jnp

from kernels_pallas import grouped_expand, grouped_lora, grouped_shrink
from molora_jax.adapters._mixed import Mixed, Parallel, Prompt
from molora_jax.core import lowrank
from molora_jax.core import routing as routing_math
from molora_jax.core.prompt import attend_prompt
from molora_jax.core.types import Array, Routing
from molora_jax.placements import projection

ORDER = ("q", "k", "v", "prompt", "o", "up", "gate", "down", "parallel")


@flax.struct.dataclass
class BlockPart(projection.ProjectionPart):
    """The experts of one kind at one projection."""

    def change(self, arrays, at, slots):
        f = self.factors
        plain = self.latent is None and f.mid is None and f.form is None and len(f.A) == len(f.B) and f.A.shape[1]
        if self.placement.form == "dense" or not plain or not self.routed:
            return super().change(arrays, at, slots)
        seen = lowrank.dropped(arrays["x"], self.dropout, at.rows, at.shard)
        idx, gates = self.slots
        return grouped_lora(seen, f.by_expert("A"), f.by_expert("B"), idx, f.scale * gates)


@dataclasses.dataclass(frozen=True)
class Block(projection.Projection):
    """`router_input`: "raw", before the attention norm, or "normed", after it. `length`: slots of the prompt. `width`:
    of the parallel adapter."""

    router_input: Literal["raw", "normed"] = "raw"
    length: int = 10
    width: int = 16
    form: Literal["dense", "gathered"] = "dense"

    NAME: ClassVar[str] = "block"
    NAMED: ClassVar[bool] = True
    LOADS: ClassVar[bool] = False
    KINDS: ClassVar[tuple[str, ...]] = ("prompt", "parallel")
    LIMITS: ClassVar = {"length": (1, None), "width": (1, None)}
    REFUSES: ClassVar[tuple] = (
        (
            "router.share", (("router.share", "not in", ("site",)),),
            "'site': what the block's router decides serves all of its places", "",
        ),
        (
            "router.name", (("router.name", "states", "IN_RANK"),),
            "a router of the width D: what enters a block has no rank activations", "Use sigmoid_threshold.",
        ),
    )  # fmt: skip

    @property
    def enters(self) -> tuple[str, ...]:
        """The names under which a layer announces what the router reads."""
        return ("block",) if self.router_input == "raw" else ("block_normed",)

    def mixed(self, names: tuple[str, ...], adapter, make):
        """The adapter of a rule that lists `names`; `make(name)` gives a member of `adapters` with its defaults."""
        own = {"prompt": Prompt(self.length), "parallel": Parallel(self.width)}
        first = next(name for name in names if name not in own)
        kinds = [(name, own.get(name) or (adapter if name == first else make(name))) for name in names]
        same = {field: getattr(adapter, field) for field in ("rank", "alpha", "dropout", "init")}
        return Mixed(**same, kinds=tuple(sorted(kinds, key=lambda kind: kind[0] in own)))

    def places(self, rule) -> tuple[tuple[str, int], ...]:
        """(place, kind) of each expert, in the order of the weights; kinds at a projection are numbered."""
        many = len(rule.adapter.at_projections) if isinstance(rule.adapter, Mixed) else 1
        there = dict.fromkeys(rule.sites, many) | dict.fromkeys(self._own(rule), 1)
        return tuple((place, kind) for place in ORDER for kind in range(there.get(place, 0)))

    def _own(self, rule) -> tuple[str, ...]:
        """Those of prompt and parallel that the rule has."""
        return tuple(n for n, _ in rule.adapter.kinds if n in self.KINDS) if isinstance(rule.adapter, Mixed) else ()

    def acts(self, rule):
        named = {"prompt": "prompt", "parallel": "beside"}
        return (*rule.sites, *(named[name] for name in self._own(rule)))

    def scopes(self, rule):
        return ("block",)

    def choices(self, rule, config, experts):
        return len(self.places(rule)) * experts

    def owned(self, rule):
        return (*rule.sites, *self._own(rule))

    def dims(self, config, name):
        return (config.width, config.heads) if name == "prompt" else None

    def slots(self, rule, experts, config):
        return 0 if rule.router is None else min(experts, rule.router.k_max(self.choices(rule, config, experts)))

    def meetings(self, rule):
        return rule.sites

    def _chosen(self, rule, routing, place: str, kind: int = 0) -> Routing | None:
        """The decision about the experts of one kind at one place."""
        if routing is None:
            return None
        places = self.places(rule)
        each = routing.gates.shape[-1] // len(places)
        first = places.index((place, kind)) * each
        pick = lambda a: a[..., first : first + each]  # noqa: E731
        return Routing(*map(pick, (routing.gates, routing.selected, routing.logits, routing.probs)), routing.valid,
                       k_max=min(each, routing.k_max))  # fmt: skip

    def parts(self, rule, site, p, shared, routing, context, x):
        members = rule.adapter.at_projections if isinstance(rule.adapter, Mixed) else (rule.adapter,)
        made, own = [], p.get(site, {})
        for kind, adapter in enumerate(members):
            alone, ctx = dataclasses.replace(rule, adapter=adapter), context(site)
            chosen = self._chosen(rule, routing, site, kind)
            made.append(projection.part(alone, own, shared, chosen, ctx, x, placement=self, kind=BlockPart))
        return made

    def prompted(self, rule, p, routing, q, weights, keys):
        leaves = p["prompt"]
        project = lambda site: _frozen(weights[site], leaves["P"].astype(q.dtype))  # noqa: E731
        K, V = keys(project("k"))[0], project("v")[0]
        out = attend_prompt(q, K, V.reshape(K.shape), leaves["gate"][0])
        chosen = self._chosen(rule, routing, "prompt")
        return out if chosen is None else chosen.gates * out

    def beside(self, rule, p, shared, ctx, x, decide, meet):
        leaves, flat = p["parallel"], x.reshape(-1, x.shape[-1])
        chosen = self._chosen(rule, decide(0, x), "parallel")
        with jax.named_scope("parallel"):
            y = parallel(leaves, flat, None if chosen is None else routing_math.slots(chosen), self.form)
        return y.astype(x.dtype).reshape(x.shape)


def _frozen(weight: tuple[Array, Array | None], x: Array) -> Array:
    W, bias = weight
    y = lowrank.frozen_linear(W, x)
    return y if bias is None else y + bias.astype(y.dtype)


def parallel(p: dict, x: Array, slots, form: str) -> Array:
    """`w (outward silu(inward x + b) + c)`, `x [T, D]` -> `[T, D]` float32; `slots (idx, gates) [T, 1]`, None for 1."""
    x = x.astype(jnp.float32)
    if slots is None or form == "dense":
        hidden = jax.nn.silu(x @ p["inward"][0].T + p["b"][0])
        y = hidden @ p["outward"][0] + p["c"][0]
        return y if slots is None else jnp.where(slots[1] == 0, 0.0, slots[1] * y)
    idx, gates = slots
    hidden = jax.nn.silu(grouped_shrink(x, p["inward"], idx) + p["b"])
    gates = jnp.where(idx < 1, gates, 0.0)
    return grouped_expand(hidden, p["outward"], idx, gates, dtype=jnp.float32) + gates * p["c"]
