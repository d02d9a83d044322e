"""What bitsandbytes does to 4-bit weights on some CPUs in evaluation, kept from happening and undone."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..say import once

# The flag of a layer that is to be repacked; see `keep_exact`.
REPACKS = "support_avx512bf16_for_cpu"


def keep_exact(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights in evaluation, and undo where it has done so.

    On a CPU with AVX512-BF16 its layers (0.50.2) rewrite themselves at the first call in evaluation: scales rounded to
    bf16, 8-bit scales made anew on the way back, and no gradient for the input from then on, also in training. Adapters
    belong to weights that stay.
    """
    for module in model.modules():
        if getattr(module, REPACKS, False):
            unpack_for_cpu(module)
            setattr(module, REPACKS, False)


def let_repack(model: nn.Module) -> None:
    """Undo `keep_exact`, as once the adapters are gone: the layers may go by bitsandbytes' fastest road again."""
    for module in model.modules():
        if hasattr(module, REPACKS):
            from bitsandbytes.functional import has_avx512bf16

            setattr(module, REPACKS, has_avx512bf16())


def unpack_for_cpu(layer: nn.Module) -> None:
    """Bring a 4-bit weight that bitsandbytes has repacked for the CPU into the order that everything else reads."""
    state = state_of(layer)
    if not getattr(state, "packing_format_for_cpu", False):
        return
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    once(
        "bitsandbytes repacked 4-bit weights for evaluation on this CPU before they got here, which rounded their "
        "scales to bf16; load the model anew to have them as they were"
    )
    layer.weight.data, state = _convert_weight_packed_for_cpu_inverse(layer.weight.data, state)
    if not state.nested:
        # Those it leaves transposed.
        state.absmax = state.absmax.t().reshape(-1).float()
    layer.weight.quant_state = layer.quant_state = state


def state_of(layer: nn.Module) -> Any:
    """The quantisation state of a `Linear4bit`; FSDP makes the weight anew and leaves it on the layer alone."""
    state = getattr(layer.weight, "quant_state", None)
    return getattr(layer, "quant_state", None) if state is None else state
