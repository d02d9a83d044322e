"""Quantised layers for tests: small, made on the CPU, skipped where their library is not installed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

BITSANDBYTES = ("nf4", "fp4", "nf4 double", "nf4 in bf16", "int8")
DEQUANTISABLE = (*BITSANDBYTES, "torchao int8", "torchao int4", "hqq")


def packed_linear(linear: nn.Linear, kind: str) -> nn.Module:
    """A quantised copy of a linear layer; `linear` stays as it is."""
    if kind in BITSANDBYTES:
        return _bitsandbytes(linear, kind)
    if kind.startswith("torchao"):
        return _torchao(linear, kind)
    if kind == "hqq":
        return _hqq(linear)
    return ForwardOnly(linear)


def true_weight(layer: nn.Module) -> Tensor:
    """The dequantised weight, by the library's own function."""
    if hasattr(layer, "W_q"):
        return layer.dequantize()
    if not type(layer).__module__.startswith("bitsandbytes"):
        return layer.weight.dequantize()
    import bitsandbytes.functional as bnb

    if hasattr(layer, "state"):
        scales = layer.weight.SCB if layer.state.SCB is None else layer.state.SCB
        return bnb.int8_vectorwise_dequant(layer.weight.data, scales)
    return bnb.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def plain_linear(layer: nn.Module) -> nn.Linear:
    """An `nn.Linear` that holds the dequantised weight."""
    weight = true_weight(layer)
    plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, dtype=weight.dtype)
    plain.weight.data = weight.contiguous()
    if layer.bias is not None:
        plain.bias.data = layer.bias.detach().clone()
    return plain.requires_grad_(False)


def storage(module: nn.Module) -> dict[str, Tensor]:
    """Copies of everything a model stores, also what bitsandbytes and HQQ keep beside their parameters."""
    found = {name: tensor.detach().clone() for name, tensor in module.state_dict(keep_vars=True).items()}
    for name, layer in module.named_modules():
        if hasattr(layer, "W_q"):
            found[f"{name}.W_q"] = layer.W_q.detach().clone()
            found |= {f"{name}.{key}": t.clone() for key, t in layer.meta.items() if isinstance(t, Tensor)}
    return found


def same_storage(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(_same(tensor, other[name]) for name, tensor in one.items())


def _same(one: Tensor, other: Tensor) -> bool:
    if hasattr(one, "qdata"):
        return torch.equal(one.qdata, other.qdata) and torch.equal(one.scale, other.scale)
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    # As bytes: packed integers that are stored as floats may be NaN.
    return torch.equal(*(tensor.detach().reshape(-1).contiguous().view(torch.uint8) for tensor in (one, other)))


class ForwardOnly(nn.Module):
    """Stands for the layers of GPTQ and AWQ: packed integers, a forward of their own, and no `weight`."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scales = linear.weight.detach().abs().amax(1, keepdim=True) / 7
        self.register_buffer("qweight", (linear.weight.detach() / scales).round().to(torch.int32))
        self.register_buffer("scales", scales)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, (self.qweight * self.scales).to(x.dtype), self.bias)


def _bitsandbytes(linear: nn.Linear, kind: str) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    has_bias = linear.bias is not None
    if kind == "int8":
        layer = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, has_bias, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(linear.weight.detach().clone(), requires_grad=False).to("cpu")
    else:
        settings = {
            "quant_type": kind[:3],
            "compress_statistics": "double" in kind,
            "quant_storage": torch.bfloat16 if "bf16" in kind else torch.uint8,
        }
        layer = bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, has_bias, compute_dtype=linear.weight.dtype, **settings
        )
        weight = linear.weight.detach().clone()
        layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, module=layer, **settings).to("cpu")
    if has_bias:
        layer.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
    return layer


def torchao_config(kind: str):
    quantization = pytest.importorskip("torchao.quantization")
    if kind == "torchao int8":
        return quantization.Int8WeightOnlyConfig()
    if kind == "torchao dynamic":
        return quantization.Int8DynamicActivationInt8WeightConfig()
    return quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=quantization.PerGroup(16))


def _torchao(linear: nn.Linear, kind: str) -> nn.Module:
    config = torchao_config(kind)
    from torchao.quantization import quantize_

    holder = nn.Sequential(nn.Linear(linear.in_features, linear.out_features, linear.bias is not None))
    holder.to(linear.weight.dtype).load_state_dict({f"0.{k}": v for k, v in linear.state_dict().items()})
    quantize_(holder, config)
    return holder[0].requires_grad_(False)


def _hqq(linear: nn.Linear) -> nn.Module:
    hqq = pytest.importorskip("hqq.core.quantize")
    copy = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None)
    copy.load_state_dict(linear.state_dict())
    config = hqq.BaseQuantizeConfig(nbits=4, group_size=16)
    return hqq.HQQLinear(copy, config, compute_dtype=linear.weight.dtype, device="cpu").requires_grad_(False)
