"""The router contract. A router is a frozen dataclass of its config; this base gives the parts that most share.

`route(p, shared, x, ctx) -> (Routing, carry, sums)`: `x [B, S, D]`, `p` this layer's leaves, `shared` leaves common to
the layers of the rule, `ctx.state` its mutable state, `ctx.carry` what the layer before handed on.
A router that declares an INPUT gets that in place of x, and its leaves are made for the model's width D.
`share="model"` has one set of leaves, `adapters/<rule>/shared/router/model/...`, and one decision for all layers.
Build the decision with `core.routing.finish(gates, selected, z, probs, ctx, k_max=...)`; say `sums_to_one=True` where a
token's gates do by construction: a routed FFN then need not form the hidden state without experts. `probs [B, S, E]`
are the scores over all experts before the selection; losses read them, so they should sum to 1 over E where the router
has a distribution (a router of independent scores gives those), with a training noise in them if they were selected
with it. Select on logits where a low temperature could make probabilities tie at 0. Every router honours `ctx.allowed`
(`routing.permitted`).
`update(state, sums)` runs once an applied optimizer step, on sums over the whole global batch, never in evaluation.
"""

import dataclasses
from typing import Any, ClassVar, Literal

import jax

from molora_jax.core.types import Array, Context, Routing, Site


@dataclasses.dataclass(frozen=True)
class Router:
    """Fields that every router has: `share`, and `init` of the weight `W [E, D]`.

    Init `normal` is N(0, 0.02^2) (Mixtral, MixLoRA); `kaiming` is U(+-1/sqrt(D)) (torch's default linear, MoLA).
    """

    share: Literal["site", "attn", "ffn", "model"] = "site"
    init: Literal["normal", "kaiming"] = "normal"

    FROZEN: ClassVar[tuple[str, ...]] = ()  # leaf names that never train
    RANDOM: ClassVar[tuple[str, ...]] = ()  # fields that make training random, off at 0 (the battery sets them so)
    SETTLES: ClassVar[bool] = False  # in decoding the prompt decides once, for the whole answer
    INPUT: ClassVar[str] = ""  # "base_hidden": the frozen base's last hidden state in place of the site's input

    # Runs of one expert under this router are joined by a rule's `load`, and rows may start from documents: it has
    # `documents`, `public`, `rows` and `joined` as `document_rows.py` has them.
    JOINS: ClassVar[bool] = False
    # whether a token's decision depends on no later token: else it is refused where the base predicts the next one
    CAUSAL: ClassVar[bool] = True
    # whether nearly all tokens at the same few experts is a fault to warn of (`training/collapse.py`): not of a router
    # that follows the task
    COLLAPSES: ClassVar[bool] = True
    IN_RANK: ClassVar[bool] = False  # it reads `input_of`, of width R; its leaves are made for that

    def k_max(self, experts: int) -> int:
        """Most experts that one token may use, static."""
        raise NotImplementedError

    def check(self, where: str, experts: int, tasks: tuple[str, ...]) -> None:
        """Raises InputError where so many experts, or the run's tasks, do not fit; `where`: the field of the config."""

    def init_leaves(self, key: Array, site: Site, layer: Array) -> dict[str, Array]:
        """Leaves of one layer, float32. `layer`: its absolute index, a traced scalar."""
        shape = (site.experts, site.d_in)
        if self.init == "kaiming":
            bound = site.d_in**-0.5
            return {"W": jax.random.uniform(key, shape, minval=-bound, maxval=bound)}
        return {"W": 0.02 * jax.random.normal(key, shape)}

    def init_shared(self, key: Array, sites: tuple[Site, ...]) -> dict[str, Array]:
        return {}

    def base_features(self, shared: dict, h: Array, ctx: Context) -> Array:
        """What `route` gets as x of a declared INPUT `h [B, S, D]`: computed once a pass, for all layers."""
        return h

    def input_of(self, x: Array, leaves: dict, ctx: Context) -> Array:
        """What `route` gets as x, of the site's input `x [B, S, D]` and the leaves of the adapter there."""
        return x

    def init_state(self, site: Site) -> dict[str, Array]:
        return {}

    def room(self, experts: int) -> int | None:
        """How many tasks, one after the other, its experts have room for; None: any number shares them."""
        return None

    def next_task(self, state: dict) -> dict:
        """The state as another task begins (regime `continual`)."""
        return state

    def learning(self, state: dict, experts: int) -> Array | None:
        """`[E]` bool: the experts whose factors learn now; None: all do. Others act (`core/turns.py`)."""
        return None

    def init_carry(self, batch: int, length: int) -> Any:
        return ()

    def route(self, p: dict, shared: dict, x: Array, ctx: Context) -> tuple[Routing, Any, dict]:
        raise NotImplementedError

    def update(self, state: dict, sums: dict) -> dict:
        return state
