"""
Vectors as long as a gradient: their products with the basis rows, and what they lose by them.

A gradient of the whole model is far larger than anything computed from it. So it is touched only
here, in float32 and block by block, each block once; everything else happens on small matrices
(`matrices`). No product is one of two matrices, which may be done in TF32 on a GPU, with three
digits.

Shapes:
    N: entries of one parameter held by this process
    R: capability gradients
    K: basis rows
    P: parameters
"""

from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import NamedTuple

import torch
from torch import Tensor

from ogpsa_trl.tensors.matrices import symmetric, triangle_size

# Entries of a vector handled at once. They bound the float32 temporaries, and on a CPU keep them in
# its cache: 2 MiB each. Measured on a CPU: from 2^19 to 2^21 a projection takes the same time; at
# 2^18 the calls cost a twelfth more, at 2^16 a quarter. Sums of long vectors lose less in blocks
# than in one running sum.
_BLOCK = 2**19
_BLOCK_OF_ACCELERATOR = 2**22


class Difference(NamedTuple):
    """
    The vector `new_N - old_N`, of which only blocks are ever in memory, in float32. What changes
    it, changes `new_N`.
    """

    new_N: Tensor
    old_N: Tensor

    def zero_(self) -> None:
        self.new_N.copy_(self.old_N)


Vector = Tensor | Difference


class AdamMetric(NamedTuple):
    """
    The diagonal metric D in which Adam's step is steepest descent, with a floor.

    `D = 1 / (s + floor)` with `s` the root of the second moment. Entries that the training data
    never touches have a second moment near zero; without a floor they would take up the whole
    correction and the step would explode.

    Args:
        second_moment_N: Adam's running mean of squared gradients, float32, not corrected for its
            bias (a common factor of a metric changes no projection).
        floor: A scalar of `adam_floors`.
    """

    second_moment_N: Tensor
    floor: Tensor

    def inverse(self) -> Tensor:
        """The diagonal of D^-1, float32."""
        return self.second_moment_N.sqrt().add_(self.floor)


def adam_floors(means_P: Tensor) -> Tensor:
    """
    The floors of P tensors: the root mean square of `s`, from the means of the second moments. One
    that no gradient has reached has an infinite floor: it takes no part in a correction.
    """
    return torch.where(means_P > 0, means_P.sqrt(), torch.inf)


class Products(NamedTuple):
    """
    Products of a vector v with itself and with the basis rows B, of P parameters, float32.

    Attributes:
        square_P: v v^T.
        inverse_square_P: v D^-1 v^T, not a number where D is zero; `None` without a metric D.
        with_rows_PK: B v.
        gram_PKK: B D B^T; `None` without a metric.
    """

    square_P: Tensor
    inverse_square_P: Tensor | None
    with_rows_PK: Tensor
    gram_PKK: Tensor | None

    @classmethod
    def from_table(cls, table_PX: Tensor, num_rows: int) -> "Products":
        """Tell apart what `products` returned for each parameter, a row each."""
        if table_PX.shape[1] == num_products(num_rows, has_metric=False):
            return cls(table_PX[:, 0], None, table_PX[:, 1:], None)
        sizes = (1, 1, num_rows, triangle_size(num_rows))
        square_P1, inverse_square_P1, with_rows_PK, triangle_PX = table_PX.split(sizes, dim=1)
        return cls(
            square_P1[:, 0], inverse_square_P1[:, 0], with_rows_PK, symmetric(triangle_PX, num_rows)
        )


def num_products(num_rows: int, *, has_metric: bool) -> int:
    """How many numbers `products` returns for a parameter with K rows."""
    return 1 + num_rows + (1 + triangle_size(num_rows) if has_metric else 0)


def products(rows_KN: Tensor | None, vector_N: Vector, metric: AdamMetric | None = None) -> Tensor:
    """
    The products of one parameter, or of this process's share of it.

    Args:
        rows_KN: B, any floating dtype; `None`: no rows.
        vector_N: v, any floating dtype.
        metric: D; `None`: no products in a metric.

    Returns:
        Numbers that add up over the shards: v v^T, v D^-1 v^T, the entries of B v, and the lower
        triangle of B D B^T; without a metric only the first and the third.
    """
    if rows_KN is None:
        target_N = _target(vector_N)
        rows_KN = target_N.new_empty(0, len(target_N))
    return _sum([_dots(*block) for block in _blocks_of(vector_N, rows_KN, metric)])


def squared_length(vector_N: Tensor) -> Tensor:
    """Scalar product of a vector with itself, a float32 scalar. Any floating dtype."""
    blocks = (block.float() for block in _blocks(vector_N))
    return torch.stack([block.dot(block) for block in blocks]).sum()


def gram(rows_KN: Tensor) -> Tensor:
    """
    Scalar products of the rows with each other.

    Args:
        rows_KN: Any floating dtype.

    Returns:
        The lower triangle of the Gram matrix, row by row (see `symmetric`), float32. This process's
        share where the entries are sharded.
    """
    if not len(rows_KN):
        return torch.zeros(0, device=rows_KN.device)
    return _sum([list(_triangle(block.float().unbind())) for block in _blocks(rows_KN)])


def combine_(weights_XR: Tensor, rows_RN: Tensor) -> Tensor:
    """
    Replace rows by linear combinations of them, computed in float32 and rounded to their dtype.

    Returns:
        `weights_XR @ rows_RN`, shape [X, N]: in the memory of the rows where as many come out as
        went in, otherwise in new memory.
    """
    num_rows = len(weights_XR)
    weights = [weights_R.unbind() for weights_R in weights_XR.float()]
    is_in_place = num_rows == len(rows_RN)
    combined_XN = rows_RN if is_in_place else rows_RN.new_empty(num_rows, rows_RN.shape[1])
    blocks = zip(_blocks(combined_XN), _blocks(rows_RN), strict=True)
    for combined, block in blocks:
        _combine_block(combined.unbind(), block.float().unbind(), weights)
    return combined_XN


def subtract_(
    vector_N: Vector, rows_KN: Tensor, weights_K: Tensor, metric: AdamMetric | None = None
) -> None:
    """`vector_N -= D (weights_K @ rows_KN)`, in float32, rounded to its dtype at the end."""
    if not len(rows_KN):
        return
    weights = weights_K.unbind()
    for block in _blocks_of(vector_N, rows_KN, metric):
        _subtract(*block, weights)


def _target(vector_N: Vector) -> Tensor:
    """What holds a change of the vector."""
    return vector_N.new_N if isinstance(vector_N, Difference) else vector_N


def _blocks(values_XN: Tensor) -> Sequence[Tensor]:
    """Blocks of the last dimension. Mostly there is one, and a call is saved."""
    size = _BLOCK if values_XN.device.type == "cpu" else _BLOCK_OF_ACCELERATOR
    return [values_XN] if values_XN.shape[-1] <= size else values_XN.split(size, dim=-1)


def _blocks_of(
    vector_N: Vector, rows_KN: Tensor, metric: AdamMetric | None
) -> Iterator[tuple[Vector, Sequence[Tensor], AdamMetric | None]]:
    """Blocks of a vector, of each row, and of the metric where there is one."""
    if isinstance(vector_N, Difference):
        vectors = map(Difference, _blocks(vector_N.new_N), _blocks(vector_N.old_N))
    else:
        vectors = _blocks(vector_N)
    if metric is None:
        metrics = repeat(None)
    else:
        metrics = (AdamMetric(moment, metric.floor) for moment in _blocks(metric.second_moment_N))
    rows = (block.unbind() for block in _blocks(rows_KN))
    return zip(vectors, rows, metrics, strict=False)


def _dots(vector_N: Vector, rows: Sequence[Tensor], metric: AdamMetric | None) -> list[Tensor]:
    """
    What `products` returns, of one block.

    Scalar products, and none with a matrix of the rows: libraries share the work of that among
    processors by rows, of which there are few (measured: MKL used one core of two).
    """
    if isinstance(vector_N, Difference):
        vector = vector_N.new_N.float() - vector_N.old_N.float()
    else:
        vector = vector_N.float()
    rows = _float(rows)
    with_rows = [row.dot(vector) for row in rows]
    if metric is None:
        return [vector.dot(vector), *with_rows]
    inverse = metric.inverse()
    return [
        vector.dot(vector),
        vector.dot(vector * inverse),
        *with_rows,
        *_triangle(rows, inverse),
    ]


def _triangle(rows: Sequence[Tensor], inverse: Tensor | None = None) -> Iterator[Tensor]:
    """The lower triangle of the Gram matrix of rows, in the metric with this inverse."""
    for index, row in enumerate(rows):
        scaled = row if inverse is None else row / inverse
        for other in rows[: index + 1]:
            yield other.dot(scaled)


def _float(rows: Sequence[Tensor]) -> list[Tensor]:
    return [row.float() for row in rows]


def _sum(blocks: Sequence[Sequence[Tensor]]) -> Tensor:
    """The numbers of each block, added up."""
    numbers = torch.stack([number for block in blocks for number in block])
    return numbers.view(len(blocks), -1).sum(dim=0) if len(blocks) > 1 else numbers


def _combination(weights: Sequence[Tensor], rows: Sequence[Tensor]) -> Tensor:
    """The weighted sum of rows, float32."""
    total = rows[0] * weights[0]
    for weight, row in zip(weights[1:], rows[1:], strict=True):
        total.addcmul_(row, weight)
    return total


def _subtract(
    vector_N: Vector,
    rows: Sequence[Tensor],
    metric: AdamMetric | None,
    weights: Sequence[Tensor],
) -> None:
    """What `subtract_` does, to one block."""
    target = _target(vector_N)
    rows = _float(rows)
    if metric is not None:
        target.addcdiv_(_combination(weights, rows), metric.inverse(), value=-1)
    elif isinstance(vector_N, Difference):
        # Row by row, parts below the last digit of a weight would be lost.
        target.sub_(_combination(weights, rows))
    else:  # one operation and one temporary less than with the sum
        left = target.float()
        for weight, row in zip(weights, rows, strict=True):
            left.addcmul_(row, weight, value=-1)
        if left is not target:
            target.copy_(left)


def _combine_block(
    combined: Sequence[Tensor], rows: Sequence[Tensor], weights: Sequence[Sequence[Tensor]]
) -> None:
    """Write weighted sums of rows, all of them computed before the first is written."""
    sums = [_combination(weights_R, rows) for weights_R in weights]
    for row, sum_ in zip(combined, sums, strict=True):
        row.copy_(sum_)
