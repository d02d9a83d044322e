"""A quantised model made plain: every packed weight replaced by the floats it stands for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import AutoQuantizationConfig

from ..bases.packed import format_of


def quantization_config(record: dict[str, Any]) -> tuple[Any, str]:
    """The arguments `quantization_config` and `dtype` of `from_pretrained`, from `SMTConfig.base_quantization`.

    Raises:
        ValueError: the record names no way of quantising that is known here, or its library is not installed.
    """
    settings = {key: value for key, value in record.items() if key != "dtype"}
    try:
        return AutoQuantizationConfig.from_dict(settings), record.get("dtype") or "auto"
    except (ValueError, TypeError, KeyError, ImportError) as error:
        raise ValueError(f"base_quantization in the adapter's config cannot be used: {error}") from error


def dequantise_(model: PreTrainedModel) -> list[nn.Linear]:
    """Replace every quantised linear layer of a model by an `nn.Linear` with the dequantised weight, in place.

    Returns:
        The new layers. Their weights are in the dtype that their library dequantises to, for a merge to round in;
        `round_to` brings them to the model's.

    Raises:
        ValueError: a layer cannot be dequantised; names it. Nothing has been replaced then.
    """
    packed = {name: module for name, module in model.named_modules() if format_of(module) is not None}
    for name, module in packed.items():
        if reason := format_of(module).why_not_read(module):
            raise ValueError(f"{name}: {reason}, so the model cannot be made plain; use onto='checkpoint'")
    layers = []
    for name, module in packed.items():
        layers.append(_plain(module))
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layers[-1])
    _forget(model)
    return layers


def round_to(layers: list[nn.Linear], dtype: torch.dtype) -> None:
    """Round the weights and biases of layers to a dtype, in place."""
    for layer in layers:
        layer.to(dtype)


def _plain(module: nn.Module) -> nn.Linear:
    weight: Tensor = format_of(module).read(module)
    bias = getattr(module, "bias", None)
    layer = nn.Linear(module.in_features, module.out_features, bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return layer.train(module.training)


def _forget(model: PreTrainedModel) -> None:
    """Transformers' marks of a quantised model, which would be saved with it, refuse it a cast, or pack it again."""
    conversions = getattr(model, "_weight_conversions", None)
    quantizer = getattr(model, "hf_quantizer", None)
    if conversions and quantizer is not None:
        # Those that read a packed checkpoint would be undone when the model is saved.
        packing = {type(step) for part in quantizer.get_weight_conversions() for step in part.operations}
        model._weight_conversions = [
            part for part in conversions if not packing & {type(step) for step in getattr(part, "operations", ())}
        ]
    for owner, name in (
        (model.config, "quantization_config"),
        (model, "hf_quantizer"),
        (model, "quantization_method"),
        (model, "is_loaded_in_4bit"),
        (model, "is_loaded_in_8bit"),
    ):
        if name in vars(owner):
            delattr(owner, name)
    model.is_quantized = False
