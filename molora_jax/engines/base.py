"""What an engine is: where the experts of a rule live on the mesh, and how tokens and experts come together.

An engine is a module of a few functions on local arrays, called inside `shard_map`; it knows no placement:

    MOVES, STORES                  whether tokens travel; whether experts are kept in shards over `expert`
    fetch(leaf)                    `[E/P, ...]` -> `[E, ...]`, of one that STORES but does not move; differentiable
    trip(idx, experts, on, ids)    tokens to their experts and home (see `common.Trip`), of one that MOVES
    bytes_moved(traffic, on)       bytes shipped and useful, see `Traffic`

Another one is a file here and a row in ENGINES. T tokens a device, E experts, K slots, P devices on the axis `expert`.
"""

import dataclasses
import math

import jax
from jax.sharding import Mesh, PartitionSpec

from molora_jax import placements
from molora_jax.config import outside
from molora_jax.engines import all_to_all, gather, ragged_all_to_all, replicate
from molora_jax.placements.base import Axes
from molora_jax.sharding import AXES, ROWS

ENGINES = {
    "replicate": replicate,
    "gather": gather,
    "all_to_all": all_to_all,
    "ragged_all_to_all": ragged_all_to_all,
}
ROW_SITES = (
    "o",
    "down",
    "x_proj",
    "out_proj",
)  # row-parallel under `tensor`: their input is split, their output is a sum


@dataclasses.dataclass(frozen=True)
class Engine:
    """Static: which engine runs, on which mesh, with which options.

    `capacity`: rows a peer gets, as a multiple of the mean expert load; 0 is dropless. `rank_space`: an exchange ships
    rank-R rows, because every device keeps all experts' A.

    >>> import jax, molora_jax as mj
    >>> mesh = jax.make_mesh((jax.device_count(),), ("expert",))
    >>> engine = mj.Engine("all_to_all", mesh, capacity=1.25)
    >>> layer = mj.RoutedLoRA(16, experts=8, router=mj.SoftmaxTopK(k=2), engine=engine)
    >>> layer.made().engine.peers == jax.device_count()
    True
    """

    name: str = "replicate"
    mesh: Mesh | None = None
    capacity: float = 0.0
    rank_space: bool = False

    def ways(self, *axes: str) -> int:
        return 1 if self.mesh is None else math.prod(self.mesh.shape[a] for a in axes)

    @property
    def module(self):
        return outside.member("engines", ENGINES, self.name)

    def keeps(self, rule, leaf: str) -> bool:
        """Whether every device holds this leaf of the rule's experts."""
        return self.rank_space and leaf in placements.of(rule).KEPT

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
        return self.module.MOVES and self.peers > 1

    def padded(self, experts: int) -> int:
        """The smallest multiple of P that holds so many experts; the last are masked: no token is sent to them."""
        return -(-experts // self.peers) * self.peers

    def stored(self, experts: int) -> bool:
        """Whether leaves `[L, E, ...]` of so many experts are kept in P shards (a dimension that P divides)."""
        return self.module.STORES and self.peers > 1 and experts % self.peers == 0 and experts > 1

    def split(self, experts: int, routed: bool) -> bool:
        """Whether a device sees only its shard of the experts. A single expert without a router is everywhere."""
        return self.stored(experts) or (self.moves_tokens and routed and experts > 1)

    def moves(self, part) -> bool:
        """Whether tokens travel to the experts of this part."""
        return self.moves_tokens and self.split(part.experts, part.routed)

    def row_axes(self, num_tokens: int) -> tuple[str, ...]:
        """Mesh axes over which tokens are split: all of the batch's, or none where they do not divide."""
        return ROWS if num_tokens % self.ways(*ROWS) == 0 else ()

    def tensor(self, axes: Axes) -> bool:
        """Whether tensor parallelism splits such an array by one of its widths."""
        split = "in" if axes.site in ROW_SITES else "out"
        return self.ways("tensor") > 1 and (split in axes.names or "sum" in axes.names)

    def spec(self, axes: Axes, rows: tuple[str, ...], part=None) -> PartitionSpec:
        """Where an array lies (of a part, where it is one's). `rows`: mesh axes of the tokens."""
        width = "in" if axes.site in ROW_SITES else "out"
        mesh = {"tokens": rows, width: "tensor", "sum": "tensor"}
        if part is not None and self.split(part.experts, part.routed):
            mesh |= {"expert": "expert", "frozen_expert": "expert"}
        elif part is not None and part.experts % self.peers == 0:
            mesh |= {"frozen_expert": "expert"}
        names = axes.names[1:] if axes.names[:1] == ("sum",) and self.ways("tensor") == 1 else axes.names
        return PartitionSpec(*(mesh.get(name) for name in names))

    def fetch(self, part, axes):
        """A part whose experts are all here; its transpose is a reduce-scatter. As it is where tokens travel."""
        if self.moves(part):
            return part

        def whole(leaf, a):
            if self.spec(a, (), part)[:1] != ("expert",):
                return leaf
            return (gather if a.names[:1] == ("frozen_expert",) else self.module).fetch(leaf)

        return jax.tree.map(whole, part, axes)

    def trip(self, idx, experts: int, ids=None):
        """Slots `idx [T, K]` to their experts, see `common.Trip`; `ids [T]` go with them."""
        return self.module.trip(idx, experts, self, ids)


ALONE = Engine()


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What one routed site of one layer asks of an engine in a step, on one device throughout.

    `leaves`: `(bytes of all E experts, is it per expert, is it split over tensor)` of every factor; `frozen`: bytes of
    stacked kernels of the base, which lie in shards under every engine. `row_in, row_out`: bytes of a token's row there
    and back; `sent` of what really goes (rank activations, in rank space), `ids` of the integers with it. `passes`:
    forward passes, 2 where the stack is recomputed; `last`: nothing in the layer comes after the site, so its output is
    not recomputed; `again`: an earlier meeting of the layer has fetched the leaves.
    Routers and rules without one cost the same under every engine and are left out.
    """

    T: int
    K: int
    E: int
    row_in: int
    row_out: int
    sent: int
    ids: int
    leaves: tuple[tuple[int, bool, bool], ...]
    passes: int
    last: bool
    again: bool = False
    frozen: float = 0.0

    def whole(self, on: Engine) -> float:
        """Bytes of the gathers of `frozen`, for an engine under which tokens stay at home."""
        return 0.0 if self.again else self.passes * self.frozen * (on.peers - 1) / on.peers

    def sums(self, on: Engine, *, per_expert: bool | None = None) -> float:
        """Bytes of the gradient all-reduces of leaves that every device holds."""
        total = 0.0
        for size, each, split in self.leaves:
            if per_expert in (None, each):
                n = on.ways(*(ROWS if split else AXES))
                total += 2 * size * (n - 1) / n
        return total

    def sharded(self, on: Engine) -> float:
        """The same of leaves of which a device on `expert` holds one shard, the others having the same."""
        total = 0.0
        for size, each, split in self.leaves:
            if each:
                n = on.ways(*(ROWS if split else AXES)) // on.peers
                total += 2 * size * on.padded(self.E) / self.E / on.peers * (n - 1) / n
        return total
