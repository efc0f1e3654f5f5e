"""Low-rank products and their best rank-R form, in float64 on the host.

    P = B^T A,   A [N, D_in], B [N, D_out] (rank-major);   sqrt(S_R) V_R^T and sqrt(S_R) U_R^T of P = U S V^T

numpy: what works on finished weights is not traced.
"""

import numpy as np


def update(A: np.ndarray, B: np.ndarray) -> np.ndarray:
    """The weight change `[D_out, D_in]` that the rows of A and B write out."""
    return np.asarray(B, np.float64).T @ np.asarray(A, np.float64)


def truncated(A: np.ndarray, B: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """`(A [rank, D_in], B [rank, D_out])` of the product of `A [N, D_in]`, `B [N, D_out]`, nearest in every unitarily
    invariant norm. `[D_out, D_in]` is never formed: the SVD is of the product of two triangles."""
    qa, ra = np.linalg.qr(np.asarray(A, np.float64).T)
    qb, rb = np.linalg.qr(np.asarray(B, np.float64).T)
    u, s, vt = np.linalg.svd(rb @ ra.T, full_matrices=False)
    return _halves(qb @ u, s, (qa @ vt.T).T, rank)


def factors_of(change: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The same of a whole change `[D_out, D_in]`.

    By the eigenvectors of the smaller Gram matrix, several times faster than an SVD of 576 x 1536; it squares, so
    singular values below 1e-8 of the largest are rounding error.
    """
    P = np.asarray(change, np.float64)
    turned = P.shape[0] > P.shape[1]
    P = P.T if turned else P
    values, vectors = np.linalg.eigh(P @ P.T)
    s = np.sqrt(np.maximum(values[::-1], 0.0))
    own = int(np.sum(s[:rank] > 1e-8 * s[0]))
    u, s = vectors[:, ::-1][:, :own], s[:own]
    A, B = _halves(u, s, (u.T @ P) / s[:, None], rank)
    return (B, A) if turned else (A, B)


def _halves(u, s, vt, rank):
    """Rows beyond the matrix's own rank are zero."""
    A, B = np.zeros((rank, vt.shape[1])), np.zeros((rank, u.shape[0]))
    own = min(rank, len(s))
    root = np.sqrt(s[:own])[:, None]
    A[:own], B[:own] = root * vt[:own], root * u[:, :own].T
    return A, B
