"""What resting layers take of a step: no gradient, nothing that is saved for one, and no backward below them."""

from __future__ import annotations

import pytest
import torch
from helpers import batch
from peft import get_peft_model
from scheduled import adapted, optimizer_of
from transformers import SwinConfig, SwinForImageClassification

from benchmarks.cost.memory import step_memory
from benchmarks.cost.training import Training
from smt_peft import SMTConfig
from smt_peft.schedules import LayerSampling
from smt_peft.schedules.trained import by_layer, trained_blocks


def layers_in_backward(model) -> set[int]:
    """The decoder layers to whose output a gradient came."""
    reached = set()
    hooks = []
    for number, layer in enumerate(model.get_base_model().model.layers):

        def forward(module, args, output, number=number):
            output = output if isinstance(output, torch.Tensor) else output[0]
            if output.requires_grad:
                output.register_hook(lambda grad: reached.add(number))

        hooks.append(layer.register_forward_hook(forward))
    model(**batch(), use_cache=False).loss.backward()
    for hook in hooks:
        hook.remove()
    model.zero_grad()
    return reached


def begun(model, period: int, optimizer=None) -> LayerSampling:
    schedule = LayerSampling(layers=1, every=1, order="ascending")
    schedule.begin(model, optimizer or optimizer_of(model), 8)
    for step in range(1, period + 1):
        schedule.after_update(step)
    return schedule


@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_backward_ends_above_the_lowest_layer_that_trains(checkpointing):
    """Also under checkpointing, for which trainers ask for a gradient of the input; reentrant checkpoints need it."""
    model = adapted(layers=4).train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    schedule = begun(model, 2)
    blocks = schedule._blocks
    reached = layers_in_backward(model)
    assert reached == ({0, 1, 2, 3} if checkpointing else {2, 3})
    model(**batch(), use_cache=False).loss.backward()
    layer = set(by_layer(blocks)["model.layers.2"])
    assert {name for name, module in blocks.items() if module.weight.grad is not None} == layer
    model.zero_grad()
    schedule.end()
    assert all(module.weight.requires_grad for module in blocks.values())
    # What was asked for holds again.
    assert layers_in_backward(model) == {0, 1, 2, 3}


def test_gradients_under_checkpointing_are_those_without():
    found = []
    for checkpointing in (False, True):
        model = adapted(layers=3).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        schedule = begun(model, 1)
        model(**batch(), use_cache=False).loss.backward()
        found.append([module.weight.grad for module in schedule._blocks.values() if module.weight.requires_grad])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_resting_layers_take_no_memory_in_a_step(checkpointing):
    """As the allocator counts it: moments and gradients of one of four layers, and less saved the higher it is."""

    def step_with(period: int | None) -> dict:
        def start(note):
            model = adapted(layers=4).train()
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            note("method")
            optimizer = optimizer_of(model)
            if period is not None:
                begun(model, period, optimizer)
            return Training(model, optimizer)

        return step_memory(start, (2, 32))

    everything, lowest, highest = step_with(None), step_with(0), step_with(3)
    for part in ("training_bytes", "gradient_bytes"):
        # All four layers are alike.
        assert 4 * lowest[part] == 4 * highest[part] == everything[part]
    assert highest["saved_bytes"] < lowest["saved_bytes"] <= everything["saved_bytes"]
    assert highest["peak_bytes"] < lowest["peak_bytes"] < everything["peak_bytes"]
    if not checkpointing:
        # Resting layers above keep what hands the gradient down, and no inputs for blocks.
        assert lowest["saved_bytes"] < everything["saved_bytes"]


def test_an_embedding_that_trains_gets_its_gradient():
    model = adapted(target_modules=["q_proj", "embed_tokens"]).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    blocks = trained_blocks(model)
    begun(model, 3)
    model(**batch(), use_cache=False).loss.backward()
    assert blocks["model.embed_tokens"].weight.grad.abs().sum() > 0


def test_layers_of_a_model_whose_embedding_returns_more_than_a_tensor_take_turns():
    shape = {"image_size": 16, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2]}
    base = SwinForImageClassification(SwinConfig(**shape, window_size=2))
    model = get_peft_model(base, SMTConfig(target_modules="all-linear", block_size=4, density=0.2, score="random"))
    images = {"pixel_values": torch.randn(2, 3, 16, 16), "labels": torch.tensor([0, 1])}
    for period in range(2):
        schedule = begun(model, period)
        model(**images).loss.backward()
        reached = {name for name, module in schedule._blocks.items() if module.weight.grad is not None}
        assert reached == schedule.active(period) < set(schedule._blocks)
        model.zero_grad()
        schedule.end()


def test_trainable_tokens_get_their_gradient():
    model = adapted(trainable_token_indices=[1, 2, 3]).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    begun(model, 3)
    model(**batch(), use_cache=False).loss.backward()
    [rows] = [p for name, p in model.named_parameters() if "trainable_tokens" in name and p.requires_grad]
    assert rows.grad is not None
