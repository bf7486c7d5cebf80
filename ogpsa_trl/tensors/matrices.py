"""
Small matrices of the method: orthonormal bases from Gram matrices, and what is computed in them.

R x R for each parameter at most, and in float64 on the CPU, but where a step must not wait for the
device. What is as long as a gradient is in `vectors`.

Shapes:
    P: parameters
    R: capability gradients
    K: basis rows, K <= R; a direction that is not independent of the others is a row of zeros
    B: blocks, one subspace each: every parameter (scope "parameter") or one (scope "model")
"""

from collections.abc import Sequence

import torch
from torch import Tensor

# Two gradients are dependent when the squared sine of their angle is below this: smaller
# eigenvalues are rounding, of the Gram matrix in float32, or of the rows in bfloat16 (to 2^-9 each,
# by which two parallel rows part to 1.3e-6).
_DEPENDENT = {torch.float32: 1e-6, torch.bfloat16: 1e-5}


def table(numbers: Sequence[Tensor | None], width: int, device: torch.device) -> Tensor:
    """A row for each parameter's numbers, filled up with zeros, shape [P, width], float32."""
    zeros = torch.zeros(width, device=device)
    filled = [
        part for row in numbers for part in ((zeros,) if row is None else (row, zeros[len(row) :]))
    ]
    return torch.cat(filled).view(len(numbers), width)


def triangle_size(num_rows: int) -> int:
    """Entries of the lower triangle of a matrix of K rows."""
    return num_rows * (num_rows + 1) // 2


def symmetric(triangle_X: Tensor, num_rows: int) -> Tensor:
    """The symmetric matrices with these lower triangles: [..., X] -> [..., K, K]."""
    row, column = torch.tril_indices(num_rows, num_rows, device=triangle_X.device)
    matrix_KK = triangle_X.new_empty(*triangle_X.shape[:-1], num_rows, num_rows)
    matrix_KK[..., row, column] = triangle_X
    matrix_KK[..., column, row] = triangle_X
    return matrix_KK


def without_short_rows(gram_BRR: Tensor, num_entries_B: Tensor) -> Tensor:
    """
    Gram matrices in which gradients too short for the squares of float32 count as zero.

    Squares of single entries below 1e-38 are lost, or lose digits. What all entries can lose by
    that is rounding if their root mean square is 3e-16 at least; below, the Gram matrix says
    nothing of the directions, and a basis made with it would not be orthonormal.

    Args:
        gram_BRR: From `gradient_rows.gram`, summed over the shards, float64.
        num_entries_B: Over how many entries, float64.
    """
    limits = torch.finfo(torch.float32)
    is_long_BR = gram_BRR.diagonal(dim1=-2, dim2=-1) > (
        num_entries_B[:, None] * limits.tiny / limits.eps
    )
    return gram_BRR * is_long_BR[..., None] * is_long_BR[:, None]


def orthonormal_weights(
    gram_BRR: Tensor, rank: int | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """
    Weights that turn capability gradients into the orthonormal basis of their span, strongest
    direction first.

    With A the stacked gradients (rows), G = A A^T and the singular value decomposition A = U S V^T,
    the rows of V^T are the basis. G is enough to find W with W A = V^T:

    1. The rows are scaled to length one, so that a group with a small gradient counts as much as
       one with a large one when independence is decided: C = D G D, C = E L E^T, and
       Q = L^-1/2 E^T D A is orthonormal.
    2. In the coordinates of Q the gradients are the small matrix A Q^T = G D E L^-1/2, whose right
       singular vectors turn Q into V^T, in the order of S.

    Args:
        gram_BRR: Gram matrices of the capability gradients, one per block. Positive semidefinite.
        rank: Directions to keep, at least 1. `None` keeps all independent ones.
        dtype: That of the gradients' storage: what their rounding makes of dependent ones is none.

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
    is_independent_BR = eigenvalues_BR > _DEPENDENT[dtype]
    inverse_root_BR = torch.where(
        is_independent_BR, eigenvalues_BR.clamp_min(_DEPENDENT[dtype]).rsqrt(), 0.0
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
    near 1 or exactly 0. With this matrix between `vectors.products` and
    `vectors.subtract_` the projection is exact for the rows as they are stored.

    Returns:
        Shape [B, K, K], float64 on the CPU.
    """
    return torch.linalg.pinv(gram_BKK.cpu().double(), rtol=0.1, hermitian=True)


def times(matrix_BXK: Tensor, vector_BK: Tensor) -> Tensor:
    """Matrix times vector for every block, shape [B, X]."""
    return (matrix_BXK @ vector_BK[..., None]).squeeze(-1)


def square(vector_BK: Tensor, matrix_BKK: Tensor) -> Tensor:
    """Sum of v M v^T over the blocks, a scalar."""
    return (vector_BK * times(matrix_BKK, vector_BK)).sum()
