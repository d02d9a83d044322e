"""How libraries pack the weight of a linear layer: read as floats, written anew, kept and put back.

A `Format` knows one library. The libraries are looked for among the loaded modules only: a layer of a library that
nobody has imported cannot exist.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from peft.utils.quantization_utils import HqqBackend, QuantizationBackend, resolve_quantization_backend
from torch import Tensor, nn

from .repacking import state_of, unpack_for_cpu

_UNKNOWN_CONFIG = (
    "how torchao quantised it is not known; load the model through transformers with a TorchAoConfig, "
    "which records that"
)


class Format:
    """How one library packs a weight. This one cannot be read: the layer only has a forward of its own."""

    def __init__(self, name: str):
        self.name = name

    def backend(self, layer: nn.Module) -> QuantizationBackend | None:
        """What PEFT has for this library; None where it does not know it."""
        return resolve_quantization_backend(layer)

    def why_not_read(self, layer: nn.Module) -> str | None:
        """Why the weight's values cannot be had."""
        return f"a weight packed by {self.name} cannot be dequantised here"

    def why_not_written(self, layer: nn.Module) -> str | None:
        """Why other values cannot be packed into the layer."""
        return self.why_not_read(layer)

    def why_not_exact(self, layer: nn.Module) -> str | None:
        """Why the layer computes something else than a product with the weight that `read` gives."""
        return self.why_not_read(layer)

    def why_not_replaced(self, layer: nn.Module) -> str | None:
        """Why a product with the weight that `read` gives must not stand in for the layer's own forward."""
        own = getattr(self._library_class(), "forward", None)
        return None if type(layer).forward is own else f"a {type(layer).__name__} has a forward of its own"

    def _library_class(self) -> type | None:
        """The class whose forward is known."""
        return None

    def read(self, layer: nn.Module) -> Tensor:
        """The dequantised weight, `(out_features, in_features)`: a new contiguous float tensor, the caller's to write.

        Of the dtype the library dequantises to: of a bitsandbytes 4-bit weight the one it had before, of an 8-bit
        weight float32.

        Raises:
            ValueError: the weight cannot be read; `why_not_read` says why.
        """
        raise ValueError(self.why_not_read(layer))

    def write(self, layer: nn.Module, weight_NK: Tensor) -> None:
        """Quantise a weight as the layer's is, and put it in its place. What `keep` has given stays as it is."""
        raise ValueError(self.why_not_written(layer))

    def keep(self, layer: nn.Module) -> Any:
        """The packed weight as it is stored, not copied, for `put_back`."""
        raise ValueError(self.why_not_written(layer))

    def put_back(self, layer: nn.Module, kept: Any) -> None:
        """Store again what `keep` gave, bit for bit, on the layer's present device."""
        raise ValueError(self.why_not_written(layer))

    def half_step(self, layer: nn.Module, weight_NK: Tensor) -> Tensor:
        """How far quantising may have moved each value of `weight_NK`, as read; broadcasts to its shape.

        Without knowledge of the format: half the largest magnitude of the row, which holds down to 2 bits.
        """
        return weight_NK.float().abs().amax(1, keepdim=True) / 2

    def compute_dtype(self, layer: nn.Module, x: Tensor) -> torch.dtype | None:
        """The dtype that the layer casts its input to, before it casts its output back; None: it casts nothing."""
        return None


class Bitsandbytes4bit(Format):
    """`bitsandbytes.nn.Linear4bit`: nf4 or fp4, one scale for a run of 64 weights, the scales possibly 8-bit again."""

    def __init__(self):
        super().__init__("bitsandbytes (4-bit)")

    def _library_class(self):
        return loaded("bitsandbytes.nn", "Linear4bit")

    def why_not_read(self, layer):
        state, weight = state_of(layer), layer.weight
        if state is None:
            return "the 4-bit weight is not quantised yet; move the model to its device first"
        if _is_sharded(weight) or weight.numel() * weight.element_size() != -(-math.prod(state.shape) // 2):
            return "the weight is sharded"
        return None

    def why_not_exact(self, layer):
        return self.why_not_read(layer)

    def read(self, layer):
        from bitsandbytes.functional import dequantize_4bit

        unpack_for_cpu(layer)
        return dequantize_4bit(layer.weight.data, state_of(layer))

    def write(self, layer, weight_NK):
        from bitsandbytes.nn import Params4bit

        old, state = layer.weight, state_of(layer)
        layer.weight = Params4bit(
            weight_NK.to(state.dtype),
            requires_grad=False,
            blocksize=state.blocksize,
            compress_statistics=state.nested,
            quant_type=state.quant_type,
            quant_storage=old.dtype,
            module=layer,
        ).to(old.device)

    def keep(self, layer):
        unpack_for_cpu(layer)
        return layer.weight, state_of(layer)

    def put_back(self, layer, kept):
        device = layer.weight.device
        weight, state = kept
        if weight.device != device:
            weight = weight.to(device)
            state = weight.quant_state
        layer.weight, layer.quant_state = weight, state
        layer.weight.quant_state = state

    def half_step(self, layer, weight_NK):
        state = state_of(layer)
        if weight_NK.shape[1] % state.blocksize:
            # bitsandbytes (0.50.2) on a CPU reads runs that go over the end of a row with the scales of others.
            return 2 * weight_NK.float().abs().amax().view(1, 1)
        flat = weight_NK.float().abs().reshape(-1)
        runs = nn.functional.pad(flat, (0, -flat.numel() % state.blocksize)).view(-1, state.blocksize)
        # The widest gap between two levels; and what rounding the scales, to 8 bits or to bf16, may add.
        reach = state.code.float().sort().values.diff().max() / 2 + 2.0**-6
        steps = (runs.amax(1, keepdim=True) * reach.to(flat.device)).expand_as(runs)
        return steps.reshape(-1)[: flat.numel()].view(weight_NK.shape)

    def compute_dtype(self, layer, x):
        if not layer.compute_type_is_set:
            # As the layer's own first forward does.
            layer.set_compute_type(x)
            layer.compute_type_is_set = True
        return x.dtype if layer.compute_dtype is None else layer.compute_dtype


class Bitsandbytes8bit(Format):
    """`bitsandbytes.nn.Linear8bitLt`: int8 with one scale per output row, which moves from the weight to the state."""

    def __init__(self):
        super().__init__("bitsandbytes (8-bit)")

    def _library_class(self):
        return loaded("bitsandbytes.nn", "Linear8bitLt")

    def why_not_read(self, layer):
        if layer.weight.dtype != torch.int8:
            return f"the weight is {layer.weight.dtype}: not quantised yet, or kept in 16 bits by has_fp16_weights"
        if _is_sharded(layer.weight) or layer.weight.shape != (layer.out_features, layer.in_features):
            return "the weight is sharded"
        return None

    def why_not_exact(self, layer):
        return self.why_not_read(layer)

    def read(self, layer):
        from bitsandbytes.functional import int8_vectorwise_dequant

        return int8_vectorwise_dequant(layer.weight.data, self._scales(layer))

    def write(self, layer, weight_NK):
        from bitsandbytes.nn import Int8Params

        device = layer.weight.device
        # It quantises on the way from the CPU.
        layer.weight = Int8Params(weight_NK.cpu(), requires_grad=False, has_fp16_weights=False).to(device)
        layer.state.reset_grads()

    def keep(self, layer):
        weight, state = layer.weight, layer.state
        return weight, weight.CB, weight.SCB, state.CB, state.SCB

    def put_back(self, layer, kept):
        device = layer.weight.device
        weight, *rest = kept
        layer.weight = weight.to(device) if weight.device != device else weight
        rest = [None if tensor is None else tensor.to(device) for tensor in rest]
        layer.weight.CB, layer.weight.SCB, layer.state.CB, layer.state.SCB = rest

    def half_step(self, layer, weight_NK):
        return self._scales(layer).float()[:, None] / (2 * 127)

    def _scales(self, layer: nn.Module) -> Tensor:
        scales = layer.weight.SCB if layer.state.SCB is None else layer.state.SCB
        return scales.to(layer.weight.device)


class Hqq(Format):
    """`hqq.core.quantize.HQQLinear`: groups with a scale and a zero point; no `weight`, and no `nn.Linear`."""

    def __init__(self):
        super().__init__("HQQ")

    def _library_class(self):
        return loaded("hqq.core.quantize", "HQQLinear")

    def why_not_read(self, layer):
        return None if getattr(layer, "ready", False) else "the layer is not quantised yet"

    def why_not_exact(self, layer):
        return self.why_not_read(layer)

    def read(self, layer):
        return HqqBackend().get_base_weight(layer).contiguous()

    def write(self, layer, weight_NK):
        holder = _Holder(layer)
        HqqBackend().set_base_weight(holder, weight_NK)
        # PEFT makes a new layer; taking its contents leaves hooks and references to the old one intact.
        layer.W_q, layer.meta = holder.base_layer.W_q, holder.base_layer.meta

    def keep(self, layer):
        return layer.W_q, layer.meta

    def put_back(self, layer, kept):
        packed, meta = kept
        if packed.device != layer.W_q.device:
            raise ValueError("an HQQ layer cannot be unmerged on another device than it was merged on; move it back")
        layer.W_q, layer.meta = packed, meta


class Torchao(Format):
    """A weight that is a tensor subclass of torchao inside an `nn.Linear`.

    Args:
        get_config: gives the torchao config it was quantised with; without it the weight can be read, not written.
    """

    def __init__(self, get_config: Callable[[], Any] | None = None):
        super().__init__("torchao")
        self.get_config = get_config

    def backend(self, layer):
        # PEFT wants to know how to quantise anew, also of whom only reads.
        return resolve_quantization_backend(layer, get_apply_tensor_subclass=self.get_config or self._unknown_config)

    def _unknown_config(self):
        raise ValueError(_UNKNOWN_CONFIG)

    def _library_class(self):
        return nn.Linear

    def why_not_read(self, layer):
        return None if hasattr(layer.weight, "dequantize") else f"a {type(layer.weight).__name__} has no dequantize()"

    def why_not_written(self, layer):
        if self.get_config is None:
            return _UNKNOWN_CONFIG
        return self.why_not_read(layer)

    def why_not_exact(self, layer):
        if reason := self.why_not_read(layer):
            return reason
        weight = layer.weight
        quantised = any(getattr(weight, name, None) for name in ("act_quant_kwargs", "activation_quantization"))
        if quantised or type(weight).__name__ == "LinearActivationQuantizedTensor":
            return "the base layer quantises its activations too"
        return None

    def read(self, layer):
        return layer.weight.dequantize().contiguous()

    def write(self, layer, weight_NK):
        from torchao.quantization import quantize_

        linear = nn.Linear(1, 1, bias=False, device="meta")
        linear.in_features, linear.out_features = layer.in_features, layer.out_features
        linear.weight = nn.Parameter(weight_NK.to(layer.weight.dtype), requires_grad=False)
        quantize_(linear, self.get_config())
        layer.weight = linear.weight.requires_grad_(False)

    def keep(self, layer):
        return layer.weight

    def put_back(self, layer, kept):
        device = layer.weight.device
        layer.weight = kept if kept.device == device else nn.Parameter(kept.to(device), requires_grad=False)


class _Holder:
    """What PEFT's backends write to: something with a base layer that they may replace."""

    def __init__(self, layer: nn.Module):
        self.base_layer = layer

    def get_base_layer(self) -> nn.Module:
        return self.base_layer


def loaded(module: str, name: str) -> type | None:
    """A class of a module that has been imported."""
    return getattr(sys.modules.get(module), name, None)


def _is_sharded(weight: Tensor) -> bool:
    """Whether ZeRO-3 or a DTensor holds only a part of it here."""
    return hasattr(weight, "ds_id") or hasattr(weight, "placements")
