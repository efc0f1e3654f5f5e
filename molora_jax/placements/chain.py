"""Chain of experts: a token passes C times through one pool of experts, routed anew each time (arXiv 2506.18945).

    z(0) = x,   z(t) = z(t-1) + sum_e g_{t,e} s B_e phi(A_e z(t-1)),   g_t = router_t(z(t-1)),   t = 1 .. C
    block output = h + FFN(z(0)) + (z(C) - z(0))

x is the normed input of the feed-forward block, whose frozen weights and residual stream stay as they are: with B = 0
nothing changes. (The paper trains whole experts from scratch, and its code drops the raw residual stream h: with a
frozen base that would drop the base's own output, so there is no such option.) C = 1 is the plain mixture beside the
FFN. K is per pass: CoE(C, K) costs what a mixture of C K costs.

`gating`: a router for each pass; `shared`, one router asked again at each pass (the paper's code for its ablation);
`once`, the first pass's gates for all (its report). `residual="outer"` drops the inner one: z(t) = sum_e ..., the
output adds z(C); C >= 2 has no gradient from B = 0 there, so it needs a start of its own (train.init_from). phi is
`nonlinearity`; without one the passes compose linear maps, gates apart.

A pass is a scope of its own (`pass0`, `pass1` ...), so its leaves, state, sums, losses and statistics stay apart.
T tokens, D width, E experts, R rank, C iterations: A [E, R, D], B [E, R, D], stored under site `ffn`.
"""

import dataclasses
from typing import ClassVar, Literal

import flax.struct
import jax
import jax.numpy as jnp

from molora_jax.placements import projection
from molora_jax.placements.base import At, Placement

NONLINEARITIES = {"silu": jax.nn.silu, "gelu": jax.nn.gelu, "relu": jax.nn.relu}


def chain(x, experts, iterations: int, residual: str = "inner"):
    """`d = z(C) - z(0)` (outer: z(C)) for `experts(t, z) -> like z`; carries d, so that C = 1 is exact."""
    d, z = jnp.zeros_like(x), x
    for t in range(iterations):
        out = experts(t, z)
        d = out if residual == "outer" else d + out
        z = d if residual == "outer" else x + d
    return d


@flax.struct.dataclass
class ChainPart(projection.ProjectionPart):
    """The experts of one pass: a change without a frozen product."""

    def here(self, arrays, out, at, early=None):
        return self.change(arrays, at, self.slots)

    def stay(self, arrays, out, back, lost):
        return back


@dataclasses.dataclass(frozen=True)
class Chain(Placement):
    iterations: int = 2
    gating: Literal["independent", "shared", "once"] = "independent"
    residual: Literal["inner", "outer"] = "inner"
    nonlinearity: Literal["none", "silu", "gelu", "relu"] = "none"

    NAME: ClassVar[str] = "chain"
    NAMED: ClassVar[bool] = True
    SITES: ClassVar[tuple[str, ...]] = ("ffn",)
    OWNS: ClassVar[tuple[str, ...] | None] = ("ffn",)
    LOADS: ClassVar[bool] = False
    LIMITS: ClassVar = {"iterations": (1, None)}
    AXES: ClassVar[dict] = {  # the state is whole on every device
        "A": ("expert", "rank", "width"), "B": ("expert", "rank", "width"), "mid": ("expert", "rank", "rank"),
    }  # fmt: skip
    KEPT: ClassVar[tuple[str, ...]] = ("A",)
    REFUSES: ClassVar[tuple] = (  # it changes the state of width D that enters the FFN: no base weight has that shape
        (
            "adapter.name", (("adapter.name", "states", "ROW_FACTORS"),),
            "an adapter without row factors: they scale a base weight, and a chain has none", "Use lora.",
        ),
        (
            "adapter.name", (("adapter.name", "states", "DENSE"),),
            "factors of low rank: a pass with an inner width near D is a dense layer of its own", "Use lora.",
        ),
        ("adapter.init", (("adapter.init", "needs", "base"),), "a start that needs no base weight", "Use kaiming."),
        ("adapter.init", (("adapter.init", "needs", "base_grad"),), "a start that reads no gradient", "Use kaiming."),
        (
            "placement.residual",
            (
                ("placement.residual", "is", "outer"), ("placement.iterations", "above", 1),
                ("train.init_from", "is", ""),
            ),
            "'inner': from B = 0 two passes without an inner residual have no gradient",
            "Or give trained experts in train.init_from.",
        ),
        (
            "router.share", (("router.share", "not in", ("site", "ffn")),),
            "'site': each pass routes on the state that the pass before it made", "",
        ),
    )  # fmt: skip

    def acts(self, rule):
        return ("beside",)

    def scopes(self, rule):
        return tuple(f"pass{t}" for t in range(self.iterations))

    def leaves_of(self, scope: str) -> str:
        """The pass whose router another pass asks."""
        return scope if self.gating == "independent" else "pass0"

    def decided_by(self, scope):
        return "pass0" if self.gating == "once" else scope

    def meetings(self, rule):
        return tuple(f"pass{t}" for t in range(self.iterations))

    def ends(self, rule, meeting):
        return meeting == f"pass{self.iterations - 1}"

    def beside(self, rule, p, shared, ctx, x, decide, meet):
        return apply(rule, p["ffn"], shared, ctx, x, decide, meet)


def apply(rule, p: dict, shared: dict, ctx, x, decide, meet=None):
    """A rule's change of the block's output, `[B, S, D]`.

    Args:
      p: the leaves of site `ffn`. x: `[B, S, D]`. decide: `(t, z [B, S, D]) -> Routing | None`.
      meet: `(t, part, z [T, D]) -> [T, D]` under an engine; None: all experts are here.
    """
    placement, phi = rule.placement, NONLINEARITIES.get(rule.placement.nonlinearity)

    def experts(t, z):
        flat = z.reshape(-1, z.shape[-1])
        with jax.named_scope(f"pass{t}"):
            at = ctx.replace(key=ctx.keyed(t), iteration=t)
            part = projection.part(rule, p, shared, decide(t, z), at, flat, placement=placement, kind=ChainPart)
            if phi is not None:
                own = part.latent
                part = part.replace(latent=phi if own is None else lambda a: phi(own(a)))
            if meet is None:
                return part.here({"x": flat}, None, At(jnp.arange(len(flat)), (0, 1))).reshape(z.shape)
            return meet(t, part, flat).reshape(z.shape)

    return chain(x, experts, placement.iterations, placement.residual)
