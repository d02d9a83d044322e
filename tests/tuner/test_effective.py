"""The effective update is what a count by hand over dense weights gives."""

from __future__ import annotations

import pytest
import torch
from helpers import tiny_gpt2, tiny_llama
from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from smt_peft import SMTConfig
from smt_peft.tuner.effective import Effective, effective_update
from smt_peft.tuner.layer import SMTLayer


def layers(model: nn.Module) -> dict[str, SMTLayer]:
    return {layer.smt_name: layer for layer in model.modules() if isinstance(layer, SMTLayer)}


def by_hand(layer: SMTLayer) -> Effective:
    """Over the dense matrices: base and round(base + delta), element by element."""
    base = layer.get_base_layer()
    weight = (base.weight.t() if isinstance(base, Conv1D) else base.weight).detach()
    blocks = layer.smt_blocks["default"]
    delta = torch.zeros(weight.shape)
    chosen = torch.zeros(weight.shape, dtype=torch.bool)
    high, wide = blocks.grid.block_shape
    for block, (row, col) in zip(blocks.weight.detach().float(), blocks.index.tolist(), strict=True):
        there = (slice(row * high, (row + 1) * high), slice(col * wide, (col + 1) * wide))
        height, width = delta[there].shape
        delta[there] = block[:height, :width]
        chosen[there] = True
    after = (weight.float() + delta).to(weight.dtype)
    return Effective(
        str(weight.dtype).removeprefix("torch."),
        int(chosen.sum()),
        int((delta != 0).sum()),
        int((after != weight).sum()),
    )


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_size", [8, 7])
def test_counts_are_those_by_hand(build, dtype, block_size):
    """Also of ragged blocks, whose padding is no entry, and of transposed weights."""
    torch.manual_seed(0)
    config = SMTConfig(target_modules="all-linear", block_size=block_size, density=0.3, score="random")
    model = get_peft_model(build().to(dtype), config)
    for layer in layers(model).values():
        blocks = layer.smt_blocks["default"]
        # From far below half a bf16 step to far above; every fifth untouched.
        delta = torch.randn_like(blocks.weight) * 10.0 ** (-5 * torch.rand_like(blocks.weight))
        delta.view(-1)[::5] = 0
        blocks.weight.data = 0.02 * delta * blocks.layout().padding_mask()
    found = effective_update(model)
    assert found == {name: by_hand(layer) for name, layer in layers(model).items()}
    changed, moved = (sum(getattr(each, part) for each in found.values()) for part in ("changed", "moved"))
    assert 0 < changed < moved if dtype == torch.bfloat16 else 0 < changed <= moved


def one_layer(value: float, delta: float) -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4, bias=False, dtype=torch.bfloat16))
    nn.init.constant_(model[0].weight, value)
    model = get_peft_model(
        model, SMTConfig(target_modules=["0"], block_size=2, num_blocks=2, score="random"), autocast_adapter_dtype=False
    )
    (layer,) = layers(model).values()
    blocks = layer.smt_blocks["default"]
    blocks.weight.data = torch.full(blocks.weight.shape, delta)
    return model


@pytest.mark.parametrize(
    ("delta", "changed"),
    [
        (2.0**-9, 0),  # 1 has steps of 2^-7 above it in bf16: a quarter of one is gone
        (2.0**-8, 0),  # a tie goes to the even neighbour, 1 itself
        (2.0**-8 + 2.0**-12, 8),
        (-(2.0**-9) - 2.0**-12, 8),  # below 1 they are half as wide
        (0.0, 0),
    ],
)
def test_an_update_below_half_a_step_rounds_away_to_nothing(delta, changed):
    (found,) = effective_update(one_layer(1.0, delta)).values()
    assert found == Effective("bfloat16", 8, 8 if delta else 0, changed)


def test_nothing_is_written_by_counting():
    model = one_layer(1.0, 0.5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    effective_update(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_weight_that_is_not_here_is_named():
    model = one_layer(1.0, 0.5).to("meta")
    with pytest.raises(ValueError, match="^0: the weight is on the meta device"):
        effective_update(model)
