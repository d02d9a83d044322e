"""What decides the memory of a step besides the model."""

from __future__ import annotations

import os
from dataclasses import dataclass

from .device import Device
from .packed import Packing

# Assumed (2026-11): what the CUDA driver takes for a process outside of PyTorch's allocator, and cuBLAS as workspace.
CUDA_CONTEXT = 640 * 2**20


@dataclass(frozen=True)
class Setting:
    """What decides the memory of a step besides the model.

    Args:
        device: where it runs.
        sequences: in a batch of one process.
        tokens: in a sequence.
        optimizer: as in `optim` of a run.
        checkpointing: whether layers are recomputed in backward.
        accumulation: batches to one update.
        packing: how the frozen weights are packed; None: not.
        processes: that train together.
        sharded: whether each of them keeps its part of the weights only, as under FSDP2 or ZeRO-3.
        task: of the run.
        loaded_sharded: whether it does so before the training, too, as under ZeRO-3; else blocks are chosen on the
            whole model.
    """

    device: Device = Device()
    sequences: int = 1
    tokens: int = 512
    optimizer: str = "adamw_torch"
    checkpointing: bool = False
    accumulation: int = 1
    packing: Packing | None = None
    processes: int = 1
    sharded: bool = False
    loaded_sharded: bool = False
    task: str = "sft"

    @property
    def shares(self) -> bool:
        """Whether weights are shared among processes."""
        return self.sharded and self.processes > 1

    @property
    def runtime(self) -> int:
        """Bytes that the device's own runtime takes; assumed."""
        return CUDA_CONTEXT if self.device.type == "cuda" else 0


def from_environment() -> tuple[int, bool, bool]:
    """How many processes `accelerate launch` or `torchrun` has started, whether they share the weights in training,
    and whether they do from the beginning."""
    partitioned = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3"
    sharded = partitioned or os.environ.get("ACCELERATE_USE_FSDP") == "true"
    return int(os.environ.get("WORLD_SIZE", "1")), sharded, partitioned
