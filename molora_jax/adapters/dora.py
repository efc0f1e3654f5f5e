"""DoRA (Liu et al. 2024, arXiv 2402.09353): magnitude and direction, each output row of the weight on its own.

    W_e = m_e * (W + s B_e A_e) / ||W + s B_e A_e||_row     m_e [D_out] trained, the norm detached (section 4.3)
    W_e x = f_e * (W x) + s (f_e * B_e) A_e x,   f_e = m_e / ||.||_row   (m_e where the row is 0)

E experts, R rank: A [E, R, D_in], B [E, R, D_out], m [E, D_out]; m starts at ||W||_row, so the start changes nothing.
The norm needs no `[D_out, D_in]` per expert: ||w + s b A||^2 = ||w||^2 + 2 s b.(A w) + s^2 b.(A A^T) b.

A row of zeros (a pruned head) has no direction: its m starts at 0 and it stays 0. Where w + s b A nearly cancels, the
sum above is rounding error, maybe below 0; it is kept above float32's share of its parts, so that f stays finite.

With dropout the base term keeps the undropped input (peft recomputes it on the dropped one: a second base product).
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from molora_jax.adapters.lora import Lora


@dataclasses.dataclass(frozen=True)
class Dora(Lora):
    SUBTRACTS: ClassVar[bool] = True  # through Lora's
    LOADS: ClassVar[bool] = False
    ROW_FACTORS: ClassVar[bool] = True  # `Factors.out`: scales the frozen product

    def init_leaves(self, key, site, layer, *, base=None, base_grad=None):
        leaves = super().init_leaves(key, site, layer, base=base, base_grad=base_grad)
        norm = jnp.linalg.norm(base.astype(jnp.float32), axis=0)  # base is [D_in, D_out]: a row of W is a column
        return leaves | {"m": jnp.broadcast_to(norm, (site.experts, site.d_out)) + 0.0}

    def factors(self, p, shared, ctx):
        plain = super().factors(p, shared, ctx)
        norm = row_norm(ctx.base, plain.A, plain.B, self.scale())
        f = p["m"] / jnp.where(norm > 0, norm, 1.0)
        return plain.replace(B=plain.B * f[:, None, :], out=f)


def row_norm(W, A, B, scale):
    """`||W + s B_e A_e||` of every output row, `[E, D_out]`, without a gradient. `W [D_in, D_out]`."""
    W, A, B = jax.lax.stop_gradient((W.astype(jnp.float32), A, B))
    cross = jnp.einsum("erd,do->ero", A, W)
    gram = jnp.einsum("erd,eqd->erq", A, A)
    own = jnp.sum(W * W, axis=0)
    added = scale**2 * jnp.sum(B * jnp.einsum("erq,eqo->ero", gram, B), axis=1)
    square = own + 2 * scale * jnp.sum(B * cross, axis=1) + added
    return jnp.sqrt(jnp.maximum(square, jnp.finfo(jnp.float32).eps * (own + jnp.abs(added))))
