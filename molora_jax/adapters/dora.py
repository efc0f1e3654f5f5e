"""DoRA (Liu et al. 2024, arXiv 2402.09353): magnitude and direction, each output row of the weight on its own.

    W_e = m_e * (W + s B_e A_e) / ||W + s B_e A_e||_row     m_e [D_out] trained, the norm detached (section 4.3)
    W_e x = f_e * (W x) + s (f_e * B_e) A_e x,   f_e = m_e / ||.||_row

E experts, R rank: A [E, R, D_in], B [E, R, D_out], m [E, D_out]; m starts at ||W||_row, so the start changes nothing.
The norm needs no `[D_out, D_in]` per expert: ||w + s b A||^2 = ||w||^2 + 2 s b.(A w) + s^2 b.(A A^T) b.

With dropout the base term keeps the undropped input (peft recomputes it on the dropped one: a second base product).
"""

import dataclasses

import jax
import jax.numpy as jnp

from molora_jax.adapters.lora import Lora


@dataclasses.dataclass(frozen=True)
class Dora(Lora):
    def init_leaves(self, key, site, layer, *, base=None, base_grad=None):
        leaves = super().init_leaves(key, site, layer, base=base, base_grad=base_grad)
        norm = jnp.linalg.norm(base.astype(jnp.float32), axis=0)  # base is [D_in, D_out]: a row of W is a column
        return leaves | {"m": jnp.broadcast_to(norm, (site.experts, site.d_out)) + 0.0}

    def factors(self, p, shared, ctx):
        plain = super().factors(p, shared, ctx)
        f = p["m"] / row_norm(ctx.base, plain.A, plain.B, self.scale())
        return plain.replace(B=plain.B * f[:, None, :], out=f)


def row_norm(W, A, B, scale):
    """`||W + s B_e A_e||` of every output row, `[E, D_out]`, without a gradient. `W [D_in, D_out]`."""
    W, A, B = jax.lax.stop_gradient((W.astype(jnp.float32), A, B))
    cross = jnp.einsum("erd,do->ero", A, W)
    gram = jnp.einsum("erd,eqd->erq", A, A)
    change = 2 * scale * cross + scale**2 * jnp.einsum("erq,eqo->ero", gram, B)
    square = jnp.sum(W * W, axis=0) + jnp.sum(B * change, axis=1)
    return jnp.sqrt(square)
