"""
What a refresh does with rows as long as a gradient: takes new ones in, measures and combines them.

Shapes: N entries of one parameter held by this process, R capability gradients, K basis rows.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ogpsa_trl.tensors.blocks import Workspace, blocks_of, in_float32, rows_in_float32
from ogpsa_trl.tensors.vectors import combination, sum_of_blocks, triangle


def squared_length(vector_N: Tensor) -> Tensor:
    """Scalar product of a vector with itself, a float32 scalar. Any floating dtype."""
    blocks = (block.float() for block in blocks_of(vector_N))
    return torch.stack([block.dot(block) for block in blocks]).sum()


def gram(rows_KN: Tensor, workspace: Workspace | None = None) -> Tensor:
    """
    Scalar products of the rows with each other.

    Args:
        rows_KN: Any floating dtype.
        workspace: That of other parameters on the device.

    Returns:
        The lower triangle of the Gram matrix, row by row (see `symmetric`), float32. This process's
        share where the entries are sharded.
    """
    if not len(rows_KN):
        return torch.zeros(0, device=rows_KN.device)
    workspace = workspace or Workspace()
    return sum_of_blocks(
        [list(triangle(rows_in_float32(block.unbind(), workspace))) for block in blocks_of(rows_KN)]
    )


def mix_(row_N: Tensor, new_N: Tensor, old_share: float, workspace: Workspace) -> None:
    """Replace a row by a mean of it and a new one, computed in float32, rounded to its dtype."""
    for row, new in zip(blocks_of(row_N), blocks_of(new_N), strict=True):
        (memory,) = workspace.take(1, row)
        mean = torch.mul(in_float32(row, memory), old_share, out=memory)
        row.copy_(mean.add_(new, alpha=1 - old_share))


def combine_(weights_XR: Tensor, rows_RN: Tensor, workspace: Workspace | None = None) -> Tensor:
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
    workspace = workspace or Workspace()
    for combined, block in zip(blocks_of(combined_XN), blocks_of(rows_RN), strict=True):
        _combine_block(combined.unbind(), block.unbind(), weights, workspace)
    return combined_XN


def _combine_block(
    combined: Sequence[Tensor],
    rows: Sequence[Tensor],
    weights: Sequence[Sequence[Tensor]],
    workspace: Workspace,
) -> None:
    """Write weighted sums of rows, all of them computed before the first is written."""
    rows = rows_in_float32(rows, workspace, num_others=len(weights))
    memory = workspace.take(len(weights), rows[0])
    sums = [combination(w_R, rows, out) for w_R, out in zip(weights, memory, strict=True)]
    for row, sum_ in zip(combined, sums, strict=True):
        row.copy_(sum_)
