"""Schedules in a plain trainer of Transformers: checkpoints, and what is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from scheduled import adapted
from torch import nn
from transformers import Trainer, TrainingArguments

from smt_peft.schedules import LayerSampling, Regrowth, Schedule, ScheduleCallback
from smt_peft.schedules.callback import check_engine
from smt_peft.schedules.trained import by_layer, trained_blocks


class Deciding(Schedule):
    name = "deciding"
    decides_what_trains = True

    def begin(self, model, optimizer, total_steps, state=None):
        pass


class Looking(Schedule):
    """Sees all blocks, as what decides what trains begins after it."""

    name = "looking"

    def begin(self, model, optimizer, total_steps, state=None):
        self.found = trained_blocks(model)


def made(directory: Path, steps: int, *schedules: Schedule, model: nn.Module | None = None, **settings) -> Trainer:
    torch.manual_seed(0)
    rows = [{"input_ids": torch.arange(6) + i, "labels": torch.arange(6) + i} for i in range(16)]
    arguments = TrainingArguments(
        output_dir=str(directory),
        **{
            "max_steps": steps,
            "save_steps": 5,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "linear",
            "weight_decay": 0.1,
            "per_device_train_batch_size": 2,
            "use_cpu": True,
            "disable_tqdm": True,
            "report_to": [],
            "logging_steps": 1,
            **settings,
        },
    )
    callbacks = [ScheduleCallback(*schedules)] if schedules else []
    return Trainer(model or adapted(), arguments, train_dataset=rows, callbacks=callbacks)


def outcome(trainer: Trainer) -> tuple[dict[str, torch.Tensor], dict[int, float]]:
    losses = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    return {name: blocks.weight.detach().clone() for name, blocks in trained_blocks(trainer.model).items()}, losses


# Step 5, where the checkpoint is, lies within a period of 2, and is the end of one of 5.
@pytest.mark.parametrize("every", [2, 5])
@pytest.mark.parametrize("order", ["draw", "shuffle"])
@pytest.mark.parametrize("keeping", ["drop", "move"])
def test_a_plain_trainer_resumes_as_if_it_had_not_stopped(tmp_path, every, order, keeping):
    def trained(resume=None):
        schedule = LayerSampling(layers=1, every=every, order=order, moments=keeping)
        trainer = made(tmp_path, 10, schedule, gradient_accumulation_steps=2)
        trainer.train(resume_from_checkpoint=resume)
        return outcome(trainer)

    weights, losses = trained()
    again, others = trained(str(tmp_path / "checkpoint-5"))
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert losses == others and len(losses) == 10
    assert sum(bool(weight.any()) for weight in weights.values()) > len(weights) // 4


def test_a_checkpoint_holds_the_moments_of_the_layers_that_train_and_beside_it_those_that_were_moved(tmp_path):
    trainer = made(tmp_path, 6, LayerSampling(layers=1, every=2, order="ascending", moments="move"))
    trainer.train()
    saved = torch.load(tmp_path / "checkpoint-5" / "optimizer.pt", weights_only=True)
    beside = torch.load(tmp_path / "checkpoint-5" / "schedules.pt", weights_only=True)["layer_sampling"]
    layers = by_layer(trained_blocks(trainer.model))
    assert len(saved["state"]) == len(layers["model.layers.2"])
    assert sum(len(group["params"]) for group in saved["param_groups"]) == sum(map(len, layers.values()))
    assert beside["period"] == 2
    assert set(beside["moments"]) == {*layers["model.layers.0"], *layers["model.layers.1"]}


def test_a_trainer_without_schedules_trains_everything(tmp_path):
    """And a schedule with all layers in one period gives the same numbers."""
    plain = made(tmp_path / "a", 4)
    plain.train()
    whole = made(tmp_path / "b", 4, LayerSampling(layers=4, every=10))
    whole.train()
    weights, losses = outcome(plain)
    others, logged = outcome(whole)
    assert losses == logged and all(torch.equal(weights[name], others[name]) for name in weights)


def test_a_trainer_trains_again_after_it_was_interrupted(tmp_path):
    class Broken(Exception):
        pass

    schedule = LayerSampling(layers=1, every=1)
    trainer = made(tmp_path, 4, schedule)
    before, trainer.training_step = trainer.training_step, lambda *a, **k: (_ for _ in ()).throw(Broken)
    with pytest.raises(Broken):
        trainer.train()
    trainer.training_step = before
    trainer.train()
    assert all(blocks.weight.requires_grad for blocks in trained_blocks(trainer.model).values())


def test_a_checkpoint_without_the_schedule_is_refused(tmp_path):
    made(tmp_path, 5).train()
    with pytest.raises(ValueError, match=r"checkpoint-5 has no schedules.pt"):
        made(tmp_path, 10, LayerSampling()).train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))


def test_a_checkpoint_elsewhere_is_resumed_from_where_the_arguments_name_it(tmp_path):
    made(tmp_path / "a", 5, LayerSampling(every=2)).train()
    checkpoint = str(tmp_path / "a" / "checkpoint-5")
    with pytest.raises(ValueError, match=r"TrainingArguments\(resume_from_checkpoint"):
        made(tmp_path / "b", 10, LayerSampling(every=2)).train(resume_from_checkpoint=checkpoint)
    trainer = made(tmp_path / "b", 10, LayerSampling(every=2), resume_from_checkpoint=checkpoint)
    trainer.train(resume_from_checkpoint=checkpoint)
    assert trainer.state.global_step == 10


def test_two_schedules_that_decide_what_trains_are_refused_by_name():
    with pytest.raises(ValueError, match="layer_sampling and deciding both decide which blocks train"):
        ScheduleCallback(LayerSampling(), Deciding())


def test_what_decides_what_trains_begins_last(tmp_path):
    looking = Looking()
    made(tmp_path, 1, LayerSampling(layers=1), looking).train()
    assert len(by_layer(looking.found)) == 4


ARGUMENTS = {"deepspeed": None, "fsdp": None, "world_size": 1, "ddp_find_unused_parameters": None}


@pytest.mark.parametrize(
    ("changed", "environment", "message"),
    [
        ({"deepspeed": "zero2.json"}, {}, "layer_sampling changes what trains, which DeepSpeed does not follow"),
        ({"fsdp": "full_shard"}, {}, "layer_sampling changes what trains, which FSDP does not follow"),
        ({}, {"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed"),
        ({}, {"ACCELERATE_USE_FSDP": "true"}, "FSDP"),
        ({"world_size": 2}, {}, "set ddp_find_unused_parameters: true"),
    ],
)
def test_engines_that_hold_on_to_every_gradient_are_refused_by_name(monkeypatch, changed, environment, message):
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(ValueError, match=message):
        check_engine(SimpleNamespace(**ARGUMENTS | changed), [LayerSampling()])


@pytest.mark.parametrize(
    ("schedule", "changed"),
    [
        (LayerSampling(), {}),
        (LayerSampling(), {"world_size": 2, "ddp_find_unused_parameters": True}),
        (Regrowth(), {"world_size": 2}),
    ],
)
def test_ddp_need_not_look_for_parameters_where_none_rests(schedule, changed):
    check_engine(SimpleNamespace(**ARGUMENTS | changed), [schedule])
