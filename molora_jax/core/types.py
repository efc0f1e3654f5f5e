"""The values that travel between the axes: Site, Factors, Routing, Context.

B batch, S sequence, T = B*S tokens, D width, E experts, K active experts, R rank, L layers.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax

from kernels_pallas.tiles import InStack

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Site:
    """A projection of the decoder in one segment of layers.

    `layers` are the absolute layers that share this site's shape and expert count; `experts` is E. `counts` are the
    rule's experts in every layer of the model (0 where it does not act), for leaves that layers share.
    """

    name: str
    d_in: int
    d_out: int
    layers: tuple[int, ...]
    experts: int
    counts: tuple[int, ...] = ()


@flax.struct.dataclass
class Factors:
    """How E experts change one projection `W`; rank-major.

    `A [1|E, R, D_in]`, `B [1|E, R, D_out]`: the low-rank part `B_e A_e x`; with R = 0 there is none.
    `out [E, D_out]` multiplies `W x` (DoRA), `inp [E, D_in]` multiplies `x`; both are combined over experts as
    `1 + sum_e g_e (f_e - 1)`; `with_bias`: `out` multiplies the projection's bias too ((IA)3). `mid [E, R, R]` stands
    between A and B (LoRA-XS). `form(x [T, D_in], A, B) -> [T, E, D_out]` is what the experts say where that is no
    product `B_e A_e x` (ALLoRA's ablations): nothing of it commutes with gates or with sums over shards, so all experts
    are formed, on whole rows.
    `scale` multiplies the low-rank part, where it is smallest: at the gates or rank activations, never at B, which
    would be a copy of all experts a layer. The placement sets it, an adapter leaves it at 1. The placement also sets
    `stacks`, the leaves of all layers, for those of "A" and "B" that are this layer's leaves unchanged, and `layer`,
    its index among them.
    """

    A: Array
    B: Array
    mid: Array | None = None
    out: Array | None = None
    inp: Array | None = None
    with_bias: bool = flax.struct.field(pytree_node=False, default=False)
    scale: float = flax.struct.field(pytree_node=False, default=1.0)
    form: Callable | None = flax.struct.field(pytree_node=False, default=None)
    stacks: dict[str, Array] = flax.struct.field(default_factory=dict)
    layer: Array | None = None

    def by_expert(self, name: str) -> "Array | InStack":
        """A or B for a product that reads the experts one by one."""
        A = getattr(self, name)
        return InStack(A, self.stacks[name], self.layer) if name in self.stacks else A


@flax.struct.dataclass
class Routing:
    """A router's decision for every token.

    `gates [B, S, E]` float32, 0 where not selected; `selected [B, S, E]` bool; `logits`, `probs [B, S, E]` float32,
    before the selection; `valid [B, S]` bool, False at padding (never routed, never counted); `clipped [B, S]` int32,
    experts that the rule wanted beyond `k_max`; `base_gate [B, S]` the frozen FFN's coefficient, None for
    `1 - sum gates`, bool where that is always 0 or 1 (gates that sum to 1: the FFN's own hidden state is then not even
    formed); `chosen [B, S, E]` bool, what a balance loss counts, None for `selected` (a dense router with one
    favourite: that); `averaged [B, S, E]` float32, what it averages, None for `probs`; `sparsity [B, S]`, what a router
    predicts of its own sparsity (Sparsegen's lambda), for a loss; `base_logit [B, S]`, of the frozen base where it is
    one expert among the others; `reach [B, S, E]`, how probable a choice under a router's noise was, and `cost [B, S]`,
    what a router charges a token, both with a gradient, for losses.
    Gates may be negative, exceed 1, or sum to anything: nothing downstream may assume otherwise.
    """

    gates: Array
    selected: Array
    logits: Array
    probs: Array
    valid: Array
    clipped: Array | None = None
    base_gate: Array | None = None
    k_max: int = flax.struct.field(pytree_node=False, default=1)
    chosen: Array | None = None
    sparsity: Array | None = None
    averaged: Array | None = None
    base_logit: Array | None = None
    reach: Array | None = None
    cost: Array | None = None


@flax.struct.dataclass
class Context:
    """What a member of an axis may know about the call it serves.

    `valid [B, S]` bool; `segment_ids`, `positions`, `task_ids`, `example_ids [B, S]` int32; `step`, `layer` int32
    scalars; `key` unique to the site call, `step_key` equal over layers and micro-steps (both None outside training);
    `allowed [E] | [B, E] | [B, S, E]` experts that may be chosen; `state` this router's mutable state; `carry` what the
    router handed on from the layer before; `base` the site's frozen kernel `[D_in, D_out]`; `base_features` by rule,
    `[B, S, *]`, what a router reads that declares an INPUT of the model; `settled [B, E]` the gates of a whole answer,
    decided by its prompt; `stack` the site's leaves of all layers and
    this layer's place among them, None where an engine splits them; `iteration` the pass inside a chain; `route` how a
    stage routes in the routers' place ("": it does not); `tasks` the names behind `task_ids` (entries of
    `data.tasks`), `tasked` whether the batch says them (a prompt does not, and `task_ids` are then 0); `tokens [B, S]`
    the token ids, None where there are none; `dropout` the rate of the rule's adapter, for a router that reads its
    dropped input.
    """

    valid: Array
    segment_ids: Array
    positions: Array
    task_ids: Array
    example_ids: Array
    step: Array | int = 0
    layer: Array | int = 0
    key: Array | None = None
    step_key: Array | None = None
    allowed: Array | None = None
    state: Any = None
    carry: Any = None
    base: Any = None
    base_features: Any = None
    settled: Array | None = None
    stack: Any = None
    tokens: Array | None = None
    site: Site | None = flax.struct.field(pytree_node=False, default=None)
    train: bool = flax.struct.field(pytree_node=False, default=False)
    iteration: int = flax.struct.field(pytree_node=False, default=0)
    route: str = flax.struct.field(pytree_node=False, default="")
    max_segments: int = flax.struct.field(pytree_node=False, default=0)
    tasks: tuple[str, ...] = flax.struct.field(pytree_node=False, default=())
    tasked: bool = flax.struct.field(pytree_node=False, default=False)
    dropout: float = flax.struct.field(pytree_node=False, default=0.0)

    def keyed(self, *tags: int) -> Array | None:
        """A key of its own for each use inside one call; None outside training."""
        key = self.key
        for tag in tags if key is not None else ():
            key = jax.random.fold_in(key, tag)
        return key
