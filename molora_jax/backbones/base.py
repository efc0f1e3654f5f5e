"""What a base model is: the contract between a backbone and everything around it.

A backbone is a frozen dataclass of numbers and switches, hashable and without arrays: `layers`, `width` (D), `vocab`
(V), `context`. It says what its parameters are called, how they are shaped, sharded and named elsewhere, and how one
block is computed. It does not know adapters: what it is given as `adapt` (`layer.Layer`) multiplies its sites.

B batch, S sequence, T = B*S tokens, D width, L layers, V vocabulary, H heads, H_d head size, E experts of the base.
"""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from molora_jax.backbones.attention import causal_mask
from molora_jax.config.fields import ATTENTION, FFN, SSM
from molora_jax.core.types import Array
from molora_jax.errors import InputError

# Axes of a table [V, D], by preference. Vocabularies divide by nothing in particular (32001 with a padding token): an
# axis that does not divide V splits D, and is left out where it divides neither (the kernels say if D must be divided).
TABLES = (
    (("fsdp", "tensor"), None), ("tensor", "fsdp"), ("fsdp", "tensor"), (None, ("fsdp", "tensor")), (None, "fsdp"),
    (None, None),
)  # fmt: skip
WHOLE = (P(),)
NO_SSM = dict.fromkeys(
    SSM, "This base has no state-space blocks: name those of q, k, v, o, gate, up, down that it has."
)


@dataclasses.dataclass(frozen=True)
class Part:
    """What of a checkpoint's tensor is a leaf's: `start`, `start + step`, ... below `stop` of the `size` on `axis`."""

    axis: int
    start: int
    stop: int
    size: int
    step: int = 1

    def of(self, tensor):
        """A view of the tensor's part."""
        return tensor[(slice(None),) * self.axis + (slice(self.start, self.stop, self.step),)]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of a base.

    `specs`: where it lies on a mesh, by preference: the first that the mesh divides is taken. The leading `stacked`
    axes (layers, experts) are tensors of their own in a Hugging Face checkpoint; `name` has a `{}` for each. `turned`:
    a matrix `[D_in, D_out]` here that is `[D_out, D_in]` there. Random values: normal with deviation `scale`, else all
    are `fill`. `part`: where the tensor of the checkpoint holds others beside it; it is of the tensor as it lies there.
    `product`: a kernel `[..., D_in, D_out]` that `base.quant` quantises.
    """

    shape: tuple[int, ...]
    specs: tuple[P, ...]
    name: str
    stacked: int = 0
    turned: bool = False
    scale: float | None = None
    fill: float = 1.0
    part: Part | None = None
    product: bool = False

    @property
    def file_shape(self) -> tuple[int, ...]:
        """The shape of one tensor of the checkpoint."""
        rest = self.shape[self.stacked :]
        rest = rest[::-1] if self.turned else rest
        return (
            rest
            if self.part is None
            else tuple(self.part.size if axis == self.part.axis else n for axis, n in enumerate(rest))
        )

    def taken(self, tensor):
        """A view of what a tensor of the checkpoint, as it lies there, holds of this leaf."""
        return tensor if self.part is None else self.part.of(tensor)

    def files(self):
        """`(name, index)` of each tensor of the checkpoint; `index` is its place on the stacked axes."""
        for index in np.ndindex(*self.shape[: self.stacked]):
            yield self.name.format(*index), index


def projection(layers: int, d_in: int, d_out: int, name: str, *, inward: bool) -> Leaf:
    """The kernels of one projection in every layer.

    Those that lead back (`inward`) are drawn smaller: the residual stream keeps its size over layers.
    """
    scale = d_in**-0.5 / (math.sqrt(2 * layers) if inward else 1.0)
    specs = (P(None, "tensor", "fsdp"),) if inward else (P(None, "fsdp", "tensor"),)
    return Leaf((layers, d_in, d_out), specs, f"{name}.weight", stacked=1, turned=True, scale=scale, product=True)


@dataclasses.dataclass(frozen=True)
class Stack:
    """Layers `start` to `stop - 1`, all alike: their parameters are `params[name]`, stacked `[layers, ...]`.

    `sites` are the projections that a rule may adapt. `arrays`: `(name, a value a layer)` for what differs between the
    layers (which of them slide). `by_expert`: the subtrees `[layers, E, ...]` that reach `block` as `tiles.InStack`,
    read expert by expert: a layer's slice of them would be a copy.
    """

    name: str
    start: int
    stop: int
    sites: tuple[str, ...]
    arrays: tuple[tuple[str, tuple], ...] = ()
    by_expert: tuple[str, ...] = ()


@dataclasses.dataclass
class BlockContext:
    """Where a block stands in a trace.

    `once`: what `Backbone.once` made before the stack; `arrays`: the stack's arrays at this layer; `valid
    [B, S]`: False at padding; `attention`: which form of attention is asked for (`attention.attention_form`).
    """

    once: dict[str, Any]
    arrays: dict[str, Array]
    valid: Array
    train: bool
    attention: str


class Backbone:
    """What every backbone shares; a subclass is a frozen dataclass with `layers`, `width`, `vocab`, `context`."""

    FIELDS: ClassVar[tuple[str, ...]] = ("tokens", "segment_ids", "positions")  # arrays of the batch that it reads
    CAUSAL: ClassVar[bool] = True  # it has a head that predicts the next token, and a cache
    # Sites (and `experts`) of other backbones -> why this one does not have them
    ABSENT: ClassVar[dict[str, str]] = {
        "experts": "This base has no experts of its own: choose one that routes.",
        **NO_SSM,
    }
    PREFIX: ClassVar[str] = ""  # that a checkpoint of the model with some head puts before its names
    IGNORED: ClassVar[tuple[str, ...]] = ("*rotary_emb.inv_freq",)  # tensors that a checkpoint may have beside ours
    TITLE: ClassVar[str] = ""  # in the digest of random weights, where the class has had another name
    DESCRIBED_LAST: ClassVar[tuple[str, ...]] = ()  # there: fields that stood last in it before they moved

    @property
    def stacks(self) -> tuple[Stack, ...]:
        raise NotImplementedError

    @property
    def sites(self) -> tuple[str, ...]:
        """The projections that rules may name, in order."""
        return tuple(dict.fromkeys(site for stack in self.stacks for site in stack.sites))

    @property
    def attention_sites(self) -> tuple[str, ...]:
        """Those of the sub-block that mixes tokens, whose scope is `attn`: attention's, or a state-space block's."""
        return tuple(site for site in self.sites if site in (*ATTENTION, *SSM))

    @property
    def ffn_sites(self) -> tuple[str, ...]:
        return tuple(site for site in self.sites if site in FFN)

    def stack_of(self, layer: int) -> Stack:
        return next(stack for stack in self.stacks if stack.start <= layer < stack.stop)

    def dims(self, site: str) -> tuple[int, int]:
        """`(D_in, D_out)` of a site."""
        raise NotImplementedError

    def shapes(self) -> dict[str, Leaf]:
        """Path (`embed`, `blocks/q/kernel`) -> leaf, in the order in which random values are drawn."""
        raise NotImplementedError

    def forward(self, params: dict, batch: dict, runner) -> Array:
        """Hidden states `[B, S, D]` after the last norm. `runner(stack, params, x)` runs a stack's layers."""
        with jax.named_scope("embed"):
            x = runner.constrain(self.embed(params, batch))
        for stack in self.stacks:
            x = runner(stack, params[stack.name], x)
        return self.norm(params, x)

    def embed(self, params: dict, batch: dict) -> Array:
        return params["embed"][batch["tokens"]]

    def norm(self, params: dict, x: Array) -> Array:
        raise NotImplementedError

    def mask(self, segment_ids: Array) -> Array:
        """Who sees whom, `[B, 1, S, S]`: causal, and block-diagonal by example; or what else `once` is to be given."""
        return causal_mask(segment_ids)

    def once(self, positions: Array, mask: Array, *, cached: bool, segment_ids: Array | None = None) -> dict:
        """What all layers share, formed before the stack. `mask [B, 1, S, S_k]`; `cached`: slots are positions;
        `segment_ids [B, S]`, 0 at padding, None: a row is one text."""
        return {"mask": mask}

    def block(self, p: dict, x: Array, at: BlockContext, adapt, cache):
        """`x [B, S, D] -> (x, cache)`. `p`: this layer's parameters; `cache`: None without one, else called with new
        `(k, v) [B, S, H_kv, H_d]` it gives all that may be seen and the new cache (see `stack.LayerCache`)."""
        raise NotImplementedError

    def cacheable(self, first: int, last: int) -> bool:
        """Whether keys and values of a text of `first` tokens are still right when it has grown to `last`."""
        return True

    def init_cache(self, rows: int, slots: int, dtype) -> tuple[Array, Array]:
        """Two empty buffers `[L, rows, ...]`: keys and values `[L, rows, slots, H_kv, H_d]`, or what a block keeps."""
        raise NotImplementedError

    def head(self, params: dict) -> dict:
        """Those of the parameters that `logits` reads."""
        name = "head" if "head" in params else "embed"
        return {name: params[name]}

    def logits(self, params: dict, hidden: Array) -> Array:
        """`hidden [..., D]` -> `[..., V]` float32."""
        head, axis = (params["head"], 0) if "head" in params else (params["embed"], 1)
        contract = (((hidden.ndim - 1,), (axis,)), ((), ()))  # `embed.T` would be a copy a token on a CPU
        return jax.lax.dot_general(hidden, head.astype(hidden.dtype), contract, preferred_element_type=jnp.float32)


def needs_head(backbone: Backbone, what: str, where: str) -> None:
    """Raises InputError for a backbone that predicts no next token. `what` needs it, asked for by the field `where`."""
    if not backbone.CAUSAL:
        raise InputError(
            where, got=f"{what} on {backbone.family}", expected="a base that predicts the next token",
            fix=f"{backbone.family} is an encoder: it reads both ways and has no head and no cache.",
        )  # fmt: skip
