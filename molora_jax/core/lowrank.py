"""Frozen projections and the routed low-rank product: written once, for every `Factors`.

Every product with a base's projection goes through `frozen_linear`, which takes kernels in 8 and 4 bits too (`quant`).
T tokens, D width, E experts, K slots, R rank.
"""

import chex
import flax.struct
import jax
import jax.extend
import jax.numpy as jnp

from kernels_pallas import grouped_expand, grouped_lora, grouped_shrink, low_rank_op, rank_gated
from molora_jax.core.quant import Quantised, dense, is_quantised
from molora_jax.core.types import Array, Factors

F32 = jnp.float32


@jax.named_scope("base")
def frozen_linear(W: Array | Quantised, x: Array) -> Array:
    """`x [..., D_in]`, `W [D_in, D_out]` -> `[..., D_out]` in x's dtype."""
    return _by_codes(W, x) if is_quantised(W) else _product(W, x)


def _product(W, x):
    return jnp.dot(x, dense(W, x.dtype), preferred_element_type=F32).astype(x.dtype)


# The backward pass forms the dense kernel again, whatever `jax.checkpoint` keeps: else it may be kept, of every layer.
@jax.custom_vjp
def _by_codes(W, x):
    return _product(W, x)


def _by_codes_back(W, dy):
    contract = (((dy.ndim - 1,), (1,)), ((), ()))
    return None, jax.lax.dot_general(dy, dense(W, dy.dtype), contract, preferred_element_type=F32).astype(dy.dtype)


_by_codes.defvjp(lambda W, x: (_product(W, x), W), _by_codes_back)


@flax.struct.dataclass
class Dropout:
    """One dropout mask, as the key that it follows from: any shard of its rows and columns can be made anywhere."""

    key: Array
    rate: float = flax.struct.field(pytree_node=False)

    @property
    def drop(self) -> int:
        """Of 2^32 words, how many drop their entry."""
        return min(round(self.rate * 2**32), 2**32 - 1)

    def keep(self, rows: Array, width: int, *, shard=(0, 1)) -> Array:
        """Bools for `rows [T]` (rows of the global batch), the shard `(index, of)` of `width` columns.

        A word of 32 bits a (row, column): threefry gives a word a row and one a column, `mixed` makes one of both. A
        generator of full strength in every entry (20 rounds, a loop on CPUs) was a visible part of a CPU step.
        """
        index, ways = shard
        columns = index * (width // ways) + jnp.arange(width // ways)
        words = mixed(self._words(rows, 0)[:, None] ^ self._words(columns, 1))
        return words >= jnp.uint32(self.drop)

    @property
    def scale(self) -> float:
        """Of what is kept, so that the mean stays: 1 / (1 - rate)."""
        return 2**32 / (2**32 - self.drop)

    @jax.named_scope("dropout")
    def mask(self, rows: Array, width: int, dtype, *, shard=(0, 1)) -> Array:
        """0 or `scale`, for what multiplies a mask inside a loop; arguments as of `keep`."""
        return jnp.where(self.keep(rows, width, shard=shard), self.scale, 0.0).astype(dtype)

    def _words(self, index: Array, stream: int) -> Array:
        counter = jnp.stack([index.astype(jnp.uint32), jnp.full(len(index), stream, jnp.uint32)])
        return jax.extend.random.threefry_2x32(jax.random.key_data(self.key)[:2], counter)[0]


def mixed(x: Array) -> Array:
    """A bijection of 32-bit words in which each input bit flips every output bit in about half of all cases.

    Two multiplications; the constants of the least bias known (github.com/skeeto/hash-prospector, "lowbias32").
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x21F0AAAD)
    x = (x ^ (x >> 15)) * jnp.uint32(0x735A2D97)
    return x ^ (x >> 15)


def dropout(key: Array | None, rate: float) -> Dropout | None:
    """None where nothing is dropped."""
    return None if key is None or rate == 0 else Dropout(key, rate)


@jax.named_scope("dropout")
def dropped(x: Array, drop: Dropout | None, rows: Array, shard=(0, 1)) -> Array:
    """`x [T, D]` after dropout; `shard`: which of how many of the columns x holds.

    A selection and a product with a number, which the backward forms again from x (`backbones/stack.py`): neither a
    mask nor its product is kept.
    """
    if drop is None:
        return x
    kept = jnp.where(drop.keep(rows, x.shape[1] * shard[1], shard=shard), x, 0)
    return (kept.astype(F32) * drop.scale).astype(x.dtype)


@jax.named_scope("shrink")
def shrink(x: Array, factors: Factors, latent=None) -> Array:
    """Rank activations `[T, 1|E, R]`, float32: `A x`, the adapter's `latent`, then `mid`."""
    A = factors.A
    z = jnp.dot(x, A.reshape(-1, A.shape[-1]).T.astype(x.dtype), preferred_element_type=F32)
    z = z.reshape(len(x), *A.shape[:2])
    if latent is not None:
        z = latent(z)
    if factors.mid is not None:
        z = jnp.einsum("ter,eqr->teq", jnp.broadcast_to(z, (len(z), *factors.mid.shape[:2])), factors.mid)
    return z


@jax.named_scope("expand")
def expand(z: Array, B: Array, gates: Array, dtype) -> Array:
    """`sum_e g_e B_e z_e`: `z [T, 1|E, R]`, `B [E, R, D_out]`, `gates [T, E]` -> `[T, D_out]`."""
    u = jnp.where(gates[..., None] == 0, 0.0, gates[..., None] * z)
    u = u.reshape(len(u), -1).astype(dtype)
    return jnp.dot(u, B.reshape(-1, B.shape[-1]).astype(dtype), preferred_element_type=F32).astype(dtype)


def _groups(E: int, R: int, K: int) -> bool:
    """Whether this product is cheaper by experts than with all of them (`kernels_pallas/select.py` says why)."""
    return low_rank_op(E, R, K)[0] == "grouped_lora"


def low_rank(x: Array, factors: Factors, gates: Array, latent=None, slots=None) -> Array:
    """`s sum_e g_e B_e mid_e latent(A_e x)`: `x [T, D_in]`, `gates [T, E]` -> `[T, D_out]`.

    `slots` is the same decision as `(idx, gates) [T, K]` where the router bounds K: a product of many experts may then
    be grouped by expert.
    """
    E, R, _ = factors.B.shape
    chex.assert_shape(gates, (len(x), E))
    chex.assert_shape(factors.A, ({1, E}, R, x.shape[-1]))
    if R == 0:
        return jnp.zeros((len(x), factors.B.shape[2]), x.dtype)
    A, B, gates = factors.A, factors.B, factors.scale * gates
    if factors.form is not None:
        return jnp.einsum("te,teo->to", gates, factors.form(x.astype(F32), A, B)).astype(x.dtype)
    if latent is not None or factors.mid is not None:
        return expand(shrink(x, factors, latent), B, gates, x.dtype)
    if slots is not None and _groups(*B.shape[:2], slots[0].shape[1]):
        return grouped_lora(x, factors.by_expert("A"), factors.by_expert("B"), slots[0], factors.scale * slots[1])
    return rank_gated(x, A, B, gates)


def shrink_slots(x: Array, factors: Factors, idx: Array, latent=None) -> Array:
    """`shrink` at the token's experts alone: `x [T, D]`, `idx [T, K]` -> `[T, K, R]` float32, 0 at an unused slot."""
    unchanged = latent is None and factors.mid is None and factors.A.shape[0] > 1
    if unchanged and _groups(*factors.A.shape[:2], idx.shape[1]):
        return grouped_shrink(x, factors.by_expert("A"), idx)
    return to_slots(shrink(x, factors, latent), idx)


def expand_slots(z: Array, factors: Factors, idx: Array, gates: Array, dtype) -> Array:
    """`sum_k g_k B[e_k] z_k`: `z [T, K, R]`, B `[E, R, D_out]`, `idx, gates [T, K]` -> `[T, D_out]`."""
    E, R, _ = factors.B.shape
    chex.assert_shape(z, (*idx.shape, R))
    chex.assert_equal_shape([idx, gates])
    if _groups(E, R, idx.shape[1]):
        return grouped_expand(z, factors.by_expert("B"), idx, gates, dtype=dtype)
    return expand(from_slots(z.astype(F32), idx, E), factors.B, from_slots(gates[..., None], idx, E)[..., 0], dtype)


def located(factors: Factors, own: dict, stack: tuple[dict, Array] | None) -> Factors:
    """`factors` that know where they lie: `own` are their leaves, `stack` as in `Context`."""
    if stack is None:
        return factors
    leaves, layer = stack
    stacks = {name: leaves[name] for name in "AB" if name in own and getattr(factors, name) is own[name]}
    return factors.replace(stacks=stacks, layer=layer)


def combine(f: Array | None, gates: Array) -> Array | float:
    """`sum_e g_e (f_e - 1)`: what a row factor `f [E, D]` adds to 1 after mixing, `[T, D]` (0 without one)."""
    return 0.0 if f is None else gates @ (f - 1.0)


def to_slots(z: Array, idx: Array) -> Array:
    """`z [T, 1|E, R]` at the token's experts: `[T, K, R]`, 0 at an unused slot (`idx == E`)."""
    if z.shape[1] == 1:
        return jnp.broadcast_to(z, (len(z), idx.shape[1], z.shape[2]))
    hot = idx[:, :, None] == jnp.arange(z.shape[1])
    return jnp.einsum("tke,ter->tkr", hot.astype(z.dtype), z)


def from_slots(z: Array, idx: Array, E: int) -> Array:
    """`z [T, K, R]` back to its experts: `[T, E, R]`, 0 where an expert is not used."""
    hot = idx[:, :, None] == jnp.arange(E)
    return jnp.einsum("tke,tkr->ter", hot.astype(z.dtype), z)
