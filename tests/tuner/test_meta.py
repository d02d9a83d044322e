"""Models without values, on the meta device: what an adapter will look like before the weights are loaded."""

from __future__ import annotations

import pytest
import torch
from helpers import Mlp, tiny_gpt2, tiny_llama
from peft import get_peft_model

from smt_peft import SMTConfig


@pytest.mark.parametrize("score", ["random", "diagonal"])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, Mlp])
def test_counts_and_shapes_are_those_of_the_model_with_values(make, score):
    settings = {"target_modules": "all-linear", "density": 0.05, "block_size": 8, "score": score}
    with torch.device("meta"):
        bare = make()
    sized, real = (get_peft_model(model, SMTConfig(**settings)) for model in (bare, make()))
    assert sized.get_nb_trainable_parameters() == real.get_nb_trainable_parameters()
    assert sized.base_model.get_nb_trainable_parameters() == real.base_model.get_nb_trainable_parameters()
    assert sized.peft_config["default"].block_pattern == real.peft_config["default"].block_pattern
    assert all(parameter.is_meta for parameter in sized.parameters())
    shapes = [{name: p.shape for name, p in model.named_parameters()} for model in (sized, real)]
    assert shapes[0] == shapes[1]


def test_padding_is_not_counted_and_the_count_outlives_a_move_there():
    settings = {"target_modules": ["up", "down"], "num_blocks": 9, "block_size": 8, "score": "random"}
    real = get_peft_model(Mlp(), SMTConfig(**settings))
    counts = real.base_model.get_nb_trainable_parameters()
    assert counts[0] < sum(p.numel() for p in real.parameters() if p.requires_grad)
    assert real.to("meta").base_model.get_nb_trainable_parameters() == counts


def test_a_step_gives_the_shapes_of_its_results():
    with torch.device("meta"):
        base = tiny_llama()
    model = get_peft_model(base, SMTConfig(target_modules="all-linear", density=0.05, block_size=8, score="random"))
    ids = torch.zeros(2, 8, dtype=torch.int64, device="meta")
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    assert out.logits.shape == (2, 8, 64)
    assert all(p.grad.shape == p.shape for p in model.parameters() if p.requires_grad)
