"""Weights that are not all here: sharded over processes, offloaded between calls, or not loaded at all.

Nothing here imports an engine: a tensor or a hook of one tells by itself where it came from.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

# Names that engines put into the path of a module they wrap, and take out of the keys of a state dict.
_WRAPPED = {"_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def plain_name(name: str) -> str:
    """A module's path without the wrappers of engines: the one that keys of state dicts start with."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPED)


def is_dtensor(tensor: Tensor) -> bool:
    """Whether FSDP2 or tensor parallelism keeps this tensor in parts."""
    module = sys.modules.get("torch.distributed.tensor")  # without it there can be none
    return module is not None and isinstance(tensor, module.DTensor)


def why_absent(weight: Tensor) -> str | None:
    """Why the values of a weight cannot be read here as they stand; None where they can."""
    if weight.is_meta:
        return "on the meta device"
    if is_dtensor(weight):
        return "sharded over processes (a DTensor of FSDP2 or tensor parallelism)"
    if weight.numel() != getattr(weight, "ds_numel", weight.numel()):
        return "partitioned over processes by DeepSpeed ZeRO-3"
    if type(weight) not in (Tensor, nn.Parameter):
        return None  # a quantised tensor may keep its values elsewhere
    # FSDP1 leaves a flat piece, or a view of memory that it has freed.
    if weight.ndim < 2 or (weight.numel() > 0 and weight.untyped_storage().size() == 0):
        return "sharded over processes by FSDP"
    return None


def is_sharded(model: nn.Module) -> bool:
    """Whether processes hold parts of the model, so that a call of it is a collective one."""
    return any(is_dtensor(p) or hasattr(p, "ds_id") for p in model.parameters())


def is_partitioned(parameter: Tensor) -> bool:
    """Whether ZeRO-3 keeps this parameter in parts."""
    return hasattr(parameter, "ds_numel")


def full_numel(parameter: Tensor) -> int:
    """Elements of a parameter over all processes."""
    return getattr(parameter, "ds_numel", parameter.numel())


def is_offloaded(module: nn.Module) -> bool:
    """Whether an Accelerate hook brings the module's weights in for the length of a call only."""
    return bool(getattr(getattr(module, "_hf_hook", None), "offload", False))


def execution_device(module: nn.Module) -> torch.device:
    """Where a module whose weights are offloaded computes."""
    return torch.device(module._hf_hook.execution_device)


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor, without a gradient; every process must ask where FSDP2 has sharded it."""
    return tensor.detach().full_tensor() if is_dtensor(tensor) else tensor.detach()


@contextmanager
def present(module: nn.Module, modify: bool = False) -> Iterator[None]:
    """For the length of the context, weights that Accelerate offloads or ZeRO-3 partitions are here, whole.

    Of a partitioned module every process must enter at the same place.

    Args:
        module: its own parameters are meant, not its children's.
        modify: whether what the first process writes into partitioned ones is to stay.
    """
    parameters = [p for p in module.parameters(recurse=False) if hasattr(p, "ds_id")]
    if parameters:
        import deepspeed

        with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if modify else None):
            yield
    elif is_offloaded(module):
        module._hf_hook.pre_forward(module)
        try:
            yield
        finally:
            module._hf_hook.post_forward(module, None)
    else:
        yield
