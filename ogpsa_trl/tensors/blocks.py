"""
Vectors as long as a gradient, block by block, in float32: what bounds the memory of doing so.

Shapes: N entries of one parameter held by this process, K rows.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

# Entries of a vector handled at once. They bound the float32 temporaries, and on a CPU keep them in
# its cache: half a MiB each. Measured on a CPU: at 2^19 a projection of the update takes a quarter
# longer, at 2^16 the calls cost as much. Sums of long vectors lose less in blocks than in one
# running sum.
BLOCK = 2**17
BLOCK_OF_ACCELERATOR = 2**22


class Workspace:
    """
    Memory for the float32 temporaries of a block, used again for each block of each parameter.

    Measured on a CPU: in fresh memory each time the products in Adam's metric take twice as long.
    """

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []

    def take(self, number: int, like_N: Tensor) -> list[Tensor]:
        """So many vectors, float32, on the device and of the length of a block."""
        size = len(like_N)
        if self._buffers and len(self._buffers[0]) < size:
            self._buffers.clear()
        length = len(self._buffers[0]) if self._buffers else size
        while len(self._buffers) < number:
            self._buffers.append(like_N.new_empty(length, dtype=torch.float32))
        return [buffer[:size] for buffer in self._buffers[:number]]


def blocks_of(values_XN: Tensor) -> Sequence[Tensor]:
    """Blocks of the last dimension. Mostly there is one, and a call is saved."""
    size = BLOCK if values_XN.device.type == "cpu" else BLOCK_OF_ACCELERATOR
    return [values_XN] if values_XN.shape[-1] <= size else values_XN.split(size, dim=-1)


def in_float32(values_N: Tensor, memory_N: Tensor) -> Tensor:
    """Values in float32, where they are or in this memory."""
    return values_N if values_N.dtype == torch.float32 else memory_N.copy_(values_N)


def rows_in_float32(
    rows: Sequence[Tensor], workspace: Workspace, num_others: int = 0
) -> Sequence[Tensor]:
    """Rows in float32, where they are or in a workspace, behind others that are taken of it."""
    if not rows or rows[0].dtype == torch.float32:
        return rows
    return list(map(in_float32, rows, workspace.take(num_others + len(rows), rows[0])[num_others:]))
