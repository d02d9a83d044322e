"""What the launchers share: the GPU in numbers, and operands laid out as the kernels read them.

The kernels read 16 bytes at a time. Triton proves that this is allowed from what it knows of strides and limits, so
they are passed in units of `VECTOR` elements: a product with 8 is divisible by 8.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

# Elements of 16 bits in the 16 bytes that one thread copies.
VECTOR = 8


class Device(NamedTuple):
    """What the choice of a kernel depends on."""

    capability: tuple[int, int]
    multiprocessors: int
    amd: bool = False

    @property
    def has_bulk_copies(self) -> bool:
        """Bulk tensor copies (TMA) and the shared memory to make use of them: data-centre Hopper and Blackwell."""
        return not self.amd and self.capability[0] in (9, 10)


@cache
def describe(device: torch.device) -> Device:
    """The GPU that holds a tensor; for the interpreter, which has none, the oldest one served."""
    if device.type != "cuda":
        return Device((8, 0), 108)
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    return Device(torch.cuda.get_device_capability(device), multiprocessors, torch.version.hip is not None)


def aligned(operand_TK: Tensor) -> Tensor:
    """The matrix itself if width, start and pitch are multiples of 16 bytes, else a copy padded with zero columns.

    The copy costs one pass over the operand; reading it 2 bytes at a time would cost the kernel several.
    """
    tokens, width = operand_TK.shape
    pitch = operand_TK.stride(0)
    fits = width % VECTOR == 0 and pitch % VECTOR == 0 and operand_TK.data_ptr() % 16 == 0
    if fits and operand_TK.stride(1) == 1 and pitch >= width:
        return operand_TK
    padded = operand_TK.new_zeros(tokens, width + -width % VECTOR)
    padded[:, :width] = operand_TK
    return padded
