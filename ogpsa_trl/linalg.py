"""
Pure tensor functions of the method: Gram matrices, orthonormal bases, projection.

A gradient of the whole model is far larger than anything computed from it. So it is touched only by
the three functions that take vectors of length N (`dot`, `combine`, `subtract_`), in float32 and
block by block; everything else happens on R x R matrices, in float64 on the CPU.

Shapes:
    N: entries of one parameter held by this process
    R: capability gradients
    K: basis rows, K <= R; a direction that is not independent of the others is a row of zeros
    B: blocks, one subspace each: every parameter (scope "parameter") or one (scope "model")
"""

import itertools

import torch
from torch import Tensor

# Entries of a vector handled at once. Bounds the float32 temporaries that a bfloat16 operand needs,
# and sums long vectors in blocks, which loses less precision than one running sum.
_BLOCK = 2**22

# Two gradients are dependent when the squared sine of their angle is below this. The Gram matrix is
# computed in float32, so smaller eigenvalues are rounding.
_DEPENDENT = 1e-6


def dot(rows_KN: Tensor, vector_N: Tensor) -> Tensor:
    """
    Scalar products of the rows with a vector, accumulated in float32.

    Args:
        rows_KN: Any floating dtype.
        vector_N: Any floating dtype.

    Returns:
        Shape [K], float32. This process's share where the entries are sharded.
    """
    total_K = torch.zeros(len(rows_KN), dtype=torch.float32, device=vector_N.device)
    for rows, vector in zip(rows_KN.split(_BLOCK, dim=1), vector_N.split(_BLOCK), strict=True):
        total_K += rows.float() @ vector.float()
    return total_K


def gram(rows_KN: Tensor, metric_N: Tensor | None = None) -> Tensor:
    """
    Scalar products of the rows with each other, `B D B^T` with a diagonal metric D.

    Matrix-vector products, not one matrix product: those may run in TF32, with three digits.

    Args:
        rows_KN: Any floating dtype.
        metric_N: The diagonal of D, float32. `None` is the identity.

    Returns:
        Shape [K, K], float32. This process's share where the entries are sharded.
    """
    gram_KK = torch.zeros(len(rows_KN), len(rows_KN), device=rows_KN.device)
    for products_K, row_N in zip(gram_KK, rows_KN, strict=True):
        products_K.copy_(dot(rows_KN, row_N if metric_N is None else metric_N * row_N))
    return gram_KK


def combine(weights_KR: Tensor, rows_RN: Tensor, dtype: torch.dtype) -> Tensor:
    """
    Linear combinations of the rows.

    Returns:
        `weights_KR @ rows_RN`, shape [K, N], computed in float32 and rounded to `dtype`.
    """
    combined_KN = torch.zeros(len(weights_KR), rows_RN.shape[1], dtype=dtype, device=rows_RN.device)
    for target, rows in zip(
        combined_KN.split(_BLOCK, dim=1), rows_RN.split(_BLOCK, dim=1), strict=True
    ):
        for target_row, weights_R in zip(target, weights_KR.float(), strict=True):
            target_row.copy_(weights_R @ rows.float())
    return combined_KN


def subtract_(
    vector_N: Tensor, rows_KN: Tensor, weights_K: Tensor, metric_N: Tensor | None = None
) -> None:
    """`vector_N -= D (weights_K @ rows_KN)`, in float32, rounded once to the vector's dtype."""
    metrics = metric_N.split(_BLOCK) if metric_N is not None else itertools.repeat(None)
    blocks = zip(vector_N.split(_BLOCK), rows_KN.split(_BLOCK, dim=1), strict=True)
    for (vector, rows), metric in zip(blocks, metrics, strict=False):
        if metric is not None:
            vector.copy_(vector.float() - metric * (rows.float().T @ weights_K))
        elif vector.dtype == torch.float32:
            vector.addmv_(rows.float().T, weights_K, alpha=-1)
        else:
            vector.copy_(torch.addmv(vector.float(), rows.float().T, weights_K, alpha=-1))


def orthonormal_weights(gram_BRR: Tensor, rank: int | None = None) -> Tensor:
    """
    Weights that turn capability gradients into the orthonormal basis of their span, strongest
    direction first.

    With A the stacked gradients (rows), G = A A^T and the singular value decomposition A = U S V^T,
    the rows of V^T are the basis. G is enough to find W with W A = V^T:

    1. The rows are scaled to length one, so that a group with a small gradient counts as much as
    one with a large one
       when independence is decided: C = D G D, C = E L E^T, and Q = L^-1/2 E^T D A is orthonormal.
    2. In the coordinates of Q the gradients are the small matrix A Q^T = G D E L^-1/2, whose right
    singular vectors
       turn Q into V^T, in the order of S.

    Args:
        gram_BRR: Gram matrices of the capability gradients, one per block. Positive semidefinite.
        rank: Directions to keep, at least 1. `None` keeps all independent ones.

    Returns:
        Weights, shape [B, K, R], float64 on the CPU, K the largest number of directions kept in any
        block. Rows beyond the number of directions of a block are zero.
    """
    gram_BRR = gram_BRR.cpu().double()
    length_BR = gram_BRR.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    inverse_BR = torch.where(length_BR > 0, 1 / length_BR, 0.0)
    eigenvalues_BR, vectors_BRR = torch.linalg.eigh(
        inverse_BR[..., None] * gram_BRR * inverse_BR[:, None]
    )
    is_independent_BR = eigenvalues_BR > _DEPENDENT
    inverse_root_BR = torch.where(
        is_independent_BR, eigenvalues_BR.clamp_min(_DEPENDENT).rsqrt(), 0.0
    )
    weights_BRR = inverse_root_BR[..., None] * vectors_BRR.mT * inverse_BR[:, None]
    _, _, rotation_BRR = torch.linalg.svd(gram_BRR @ weights_BRR.mT)
    weights_BRR = rotation_BRR @ weights_BRR

    kept_B = is_independent_BR.sum(dim=-1).clamp_max(
        rank if rank is not None else gram_BRR.shape[-1]
    )
    num_rows = int(kept_B.max()) if len(kept_B) else 0
    is_kept_BK = torch.arange(num_rows) < kept_B[:, None]
    return weights_BRR[:, :num_rows] * is_kept_BK[..., None]


def inverse_gram(gram_BKK: Tensor) -> Tensor:
    """
    Inverse of the Gram matrices of stored basis rows, zero for rows of zeros.

    The rows are orthonormal up to rounding (all of it in the storage dtype), so the eigenvalues are
    near 1 or exactly
    0. With this matrix between `dot` and `subtract_` the projection is exact for the rows as they
    are stored.

    Returns:
        Shape [B, K, K], float64 on the CPU.
    """
    return torch.linalg.pinv(gram_BKK.cpu().double(), rtol=0.1, hermitian=True)


def adam_metric(second_moment_N: Tensor, mean: Tensor) -> Tensor:
    """
    The diagonal metric in which Adam's step is steepest descent, with a floor.

    Entries that the training data never touches have a second moment near zero; without a floor
    they would take up the whole correction and the step would explode.

    Args:
        second_moment_N: Adam's running mean of squared gradients, not corrected for its bias
            (a common factor of a metric changes no projection).
        mean: Its mean over the whole tensor, a scalar.

    Returns:
        `1 / (s + rms(s))` with `s` the root of the second moment, shape [N], float32. Zero for a
        tensor that no gradient has reached: it takes no part in a correction.
    """
    mean = mean.float()
    metric_N = 1 / (second_moment_N.float().sqrt() + mean.sqrt())
    return torch.where(mean > 0, metric_N, torch.zeros_like(metric_N))
