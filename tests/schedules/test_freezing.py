"""Freezing by training dynamics: what rests, what it costs then, and that it comes back."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from helpers import batch
from mixtures import EXPERTS, tiny_qwen3_moe
from peft import get_peft_model
from scheduled import adapted, optimizer_of, train
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from smt_peft import SMTConfig
from smt_peft.optim import SMTAdamW
from smt_peft.schedules import Freezing, LayerSampling, ScheduleCallback
from smt_peft.schedules.trained import trained_blocks
from smt_peft.tuner.effective import covered_weights
from smt_peft.tuner.layer import SMTLayer


def active_in(blocks):
    return {name for name, module in blocks.items() if module.weight.requires_grad}


@pytest.mark.parametrize("kind", [torch.optim.AdamW, SMTAdamW])
@pytest.mark.parametrize("moments", ["keep", "drop", "move"])
def test_the_share_is_frozen_in_every_interval_and_what_is_frozen_stays_as_it_is(kind, moments):
    model = adapted(layers=3)
    blocks, optimizer = trained_blocks(model), optimizer_of(model, kind)
    before, seen = {}, []

    def look(step):
        resting = before.pop("resting", set())
        assert all(torch.equal(blocks[name].weight, before[name]) for name in resting)
        with_gradient = {name for name, module in blocks.items() if module.weight.grad is not None}
        assert with_gradient == active_in(blocks)
        seen.append(with_gradient)
        before.update({name: module.weight.detach().clone() for name, module in blocks.items()})
        before["resting"] = blocks.keys() - with_gradient
        if moments != "keep":
            assert {name for name in blocks if optimizer.state.get(blocks[name].weight)} <= with_gradient

    train(model, Freezing(share=0.8, every=2, moments=moments), 24, optimizer, look)
    assert len(blocks) == 21
    assert all(len(active) == 21 - math.floor(0.8 * 21) for active in seen)
    assert all(seen[start] == seen[start + 1] for start in range(0, 24, 2))
    # All have trained once before one trains again.
    turns = math.ceil(21 / 5)
    assert set().union(*seen[: 2 * turns]) == blocks.keys()
    assert sum(len(active) for active in seen[: 2 * (turns - 1) : 2]) == len(set().union(*seen[: 2 * (turns - 1)]))
    assert all(module.weight.requires_grad for module in blocks.values())


def test_what_changes_least_is_frozen_first():
    """Two modules hardly learn, by their learning rates: after the first turns only others train."""
    model = adapted(layers=2)
    blocks = trained_blocks(model)
    lazy = {"model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"}
    groups = [{"params": [blocks[name].weight], "lr": 1e-9 if name in lazy else 1e-3} for name in blocks]
    seen = []
    train(
        model,
        Freezing(share=0.5, rest=None),
        12,
        torch.optim.AdamW(groups, weight_decay=0.0),
        lambda step: seen.append(active_in(blocks)),
    )
    assert set().union(*seen[:2]) == blocks.keys()
    assert not any(lazy & active for active in seen[2:])


def test_the_changes_are_relative_to_the_weights_under_the_blocks():
    model = adapted(layers=2)
    blocks = trained_blocks(model)
    layers = {layer.smt_name: layer for layer in model.modules() if isinstance(layer, SMTLayer)}
    schedule = Freezing(share=0.5, every=3)
    start = {name: module.weight.detach().clone() for name, module in blocks.items()}
    optimizer = optimizer_of(model)
    schedule.begin(model, optimizer, 3)
    active = active_in(blocks)
    for step in (1, 2, 3):
        model(**batch(seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.after_update(step)
    changes = schedule.state_dict()["changes"]
    assert changes.keys() == active
    for name in active:
        covered = covered_weights(layers[name], "default").double().abs().sum()
        truth = (blocks[name].weight - start[name]).double().abs().sum() / covered
        assert changes[name] == pytest.approx(float(truth), rel=1e-5)


def test_those_with_the_greatest_last_change_train_and_the_rest_keep_theirs():
    """The rule itself, on changes that are made up."""
    model = adapted(layers=2)
    schedule, names = Freezing(share=0.5, rest=None), list(trained_blocks(model))
    schedule.begin(model, optimizer_of(model), 100)
    schedule._changes = {name: float(i) for i, name in enumerate(names)}
    assert set(schedule.chosen()) == set(names[7:])
    schedule._changes[names[13]] = 0.5
    assert set(schedule.chosen()) == set(names[6:13])
    # One whose change is not known comes before all.
    del schedule._changes[names[0]]
    assert set(schedule.chosen()) == {names[0], *names[7:13]}


def test_a_falling_learning_rate_brings_back_what_rested():
    """The paper's own way back, with no bound on the rest."""
    model = adapted(layers=2)
    blocks, optimizer = trained_blocks(model), optimizer_of(model)
    seen = []

    def look(step):
        seen.append(active_in(blocks))
        optimizer.param_groups[0]["lr"] = 1e-3 * 0.7**step

    train(model, Freezing(share=0.8, rest=None), 40, optimizer, look)
    turns = math.ceil(14 / 3)
    assert set().union(*seen[turns:]) == blocks.keys()


@pytest.mark.parametrize("rest", [5, 9])
def test_none_rests_longer_than_the_bound(rest):
    """At a constant rate two modules that hardly change would never come back."""
    model = adapted(layers=2)
    blocks = trained_blocks(model)
    groups = [{"params": [blocks[name].weight], "lr": 1e-6 if "q_proj" in name else 1e-3} for name in blocks]
    rested, most = dict.fromkeys(blocks, 0), []

    def look(step):
        active = active_in(blocks)
        assert len(active) == 3
        for name in blocks:
            rested[name] = 0 if name in active else rested[name] + 1
        most.append(max(rested.values()))

    train(model, Freezing(share=0.8, rest=rest), 60, torch.optim.AdamW(groups), look)
    assert max(most) == rest


def test_updates_that_change_nothing_teach_nothing():
    """A warm-up of the learning rate begins at zero: what trained then is not the laziest for that."""
    model = adapted(layers=2)
    blocks, optimizer = trained_blocks(model), optimizer_of(model, lr=0.0)
    schedule = Freezing(share=0.5)
    seen = []

    def look(step):
        seen.append(active_in(blocks))
        if step == 4:
            optimizer.param_groups[0]["lr"] = 1e-3

    train(model, schedule, 6, optimizer, look)
    assert seen[0] == seen[1] == seen[2] == seen[3] and seen[3].isdisjoint(seen[4])


@pytest.mark.parametrize("moments", ["keep", "drop", "move"])
def test_a_training_that_was_cut_off_begins_again_with_all_modules(moments):
    model = adapted(layers=2)
    blocks, optimizer, seen = trained_blocks(model), optimizer_of(model), []
    schedule = Freezing(share=0.8, moments=moments)
    schedule.begin(model, optimizer, 10)
    train(model, schedule, math.ceil(14 / 3), optimizer, lambda step: seen.append(active_in(blocks)))
    assert set().union(*seen) == blocks.keys() == active_in(blocks)


@pytest.mark.parametrize("moments", ["keep", "drop", "move"])
def test_going_on_in_the_process_whose_training_went_further_is_as_if_it_had_not(moments):
    """As a trainer resumes after an error: model and optimizer are restored, then the schedule begins."""

    def trained(schedule, model, optimizer, steps, state=None, each=lambda step: None):
        schedule.begin(model, optimizer, 12, state)
        for step in steps:
            model(**batch(seed=step)).loss.backward()
            schedule.before_update(step)
            optimizer.step()
            optimizer.zero_grad()
            schedule.after_update(step)
            each(step)

    def made():
        model = adapted(layers=2)
        return Freezing(share=0.7, every=2, moments=moments), model, optimizer_of(model, lr=1e-2)

    straight, saved = made(), {}
    trained(*straight, range(1, 13))
    schedule, model, optimizer = made()

    def save(step):
        if step == 5:
            parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
            saved.update({name: copy.deepcopy(part.state_dict()) for name, part in parts.items()})

    trained(schedule, model, optimizer, range(1, 12), each=save)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    trained(schedule, model, optimizer, range(6, 13), saved["schedule"])
    for part in (straight[0], schedule):
        part.end()
    ours, truth = trained_blocks(model), trained_blocks(straight[1])
    assert all(torch.equal(ours[name].weight, module.weight) for name, module in truth.items())
    for name, module in truth.items():
        state, expected = optimizer.state[ours[name].weight], straight[2].state[module.weight]
        assert state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in state)


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "embed_tokens"]])
def test_backward_ends_above_the_lowest_that_trains_also_where_the_gradient_of_the_input_is_asked_for(targets):
    """As trainers do for checkpointed activations; not where the embedding may train in another interval."""
    model = adapted(layers=4, target_modules=targets).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    blocks, inputs, seen = trained_blocks(model), [], []
    lowest = model.get_base_model().model.layers[0]
    lowest.register_forward_hook(lambda module, args, output: inputs.append(output))
    train(
        model,
        Freezing(share=0.7, rest=None),
        4,
        optimizer_of(model),
        lambda step: seen.append((active_in(blocks), inputs[0].requires_grad, inputs.clear())),
    )
    for active, reached, _ in seen:
        assert reached == ("embed_tokens" in targets[-1] or "model.layers.0.self_attn.q_proj" in active)
    assert {reached for _, reached, _ in seen} == ({True} if "embed_tokens" in targets else {True, False})
    model(**batch())
    # What was asked for holds again.
    assert inputs[0].requires_grad


def test_layers_rest_as_a_whole():
    model = adapted(layers=4, target_modules=["q_proj", "up_proj", "embed_tokens"])
    blocks = trained_blocks(model)
    seen = []
    schedule = Freezing(share=0.6, unit="layer")
    train(model, schedule, 12, optimizer_of(model), lambda step: seen.append(active_in(blocks)))
    for active in seen:
        layers = {name.rpartition(".")[0].rpartition(".")[0] for name in active}
        assert len(layers) == 2
        assert len(active) == sum(1 if layer == "" or layer == "model" else 2 for layer in layers)
    assert set().union(*seen) == blocks.keys()


class Encoders:
    """Models that are no decoders, each with a batch of its own."""

    SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}

    @classmethod
    def bert(cls):
        model = BertForSequenceClassification(BertConfig(**cls.SIZES, vocab_size=64, max_position_embeddings=32))
        return model, {"input_ids": torch.randint(64, (4, 20)), "labels": torch.tensor([0, 1, 0, 1])}

    @classmethod
    def vit(cls):
        model = ViTForImageClassification(ViTConfig(**cls.SIZES, image_size=16, patch_size=4))
        return model, {"pixel_values": torch.randn(4, 3, 16, 16), "labels": torch.tensor([0, 1, 0, 1])}


def saved_addresses(model, inputs):
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**inputs).loss
    weights = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    batch = {t.untyped_storage().data_ptr() for t in inputs.values()}
    return sum(size for address, size in kept.items() if address not in weights | batch), loss


@pytest.mark.parametrize("kind", ["bert", "vit"])
@pytest.mark.parametrize("saved_activations", ["full", "int8"])
def test_encoders_of_text_and_images_learn_and_save_less(kind, saved_activations):
    torch.manual_seed(0)
    base, inputs = getattr(Encoders, kind)()
    config = SMTConfig(
        density=0.2, block_size=8, score="random", modules_to_save=["classifier"], saved_activations=saved_activations
    )
    model = get_peft_model(base, config).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    blocks, optimizer = trained_blocks(model), optimizer_of(model, lr=1e-2)
    everything, _ = saved_addresses(model, inputs)
    schedule, losses, sizes = Freezing(share=0.9), [], []
    schedule.begin(model, optimizer, 30)
    for step in range(1, 31):
        size, loss = saved_addresses(model, inputs)
        loss.backward()
        losses.append(loss.item())
        sizes.append(size)
        assert {name for name, module in blocks.items() if module.weight.grad is not None} == active_in(blocks)
        # The head is no block: it always trains.
        head = [p for name, p in model.named_parameters() if "classifier" in name and p.requires_grad]
        assert head and all(p.grad is not None for p in head)
        optimizer.step()
        optimizer.zero_grad()
        schedule.after_update(step)
    assert len(active_in(blocks)) == len(blocks) - math.floor(0.9 * len(blocks)) == 2
    assert losses[-1] < 0.5 * losses[0]
    assert max(sizes) < everything and sum(sizes) / len(sizes) < 0.75 * everything


def test_below_the_lowest_that_trains_nothing_is_saved():
    """Backward ends there, as no input wants a gradient."""
    model = adapted(layers=5)
    blocks, inputs = trained_blocks(model), batch(rows=4, length=16)
    sizes = {}
    for layer in range(5):
        for name, module in blocks.items():
            module.weight.requires_grad_(name == f"model.layers.{layer}.mlp.down_proj")
        sizes[layer], loss = saved_addresses(model, inputs)
        loss.backward()
    # Each layer above keeps as much; the uppermost one alone has no attention above it, which keeps rotations.
    layers = [sizes[layer] - sizes[layer + 1] for layer in range(3)]
    assert layers[0] == layers[1] == layers[2] > sizes[4]


@pytest.mark.parametrize("how", ["eager", "batched_mm", "grouped_mm"])
def test_experts_and_tables_that_rest_save_nothing(how):
    torch.manual_seed(0)
    base = tiny_qwen3_moe()
    base.set_experts_implementation(how)
    config = SMTConfig(
        target_modules=["embed_tokens"], target_parameters=EXPERTS, density=0.2, block_size=4, score="random"
    )
    model = get_peft_model(base, config).train()
    blocks, inputs = trained_blocks(model), batch()
    for module in blocks.values():
        module.weight.requires_grad_(False)
    size, loss = saved_addresses(model, inputs)
    assert size == 0 and not loss.requires_grad
    top = [name for name in blocks if name.startswith("model.layers.1")]
    for name in top:
        blocks[name].weight.requires_grad_(True)
    model(**inputs).loss.backward()
    assert {name for name in blocks if blocks[name].weight.grad is not None} == set(top)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"share": 0.96}, "share must be above 0 and at most 0.95, got 0.96"),
        ({"share": 0}, "share must be above 0"),
        ({"share": "0.9"}, "share must be above 0 .* got '0.9'"),
        ({"every": 0}, "every must be at least 1"),
        ({"every": 1.5}, "every must be a whole number, got 1.5"),
        ({"every": None}, "every must be a whole number, got None"),
        ({"rest": True}, "rest must be a whole number, got True"),
        ({"seed": "0"}, "seed must be a whole number"),
        ({"rest": 0}, "rest must be at least 1"),
        ({"unit": "block"}, "unit must be one of module, layer, got 'block'"),
        ({"moments": "burn"}, "moments must be one of keep, drop, move"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(wrong, message):
    with pytest.raises(ValueError, match=message):
        Freezing(**wrong)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"share": 0.05}, "share=0.05 of 14 modules with blocks is less than one"),
        ({"share": 0.9, "rest": 3}, "rest=3, but with share=0.9 it takes 7 intervals"),
    ],
)
def test_settings_that_no_module_can_follow_are_refused_by_name(settings, message):
    model = adapted(layers=2)
    with pytest.raises(ValueError, match=message):
        Freezing(**settings).begin(model, optimizer_of(model), 10)


@pytest.mark.parametrize("schedule", [Freezing(share=0.5, every=3), LayerSampling(layers=2, every=3)])
def test_a_reference_without_the_adapter_wakes_nothing_that_rests(schedule):
    """As DPO computes one in every step, before or after the pass whose gradient is taken."""
    model = adapted()
    blocks, optimizer = trained_blocks(model), optimizer_of(model)
    schedule.begin(model, optimizer, 3)
    resting = blocks.keys() - active_in(blocks)
    for step in (1, 2):
        with torch.no_grad(), model.disable_adapter():
            model(**batch(seed=step))
        model(**batch(seed=step)).loss.backward()
        # Before anything is clipped.
        assert {name for name, module in blocks.items() if module.weight.grad is None} == resting
        schedule.before_update(step)
        optimizer.step()
        optimizer.zero_grad()
        schedule.after_update(step)
    assert resting and {name for name, module in blocks.items() if not module.weight.any()} == resting
    schedule.end()
    with model.disable_adapter():
        pass
    assert active_in(blocks) == blocks.keys()


def test_an_adapter_that_is_switched_away_and_back_does_not_wake_what_is_frozen():
    model = adapted()
    blocks, optimizer = trained_blocks(model), optimizer_of(model)
    model.add_adapter("other", SMTConfig(block_size=4, density=0.05, score="random"))
    schedule = Freezing(share=0.5, every=3)
    schedule.begin(model, optimizer, 3)
    active = active_in(blocks)
    model.set_adapter("other")
    model.set_adapter("default")
    model(**batch()).loss.backward()
    schedule.before_update(1)
    optimizer.step()
    assert {name for name, module in blocks.items() if module.weight.any()} == active


@pytest.mark.parametrize("moments", ["keep", "move"])
def test_an_optimizer_without_the_blocks_is_refused_and_nothing_is_frozen(moments):
    model = adapted(layers=2)
    other = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1)
    with pytest.raises(ValueError, match=r"SGD does not hold the blocks of .*q_proj \(14 of 14 modules are missing\)"):
        Freezing(share=0.5, moments=moments).begin(model, other, 10)
    blocks = trained_blocks(model)
    assert active_in(blocks) == blocks.keys()


def test_two_schedules_that_decide_what_trains_are_refused():
    with pytest.raises(ValueError, match="freezing and layer_sampling both decide which blocks train"):
        ScheduleCallback(Freezing(), LayerSampling())


@pytest.mark.parametrize("moments", ["keep", "drop", "move"])
def test_a_plain_trainer_resumes_as_if_it_had_not_stopped(tmp_path, moments):
    """From the middle of an interval, so that what was there at its start must be in the checkpoint."""

    def trained(steps, resume=None):
        torch.manual_seed(0)
        model = adapted(layers=2)
        rows = [{"input_ids": torch.arange(6) + i, "labels": torch.arange(6) + i} for i in range(16)]
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=steps,
            save_steps=4,
            learning_rate=1e-2,
            per_device_train_batch_size=2,
            use_cpu=True,
            disable_tqdm=True,
            report_to=[],
        )
        callback = ScheduleCallback(Freezing(share=0.7, every=3, moments=moments, rest=5))
        Trainer(model, arguments, train_dataset=rows, callbacks=[callback]).train(resume_from_checkpoint=resume)
        return {name: blocks.weight.detach().clone() for name, blocks in trained_blocks(model).items()}

    straight = trained(12)
    resumed = trained(12, resume=str(tmp_path / "checkpoint-4"))
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    assert all(bool(weight.any()) for weight in straight.values())


def test_a_checkpoint_of_another_unit_is_refused():
    model = adapted(layers=2)
    optimizer = optimizer_of(model)
    schedule = Freezing(share=0.5)
    schedule.begin(model, optimizer, 4)
    state = schedule.state_dict()
    schedule.end()
    with pytest.raises(ValueError, match="unit='layer'"):
        Freezing(share=0.5, unit="layer").begin(model, optimizer, 4, state)
