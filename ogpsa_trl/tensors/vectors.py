"""
Vectors as long as a gradient: their products with the basis rows, and what they lose by them.

A gradient of the whole model is far larger than anything computed from it. So it is touched only
here, in float32 and block by block, each block once; everything else happens on small matrices
(`matrices`). No product is one of two matrices, which may be done in TF32 on a GPU, with three
digits.

Shapes:
    N: entries of one parameter held by this process
    K: basis rows
    P: parameters
"""

from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import NamedTuple

import torch
from torch import Tensor

from ogpsa_trl.tensors.blocks import Workspace, blocks_of, in_float32, rows_in_float32
from ogpsa_trl.tensors.matrices import symmetric, triangle_size


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

    def inverse(self, out: Tensor) -> Tensor:
        """The diagonal of D^-1, float32, in the memory of `out`."""
        return torch.sqrt(self.second_moment_N, out=out).add_(self.floor)


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


def products(
    rows_KN: Tensor | None,
    vector_N: Vector,
    metric: AdamMetric | None = None,
    workspace: Workspace | None = None,
) -> Tensor:
    """
    The products of one parameter, or of this process's share of it.

    Args:
        rows_KN: B, any floating dtype; `None`: no rows.
        vector_N: v, any floating dtype.
        metric: D; `None`: no products in a metric.
        workspace: That of other parameters on the device.

    Returns:
        Numbers that add up over the shards: v v^T, v D^-1 v^T, the entries of B v, and the lower
        triangle of B D B^T; without a metric only the first and the third.
    """
    if rows_KN is None:
        target_N = _target(vector_N)
        rows_KN = target_N.new_empty(0, len(target_N))
    workspace = workspace or Workspace()
    return sum_of_blocks(
        [_dots(*block, workspace) for block in _zipped_blocks(vector_N, rows_KN, metric)]
    )


def subtract_(
    vector_N: Vector,
    rows_KN: Tensor,
    weights_K: Tensor,
    metric: AdamMetric | None = None,
    workspace: Workspace | None = None,
) -> None:
    """`vector_N -= D (weights_K @ rows_KN)`, in float32, rounded to its dtype at the end."""
    if not len(rows_KN):
        return
    weights, workspace = weights_K.unbind(), workspace or Workspace()
    for block in _zipped_blocks(vector_N, rows_KN, metric):
        _subtract(*block, weights, workspace)


def _target(vector_N: Vector) -> Tensor:
    """What holds a change of the vector."""
    return vector_N.new_N if isinstance(vector_N, Difference) else vector_N


def _zipped_blocks(
    vector_N: Vector, rows_KN: Tensor, metric: AdamMetric | None
) -> Iterator[tuple[Vector, Sequence[Tensor], AdamMetric | None]]:
    """Blocks of a vector, of each row, and of the metric where there is one."""
    if isinstance(vector_N, Difference):
        vectors = map(Difference, blocks_of(vector_N.new_N), blocks_of(vector_N.old_N))
    else:
        vectors = blocks_of(vector_N)
    if metric is None:
        metrics = repeat(None)
    else:
        metrics = (AdamMetric(moment, metric.floor) for moment in blocks_of(metric.second_moment_N))
    rows = (block.unbind() for block in blocks_of(rows_KN))
    return zip(vectors, rows, metrics, strict=False)


def _dots(
    vector_N: Vector, rows: Sequence[Tensor], metric: AdamMetric | None, workspace: Workspace
) -> list[Tensor]:
    """
    What `products` returns, of one block.

    Scalar products, and none with a matrix of the rows: libraries share the work of that among
    processors by rows, of which there are few (measured: MKL used one core of two).
    """
    rows = rows_in_float32(rows, workspace, num_others=3)
    vector, inverse, scaled = workspace.take(3, _target(vector_N))
    if isinstance(vector_N, Difference):
        vector = torch.sub(in_float32(vector_N.new_N, vector), vector_N.old_N, out=vector)
    else:
        vector = in_float32(vector_N, vector)
    with_rows = [row.dot(vector) for row in rows]
    if metric is None:
        return [vector.dot(vector), *with_rows]
    metric.inverse(out=inverse)
    in_metric = vector.dot(torch.mul(vector, inverse, out=scaled))
    return [vector.dot(vector), in_metric, *with_rows, *triangle(rows, inverse, scaled)]


def triangle(
    rows: Sequence[Tensor], inverse: Tensor | None = None, scaled: Tensor | None = None
) -> Iterator[Tensor]:
    """
    The lower triangle of the Gram matrix of rows, in the metric with this inverse, which takes
    memory for a row.
    """
    for index, row in enumerate(rows):
        factor = row if inverse is None else torch.div(row, inverse, out=scaled)
        for other in rows[: index + 1]:
            yield other.dot(factor)


def sum_of_blocks(blocks: Sequence[Sequence[Tensor]]) -> Tensor:
    """The numbers of each block, added up."""
    numbers = torch.stack([number for block in blocks for number in block])
    return numbers.view(len(blocks), -1).sum(dim=0) if len(blocks) > 1 else numbers


def combination(
    weights: Sequence[Tensor], rows: Sequence[Tensor], out: Tensor | None = None
) -> Tensor:
    """The weighted sum of rows, float32."""
    total = torch.mul(rows[0], weights[0], out=out)
    for weight, row in zip(weights[1:], rows[1:], strict=True):
        total.addcmul_(row, weight)
    return total


def _subtract(
    vector_N: Vector,
    rows: Sequence[Tensor],
    metric: AdamMetric | None,
    weights: Sequence[Tensor],
    workspace: Workspace,
) -> None:
    """What `subtract_` does, to one block."""
    target = _target(vector_N)
    rows = rows_in_float32(rows, workspace, num_others=2)
    total, inverse = workspace.take(2, target)
    if metric is not None:
        combination(weights, rows, out=total)
        target.addcdiv_(total, metric.inverse(out=inverse), value=-1)
    elif isinstance(vector_N, Difference):
        # Row by row, parts below the last digit of a weight would be lost.
        target.sub_(combination(weights, rows, out=total))
    else:  # one operation less than with the sum
        left = in_float32(target, total)
        for weight, row in zip(weights, rows, strict=True):
            left.addcmul_(row, weight, value=-1)
        if left is not target:
            target.copy_(left)
