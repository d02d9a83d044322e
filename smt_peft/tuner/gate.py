"""Which forward a layer may take. Each check answers with the reason why not, so that the choice can be told."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers.pytorch_utils import Conv1D

from ..bases.sharded import why_absent

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def why_not_fused(base: nn.Module, blocks: nn.Module, x: Tensor) -> str | None:
    """Why the base layer must be called as a module, its output then added to, instead of by its weight in one GEMM."""
    # By exact type: a subclass (quantised, parametrized, sharded) may compute something else in its forward.
    if type(base) not in (nn.Linear, Conv1D):
        return f"the base layer is a {type(base).__name__}"
    return why_not_bypassed(base, blocks) or _why_not_weight(base, blocks) or _why_not_input(base.weight, x)


def why_not_bypassed(base: nn.Module, blocks: nn.Module) -> str | None:
    """Why the base layer's own call must not be left out: something hangs on it."""
    for module in (base, blocks):
        if any(getattr(module, hooks) for hooks in _HOOKS):
            return "hooks are registered on the layer"
    if "forward" in base.__dict__:
        return "the base layer's forward has been replaced"
    if _has_any_global_hook():
        return "global module hooks are registered"
    return None


def _why_not_weight(base: nn.Module, blocks: nn.Module) -> str | None:
    weight, delta = base.weight, blocks.weight
    if type(weight) is not nn.Parameter:
        return f"the weight is a {type(weight).__name__}"
    if weight.requires_grad or (base.bias is not None and base.bias.requires_grad):
        return "the base layer is trained too"
    if hasattr(weight, "ds_id"):
        return "the weight is partitioned by DeepSpeed ZeRO-3"
    if weight.ndim != 2 or not weight.is_contiguous() or (weight.is_meta and blocks.sketch is None):
        return "the weight is no contiguous matrix"
    if not weight.is_floating_point() or weight.dtype.itemsize < 2:
        return f"the weight is stored as {weight.dtype}"
    if type(delta) is not nn.Parameter or delta.ndim != 3 or delta.device != weight.device:
        return "the blocks are sharded or on another device"
    return None


def _why_not_input(weight: Tensor, x: Tensor) -> str | None:
    if type(x) is not Tensor and type(x) is not nn.Parameter:
        return f"the input is a {type(x).__name__}"
    device = x.device.type
    if x.dtype != weight.dtype and (not torch.is_autocast_enabled(device) or torch.float64 in (x.dtype, weight.dtype)):
        return f"the input is {x.dtype}, the weight {weight.dtype}"
    return None


def why_not_swap(weight: Tensor) -> str | None:
    """Why the weight of a layer that may be fused must not be written, not even for the length of a GEMM."""
    if torch.compiler.is_compiling():
        # Compilers cannot ask the two questions below.
        return None
    if weight.is_inference():
        return "the weight is an inference tensor"
    if weight.device.type == "cpu" and weight.is_shared():
        return "the weight is shared between processes"
    return None


def why_not_merged(base: nn.Module) -> str | None:
    """Why a delta must not be written into the weight for good: the layer would not compute `base + delta` then."""
    weight = base.weight
    if reason := why_absent(weight):
        return f"the weight is {reason}"
    if hasattr(base, "parametrizations"):
        return "the weight is parametrized, so it is computed anew at every use"
    is_table = isinstance(base, nn.Embedding)
    # What an embedding makes of the rows it looks up, it makes of merged rows too.
    if not is_table and type(base).forward not in (nn.Linear.forward, Conv1D.forward):
        return f"the base layer is a {type(base).__name__} with a forward of its own"
    if not isinstance(weight, nn.Parameter) or not weight.is_floating_point() or weight.dtype.itemsize < 2:
        return f"the weight is stored as {weight.dtype}"
    if is_table:
        shape = (base.num_embeddings, base.embedding_dim)
    else:
        shape = (base.nx, base.nf) if isinstance(base, Conv1D) else (base.out_features, base.in_features)
    if tuple(weight.shape) != shape:
        return f"the weight is stored as {tuple(weight.shape)}, not {shape}"
    return None


def is_traced() -> bool:
    """Whether a call must be made of differentiable PyTorch operations: for exporters, tracers and `torch.func`.

    A compiler is no such case: it sees the operations as opaque `torch.library` ops.
    """
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    return torch.jit.is_tracing() or torch._C._functorch.peek_interpreter_stack() is not None
