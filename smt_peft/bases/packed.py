"""Packed weights: which layers have one, where it is stored, and how the whole model was quantised."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend, resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .formats import Bitsandbytes4bit, Bitsandbytes8bit, Format, Hqq, Torchao, loaded

# Where libraries keep a weight that has no `weight`, or one of integers: GPTQ and AWQ, HQQ, AQLM.
_STORES = ("qweight", "W_q", "codes")


def format_of(layer: nn.Module, get_config: Callable[[], Any] | None = None) -> Format | None:
    """How the weight of a linear layer is packed; None for a plain layer, and for what is no linear layer.

    Args:
        get_config: see `Torchao`.
    """
    if type(layer) is Conv1D or isinstance(layer, BaseTunerLayer):
        return None
    if _is_a(layer, "bitsandbytes.nn", "Linear4bit"):
        return Bitsandbytes4bit()
    if _is_a(layer, "bitsandbytes.nn", "Linear8bitLt"):
        return Bitsandbytes8bit()
    if _is_a(layer, "hqq.core.quantize", "HQQLinear"):
        return Hqq()
    if _is_a(getattr(layer, "weight", None), "torchao.utils", "TorchAOBaseTensor"):
        return Torchao(get_config) if _has_sides(layer) else None
    if isinstance(layer, nn.Linear) or not _has_sides(layer):
        return None
    backend = resolve_quantization_backend(layer)
    if isinstance(backend, ForwardOnlyQuantizationBackend):
        return Format(backend.backend_name)
    # Kernels that PEFT does not know, or whose library it does not find, have one thing in common.
    if any(_is_integer(getattr(layer, name, None)) for name in ("weight", *_STORES)):
        return Format(type(layer).__name__)
    return None


def is_packed(layer: nn.Module) -> bool:
    return format_of(layer) is not None


def stored(layer: nn.Module) -> Tensor:
    """The tensor that stands for the weight as it is stored, packed or not; its device is the layer's."""
    for name in ("weight", *_STORES):
        if isinstance(tensor := getattr(layer, name, None), Tensor):
            return tensor
    return next(tensor for tensor in (*layer.parameters(), *layer.buffers()))


def unpacked_numel(parameter: Tensor) -> int:
    """How many weights a parameter stands for: of a 4-bit one more than it has elements."""
    if not _is_a(parameter, "bitsandbytes.nn", "Params4bit") or parameter.quant_state is None:
        return parameter.numel()
    return math.prod(parameter.quant_state.shape)


def quantization_of(model: nn.Module) -> dict[str, Any] | None:
    """How Transformers quantised a model, in JSON values; None: not at all.

    Returns:
        The `quantization_config` of its config, and under `dtype` the dtype the model was loaded in, which decides
        what was quantised.
    """
    config = getattr(model, "config", None)
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    settings = json.loads(json.dumps(found if isinstance(found, dict) else found.to_dict(), default=str))
    dtype = getattr(config, "dtype", None)
    return settings if dtype is None else {**settings, "dtype": str(dtype).removeprefix("torch.")}


def _is_a(thing: Any, module: str, name: str) -> bool:
    cls = loaded(module, name)
    return cls is not None and isinstance(thing, cls)


def _has_sides(layer: nn.Module) -> bool:
    return all(type(getattr(layer, name, None)) is int for name in ("in_features", "out_features"))


def _is_integer(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and not tensor.is_floating_point() and not tensor.is_complex()
