"""PiSSA (Meng et al. 2024, arXiv 2404.02948): the factors start at the principal singular vectors of W.

    W = U S V^T (out x in);   A = sqrt(S_r / s) V_r^T,   B = U_r sqrt(S_r / s);   s B A is the rank-R truncation of W

The paper freezes W - s B A. Here W stays as it is and the start is saved as `A0 [1, R, D_in]`, `B0 [1, R, D_out]`
(one copy for all experts): the adapter adds `s (B A - B0 A0)`, the same function and the same gradients.
"""

import jax.numpy as jnp

NEEDS = ("base",)  # the frozen weight of the site
AWAY = True  # B A is not 0 at the start: A0, B0 hold it, and the adapter takes it off
RANK = "smaller"  # there are as many singular vectors as the smaller width


def init(key, site, rank, *, scale, base=None, base_grad=None):
    """Returns `A [E, R, D_in]`, `B [E, R, D_out]` and the frozen start. `base [D_in, D_out]`; an exact SVD."""
    u, s, vt = jnp.linalg.svd(base.astype(jnp.float32).T, full_matrices=False)
    root = jnp.sqrt(s[:rank] / scale)[:, None]
    A, B = root * vt[:rank], root * u[:, :rank].T
    return {
        "A": jnp.broadcast_to(A, (site.experts, *A.shape)) + 0.0,
        "B": jnp.broadcast_to(B, (site.experts, *B.shape)) + 0.0,
        "A0": A[None],
        "B0": B[None],
    }
