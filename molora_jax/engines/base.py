"""What an engine is: where the experts of a rule live on the mesh, and how tokens and experts come together.

An engine is a module with one signature on local arrays, called inside `shard_map` (or directly on one device):

    project(x, W, parts, on, rows, share)                -> (y, counts)         x [T, D_in]  -> y [T, D_out]
    feed_forward(x, g, u, weights, parts, on, rows, activation, share, z)
                                                         -> (mix, rest, counts) x [T, D], g, u [T, F] -> [T, F], [T, D]
    refuses(factors, place, latent, on)                  -> why an adapter cannot be served, or None
    bytes_moved(load, on)                                -> bytes shipped and useful, see `Load`

`x` are this device's tokens; a part's factors are this device's experts where `moved(part)`, else all of them.
`counts [1, 2]`: slots sent and slots dropped. Where `share = (index, of)` is not (0, 1), the arrays hold one share of
F (or of D_in) and y, rest are partial sums over the axis `tensor`; `z` are then rank activations that are known already
(`ranks(x, parts, on, rows)`, of the engines that keep tokens at home).

T tokens a device, D width, F FFN width, E experts, K slots, R rank, P devices on the axis `expert`.
"""

import dataclasses
import math

from jax.sharding import Mesh

from molora_jax import placements
from molora_jax.placements.base import Placement
from molora_jax.sharding import AXES, ROWS

ROW_SITES = ("o", "down")  # row-parallel under `tensor`: their input is split, their output is a sum


@dataclasses.dataclass(frozen=True)
class Engine:
    """Static: which engine runs, on which mesh, with which options.

    `capacity`: rows a peer gets, as a multiple of the mean load; 0 is dropless. `rank_space`: an exchange ships rank-R
    rows, because every device keeps all experts' A.
    """

    name: str = "replicate"
    mesh: Mesh | None = None
    capacity: float = 0.0
    rank_space: bool = False

    def ways(self, *axes: str) -> int:
        return 1 if self.mesh is None else math.prod(self.mesh.shape[a] for a in axes)

    def keeps(self, rule, leaf: str) -> bool:
        """Whether every device holds this leaf of the rule's experts."""
        return self.rank_space and leaf in placements.of(rule).KEPT or "beside" in placements.of(rule).acts(rule)

    @property
    def alone(self) -> bool:
        """One device: no `shard_map` at all."""
        return self.ways(*AXES) == 1

    @property
    def peers(self) -> int:
        """P."""
        return self.ways("expert")

    @property
    def moves_tokens(self) -> bool:
        return self.name in ("all_to_all", "ragged_all_to_all") and self.peers > 1

    def padded(self, experts: int) -> int:
        """The smallest multiple of P that holds so many experts; the last are masked: no token is sent to them."""
        return -(-experts // self.peers) * self.peers

    def stored(self, experts: int) -> bool:
        """Whether leaves `[L, E, ...]` of so many experts are kept in P shares (a dimension that P divides)."""
        return self.name != "replicate" and self.peers > 1 and experts % self.peers == 0 and experts > 1

    def split(self, experts: int, routed: bool) -> bool:
        """Whether a device sees only its share of the experts. A single expert without a router is everywhere."""
        return self.stored(experts) or (self.moves_tokens and routed and experts > 1)

    def row_axes(self, num_tokens: int) -> tuple[str, ...]:
        """Mesh axes over which tokens are split: all of the batch's, or none where they do not divide."""
        return ROWS if num_tokens % self.ways(*ROWS) == 0 else ()


ALONE = Engine()


@dataclasses.dataclass(frozen=True)
class Load:
    """What one routed site of one layer asks of an engine in a step; one device's share throughout.

    `leaves`: `(bytes of all E experts, is it per expert, is it split over tensor)` of every factor. `row_in, row_out`:
    bytes of a token's row there and back; `rank_bytes` of its rank activations. `passes`: forward passes, 2 where the
    stack is recomputed; `last`: nothing in the layer comes after the site, so its output is not recomputed.
    Routers and rules without one cost the same under every engine and are left out.
    """

    T: int
    K: int
    E: int
    row_in: int
    row_out: int
    rank_bytes: int
    leaves: tuple[tuple[int, bool, bool], ...]
    place: Placement
    passes: int
    last: bool

    def sums(self, on: Engine, *, per_expert: bool | None = None) -> float:
        """Bytes of the gradient all-reduces of leaves that every device holds."""
        total = 0.0
        for size, each, split in self.leaves:
            if per_expert in (None, each):
                n = on.ways(*(ROWS if split else AXES))
                total += 2 * size * (n - 1) / n
        return total

    def shares(self, on: Engine) -> float:
        """The same of leaves of which a device on `expert` holds one share, the others having the same."""
        total = 0.0
        for size, each, split in self.leaves:
            if each:
                n = on.ways(*(ROWS if split else AXES)) // on.peers
                total += 2 * size * on.padded(self.E) / self.E / on.peers * (n - 1) / n
        return total
