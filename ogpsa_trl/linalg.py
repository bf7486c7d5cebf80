"""
Pure tensor functions of the method: Gram matrices, orthonormal bases, projection.

A gradient of the whole model is far larger than anything computed from it. So it is touched only by
the functions that take vectors of length N, in float32 and block by block, each block once;
everything else happens on R x R matrices, in float64 on the CPU.

Shapes:
    N: entries of one parameter held by this process
    R: capability gradients
    K: basis rows, K <= R; a direction that is not independent of the others is a row of zeros
    B: blocks, one subspace each: every parameter (scope "parameter") or one (scope "model")
"""

from collections.abc import Iterator
from itertools import repeat
from typing import NamedTuple

import torch
from torch import Tensor

# Entries of a vector handled at once. They bound the float32 temporaries, and on a CPU keep them in
# its cache: 1 MiB each. Measured on a CPU: from 2^16 to 2^20 all operations are within a fifth of
# their best, and beyond, those with temporaries take three times as long. Sums of long vectors lose
# less in blocks than in one running sum.
_BLOCK = 2**18
_BLOCK_OF_ACCELERATOR = 2**22

# Two gradients are dependent when the squared sine of their angle is below this: smaller
# eigenvalues are rounding, of the Gram matrix in float32, or of the rows in bfloat16 (to 2^-9 each,
# by which two parallel rows part to 1.3e-6).
_DEPENDENT = {torch.float32: 1e-6, torch.bfloat16: 1e-5}


class AdamMetric(NamedTuple):
    """
    The diagonal metric D in which Adam's step is steepest descent, with a floor.

    `D = 1 / (s + rms(s))` with `s` the root of the second moment. Entries that the training data
    never touches have a second moment near zero; without a floor they would take up the whole
    correction and the step would explode. Zero for a tensor that no gradient has reached: it takes
    no part in a correction.

    Args:
        second_moment_N: Adam's running mean of squared gradients, float32, not corrected for its
            bias (a common factor of a metric changes no projection).
        mean: Its mean over the whole tensor, a scalar.
    """

    second_moment_N: Tensor
    mean: Tensor

    def inverse(self) -> Iterator[Tensor]:
        """The diagonal of D^-1, block by block, float32; infinite where D is zero."""
        floor = torch.where(self.mean > 0, self.mean.float().sqrt(), torch.inf)
        for second_moment in self.second_moment_N.split(_block_size(self.second_moment_N)):
            yield second_moment.sqrt().add_(floor)


class Products(NamedTuple):
    """
    Products of a vector v with the basis rows B and with itself, float32; of P parameters at once,
    with a dimension in front.

    Attributes:
        with_rows: B v, shape [K].
        square: v v^T, a scalar.
        inverse_square: v D^-1 v^T, a scalar; `None` without a metric D.
        gram: B D B^T, shape [K, K]; `None` without a metric.
    """

    with_rows: Tensor
    square: Tensor
    inverse_square: Tensor | None
    gram: Tensor | None

    @classmethod
    def views(cls, stacked_PX: Tensor, num_rows: int) -> "Products":
        """
        Views of what is summed over the shards in one call.

        Args:
            stacked_PX: X is `num_rows + 1`, or with a metric `num_rows + 2 + num_rows^2`.
            num_rows: K.
        """
        with_rows, square = stacked_PX[:, :num_rows], stacked_PX[:, num_rows]
        if stacked_PX.shape[1] == num_rows + 1:
            return cls(with_rows, square, None, None)
        gram_PKK = stacked_PX[:, num_rows + 2 :].unflatten(1, (num_rows, num_rows))
        return cls(with_rows, square, stacked_PX[:, num_rows + 1], gram_PKK)

    def of(self, index: int) -> "Products":
        """Those of one parameter."""
        inverse_square = None if self.inverse_square is None else self.inverse_square[index]
        gram_KK = None if self.gram is None else self.gram[index]
        return Products(self.with_rows[index], self.square[index], inverse_square, gram_KK)


def add_products_(
    products: Products, rows_KN: Tensor | None, vector_N: Tensor, metric: AdamMetric | None = None
) -> None:
    """
    Add the products of one parameter, or of this process's share of it.

    Args:
        products: What is added to. Where D is zero, `inverse_square` is not a number.
        rows_KN: B, any floating dtype; `None`: zeros.
        vector_N: v, any floating dtype.
        metric: D; `None`: no products in a metric.
    """
    size = _block_size(vector_N)
    all_rows = repeat(None) if rows_KN is None else rows_KN.split(size, dim=1)
    inverses = repeat(None) if metric is None else metric.inverse()
    for vector, rows, inverse in zip(vector_N.split(size), all_rows, inverses, strict=False):
        vector = vector.float()
        products.square.add_(vector.dot(vector))
        if inverse is not None and products.inverse_square is not None:
            products.inverse_square.add_((vector * inverse).dot(vector))
        if rows is None:
            continue
        rows = rows.float()
        products.with_rows.addmv_(rows, vector)
        if inverse is not None and products.gram is not None:
            products.gram.add_(_matmul(rows / inverse, rows.T))


def squared_length(vector_N: Tensor) -> Tensor:
    """Scalar product of a vector with itself, a float32 scalar. Any floating dtype."""
    blocks = (block.float() for block in vector_N.split(_block_size(vector_N)))
    return torch.stack([block.dot(block) for block in blocks]).sum()


def gram(rows_KN: Tensor) -> Tensor:
    """
    Scalar products of the rows with each other.

    Args:
        rows_KN: Any floating dtype.

    Returns:
        Shape [K, K], float32. This process's share where the entries are sharded.
    """
    gram_KK = torch.zeros(len(rows_KN), len(rows_KN), device=rows_KN.device)
    for rows in rows_KN.split(_block_size(rows_KN), dim=1):
        rows = rows.float()
        gram_KK += _matmul(rows, rows.T)
    return gram_KK


def without_short_rows(gram_BRR: Tensor, num_entries_B: Tensor) -> Tensor:
    """
    Gram matrices in which gradients too short for the squares of float32 count as zero.

    Squares of single entries below 1e-38 are lost, or lose digits. What all entries can lose by
    that is rounding if their root mean square is 3e-16 at least; below, the Gram matrix says
    nothing of the directions, and a basis made with it would not be orthonormal.

    Args:
        gram_BRR: From `gram`, summed over the shards, float64.
        num_entries_B: Over how many entries, float64.
    """
    limits = torch.finfo(torch.float32)
    is_long_BR = gram_BRR.diagonal(dim1=-2, dim2=-1) > (
        num_entries_B[:, None] * limits.tiny / limits.eps
    )
    return gram_BRR * is_long_BR[..., None] * is_long_BR[:, None]


def combine_(weights_XR: Tensor, rows_RN: Tensor) -> Tensor:
    """
    Replace rows by linear combinations of them, computed in float32 and rounded to their dtype.

    Returns:
        `weights_XR @ rows_RN`, shape [X, N]: in the memory of the rows where as many come out as
        went in, otherwise in new memory.
    """
    num_rows, size = len(weights_XR), _block_size(rows_RN)
    is_in_place = num_rows == len(rows_RN)
    combined_XN = rows_RN if is_in_place else rows_RN.new_empty(num_rows, rows_RN.shape[1])
    blocks = zip(combined_XN.split(size, dim=1), rows_RN.split(size, dim=1), strict=True)
    for combined, rows in blocks:
        combined.copy_(_matmul(weights_XR.float(), rows.float()))
    return combined_XN


def subtract_(
    vector_N: Tensor, rows_KN: Tensor, weights_K: Tensor, metric: AdamMetric | None = None
) -> None:
    """`vector_N -= D (weights_K @ rows_KN)`, in float32, rounded once to the vector's dtype."""
    size = _block_size(vector_N)
    inverses = repeat(None) if metric is None else metric.inverse()
    blocks = zip(vector_N.split(size), rows_KN.split(size, dim=1), inverses, strict=False)
    for vector, rows, inverse in blocks:
        rows, exact = rows.float(), vector.float()
        if inverse is None:
            exact.addmv_(rows.T, weights_K, alpha=-1)
        else:
            exact.addcdiv_(rows.T @ weights_K, inverse, value=-1)
        if exact is not vector:
            vector.copy_(exact)


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
    near 1 or exactly 0. With this matrix between `add_products_` and `subtract_` the projection is
    exact for the rows as they are stored.

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


def _block_size(like: Tensor) -> int:
    return _BLOCK if like.device.type == "cpu" else _BLOCK_OF_ACCELERATOR


def _matmul(left_XR: Tensor, right_RY: Tensor) -> Tensor:
    """
    Matrix product in float32. On a GPU row by row: a product of matrices may run in TF32 there,
    with three digits, a product with a vector does not.
    """
    if left_XR.device.type == "cpu":
        return left_XR @ right_RY
    return torch.stack([row_R @ right_RY for row_R in left_XR])
