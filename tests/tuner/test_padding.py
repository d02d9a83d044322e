"""Blocks that are displaced in place act at once in every kind of layer, and in no padding."""

from __future__ import annotations

import pytest
import torch
from helpers import batch, tiny_gpt2, tiny_llama
from mixtures import EXPERTS, tiny_gpt_oss, tiny_mixtral
from packing import packed_linear
from peft import get_peft_model
from torch import Tensor, nn

from smt_peft import SMTConfig
from smt_peft.optim import MeZO
from smt_peft.tuner.delta import SMTBlocks
from smt_peft.tuner.padding import padding_masks

MODELS = {
    "linear": (tiny_llama, {}),
    "Conv1D": (tiny_gpt2, {}),
    "embedding": (tiny_llama, {"target_modules": ["embed_tokens"]}),
    "experts": (tiny_mixtral, {"target_parameters": EXPERTS}),
    "transposed experts": (tiny_gpt_oss, {"target_parameters": EXPERTS}),
}
SETTINGS = {"target_modules": "all-linear", "block_size": 5, "density": 0.2, "score": "random", "init_weights": False}


def assert_measures_the_gradient(model: nn.Module, loss, eps: float, tolerance: float) -> None:
    """What losses differ by is the gradient along the noise, up to eps^2, and rounding over eps."""
    optimizer = MeZO([p for p in model.parameters() if p.requires_grad], eps=eps, masks=padding_masks(model))
    blocks = [module for module in model.modules() if isinstance(module, SMTBlocks)]
    before = [each.weight.detach().clone() for each in blocks]
    optimizer.estimate(loss)
    assert all(torch.equal(each.weight, value) for each, value in zip(blocks, before, strict=True))
    assert all(each.weight[~each.layout().padding_mask()].eq(0).all() for each in blocks)
    assert any(each.padding() for each in blocks)
    loss().backward()
    expected = sum((each.weight.grad * optimizer.noise(i)).sum() for i, each in enumerate(blocks))
    assert optimizer.projected.item() == pytest.approx(expected.item(), abs=tolerance)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", MODELS)
def test_the_losses_measure_the_gradient(kind, training):
    torch.manual_seed(0)
    make, settings = MODELS[kind]
    model = get_peft_model(make(), SMTConfig(**SETTINGS | settings)).train(training)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    ids = batch()["input_ids"]

    def loss() -> Tensor:
        # In fp64, as the difference of two losses in fp32 would be mostly rounding.
        logits = model(input_ids=ids).logits.double()
        return nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten())

    # Small enough for no token to go to another expert.
    assert_measures_the_gradient(model, loss, 3e-4, 2e-4)


@pytest.mark.parametrize("kind", ["forward only", "nf4", "torchao int8", "hqq"])
def test_over_packed_weights_too(kind):
    torch.manual_seed(0)
    layers = [packed_linear(nn.Linear(64, side).requires_grad_(False), kind) for side in (64, 48)]
    model = get_peft_model(nn.Sequential(layers[0], nn.Tanh(), layers[1]), SMTConfig(**SETTINGS)).train()
    x = torch.randn(6, 64)
    assert_measures_the_gradient(model, lambda: model(x).double().square().mean(), 1e-3, 1e-3)
