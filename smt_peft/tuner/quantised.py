"""SMT over quantised linear layers: the blocks in the dequantised temporary, or beside the library's own kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn

from .. import ops
from ..bases.formats import Format
from ..bases.packed import format_of, stored
from ..say import once, say
from .gate import is_traced, why_not_bypassed
from .linear import Linear


class QuantisedLinear(Linear):
    """SMT over a linear layer whose weight is packed: bitsandbytes, torchao, HQQ, or one with kernels of its own.

    `overlay` dequantises the weight as the library's training does, writes the blocks of base + delta into that
    temporary and runs one GEMM: what a plain layer that holds the dequantised weight computes, bit for bit. It serves
    training. In evaluation `additive` leaves the base to the library's kernel, which reads the packed weight; so it
    does wherever `overlay` is impossible: in a compiled model, with several active adapters, with hooks on the base.

    Args:
        get_config: see `formats.Torchao`.
    """

    def __init__(self, base_layer: nn.Module, name: str, get_config: Callable[[], Any] | None = None):
        super().__init__(base_layer, name)
        self.format: Format = format_of(self.get_base_layer(), get_config)
        # The packed weight as it was before the first of the merged adapters.
        self._kept: Any = None
        self.rounding: Rounding | None = None

    @property
    def quantization_backend(self) -> QuantizationBackend | None:
        """What PEFT names in the status of a model, and reads the base weight by."""
        return self.format.backend(self.get_base_layer())

    def extra_repr(self) -> str:
        backend = self.quantization_backend
        name = self.format.name if backend is None else backend.backend_name
        return f"{super().extra_repr()}, quantization_backend={name!r}"

    def stored_weight(self) -> Tensor:
        return stored(self.get_base_layer())

    def weight_view(self) -> Tensor:
        return self.stored_weight()

    def check_forward(self, forward: str) -> None:
        reason = self.format.why_not_read(self.get_base_layer()) if forward == "overlay" else None
        if forward == "swap":
            reason = f"'swap' writes into the weight, which {self.format.name} has packed"
        if reason:
            raise ValueError(f"{self.smt_name}: forward={forward!r} is not possible: {reason}; use forward='auto'")

    def heal(self) -> None:
        """Nothing to do: a packed weight is never written for the length of a call."""

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, None]:
        # PEFT looks in fewer places, and would cast the delta to the layer's compute dtype.
        return stored(base_layer).device, None

    def _chosen_forward(self, x: Tensor, active: list[str]) -> Tensor:
        wanted = {self.smt_forward[name] for name in active}
        reason = self._why_not_overlay(x, active)
        if reason and "overlay" in wanted and not torch.compiler.is_compiling():
            raise RuntimeError(f"{self.smt_name}: forward='overlay' is set, but {reason}; use forward='auto'")
        # A thread that decodes beside this one reads the packed weight only, so nothing but speed decides here.
        if reason is None and ("overlay" in wanted or (wanted == {"auto"} and self.training and self._is_exact())):
            blocks = self.smt_blocks[active[0]]
            y = self._overlay_forward(x, blocks)
            return y if blocks.retired is None else blocks.retired(y, x)
        return self._opaque_forward(x, active)

    def _why_not_overlay(self, x: Tensor, active: list[str]) -> str | None:
        base = self.get_base_layer()
        if len(active) > 1:
            return "several adapters are active"
        if is_traced():
            return "the call is traced or transformed"
        if torch.compiler.is_compiling():
            return "the model is compiled"
        blocks = self.smt_blocks[active[0]]
        if self.base_layer is not base:
            return f"the base layer is a {type(self.base_layer).__name__}"
        reason = self.format.why_not_read(base) or self.format.why_not_replaced(base)
        if reason := reason or why_not_bypassed(base, blocks):
            return reason
        if any(parameter.requires_grad for parameter in base.parameters()):
            return "the base layer is trained too"
        if type(blocks.weight) is not nn.Parameter or blocks.weight.device != x.device:
            return "the blocks are sharded or on another device"
        return None if type(x) in (Tensor, nn.Parameter) else f"the input is a {type(x).__name__}"

    def _is_exact(self) -> bool:
        return self.format.why_not_exact(self.get_base_layer()) is None

    def _overlay_forward(self, x: Tensor, blocks: nn.Module) -> Tensor:
        self._told = "overlay"
        base = self.get_base_layer()
        # HQQ's is no parameter, though it may say that it requires a gradient.
        bias = None if base.bias is None else base.bias.detach()
        cast = self.format.compute_dtype(base, x)
        operand = x if cast is None else x.to(cast)
        read = partial(self.format.read, base)
        y = ops.block_overlay(operand, read, bias, blocks.weight, blocks.layout(), blocks.int8)
        return y if cast is None else y.to(x.dtype)

    def _base_output(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = self.base_layer(x, *args, **kwargs)
        if self.training and x.requires_grad and torch.is_grad_enabled() and not y.requires_grad:
            once(
                f"the kernel of the base layers ({self.format.name}) hands no gradient on to its input, so layers "
                "below learn from part of theirs only; "
                + (self.format.why_not_read(self.get_base_layer()) or "forward='overlay' gives them all of it")
            )
        return y

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Requantise `round(dequantised base + delta)`, keeping the packed weight it replaces.

        What the requantising costs is left in `rounding`.

        Raises:
            ValueError: the weight cannot be dequantised or requantised, or `safe_merge` is set and a merged block is
                not finite; nothing has been written then.
        """
        names = self._to_merge(adapter_names)
        self.check_merge(names, safe_merge)
        if not names:
            return
        base = self.get_base_layer()
        kept = self.format.keep(base)
        before = self.format.read(base)
        wanted = before.clone()
        for adapter in names:
            layout, delta = self.change(adapter)
            ops.block_scatter_(wanted, ops.add_rounded(ops.block_gather(wanted, layout), delta), layout)
        self.format.write(base, wanted)
        self.rounding = Rounding.of(before, wanted, self.format.read(base))
        if not self.merged_adapters:
            self._kept = kept
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Put the packed weight back, bit for bit."""
        if self.merged_adapters:
            self.format.put_back(self.get_base_layer(), self._kept)
            self._kept = None
            self.merged_adapters.clear()

    def _why_not_merged(self) -> str | None:
        return self.format.why_not_written(self.get_base_layer())

    def readable_weight(self) -> Tensor:
        return self.format.read(self.get_base_layer())


@dataclass
class Rounding:
    """What requantising merged weights has cost, summed over layers.

    Args:
        layers: how many.
        weights: of these layers.
        largest: largest |requantised - wanted|.
        total: sum of |requantised - wanted| over all weights.
        along: the update that arrived, projected on the one wanted: sum of the products of both.
        wanted: sum of squares of the update wanted.
    """

    layers: int = 0
    weights: int = 0
    largest: float = 0.0
    total: float = 0.0
    along: float = 0.0
    wanted: float = 0.0

    @classmethod
    def of(cls, before: Tensor, wanted: Tensor, after: Tensor) -> Rounding:
        """Of one layer: its weight before, as it was to be, and as it is now."""
        before, wanted, after = before.float(), wanted.float(), after.float()
        error, update = (after - wanted).abs(), wanted - before
        along = ((after - before) * update).sum(dtype=torch.float64)
        squares = update.square().sum(dtype=torch.float64)
        total = error.sum(dtype=torch.float64)
        return cls(1, error.numel(), *(part.item() for part in (error.max(), total, along, squares)))

    def __add__(self, other: Rounding) -> Rounding:
        sums = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        return Rounding(**{**sums, "largest": max(self.largest, other.largest)})

    @property
    def mean(self) -> float:
        return self.total / max(1, self.weights)

    @property
    def survived(self) -> float:
        """Share of the update that is still there: 1 all of it, 0 nothing."""
        return self.along / self.wanted if self.wanted else 1.0


def tell_rounding(layers: Sequence[nn.Module]) -> Rounding | None:
    """Say in one line what the last merge into quantised weights has cost; None where there was none."""
    found = [layer.rounding for layer in layers if isinstance(layer, QuantisedLinear) and layer.rounding is not None]
    if not found:
        return None
    rounding = sum(found, Rounding())
    say(
        f"merged into the quantised weights of {rounding.layers} layers: requantising moved them by up to "
        f"{rounding.largest:.3g}, {rounding.mean:.3g} on average, and left {rounding.survived:.0%} of the update; "
        "merge_adapter onto 'checkpoint' or 'dequantised' keeps all of it"
    )
    for layer in layers:
        if isinstance(layer, QuantisedLinear):
            layer.rounding = None
    return rounding
