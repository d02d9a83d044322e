"""Layer sampling: which layers train, and what the optimizer keeps of the others."""

from __future__ import annotations

import pytest
import torch
from scheduled import adapted, train
from transformers import Trainer, TrainingArguments

from smt_peft.optim import SMTAdamW
from smt_peft.schedules import LayerSampling, ScheduleCallback
from smt_peft.schedules.trained import by_layer, trained_blocks


def optimizer_of(model, kind=torch.optim.AdamW):
    return kind([p for p in model.parameters() if p.requires_grad], lr=1e-3)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, SMTAdamW])
def test_as_many_layers_train_as_asked_for_and_others_after_a_period(kind):
    model = adapted(layers=4)
    blocks, optimizer = trained_blocks(model), optimizer_of(model, kind)
    layers, seen = by_layer(blocks), []

    def look(step):
        with_gradient = {name for name, module in blocks.items() if module.weight.grad is not None}
        seen.append({layer for layer, names in layers.items() if with_gradient & set(names)})
        assert with_gradient == {name for layer in seen[-1] for name in layers[layer]}
        assert all(module.weight.requires_grad == (name in with_gradient) for name, module in blocks.items())

    train(model, LayerSampling(layers=2, every=3), 30, optimizer, look)
    assert all(len(active) == 2 for active in seen)
    assert all(seen[start] == seen[start + 1] == seen[start + 2] for start in range(0, 30, 3))
    assert len({frozenset(active) for active in seen}) > 3
    assert set().union(*seen) == set(layers)


def test_the_optimizer_keeps_nothing_of_layers_that_rest():
    model = adapted()
    blocks, optimizer = trained_blocks(model), optimizer_of(model)

    def look(step):
        kept = {name for name, module in blocks.items() if optimizer.state.get(module.weight)}
        assert kept <= {name for name, module in blocks.items() if module.weight.requires_grad}
        steps = {int(optimizer.state[blocks[name].weight]["step"]) for name in kept}
        # Dropped moments begin anew, with a step count of their own, unless the layer was drawn again at once.
        assert all(count <= step - 1 for count in steps)

    train(model, LayerSampling(layers=1, every=2), 12, optimizer, look)


def test_resting_blocks_do_not_change():
    model = adapted()
    blocks, optimizer = trained_blocks(model), optimizer_of(model)
    before = {}

    def look(step):
        for name, module in blocks.items():
            if name in before and not resting[name]:
                assert torch.equal(module.weight, before[name])
            before[name] = module.weight.detach().clone()
            resting[name] = module.weight.requires_grad

    resting: dict[str, bool] = {}
    train(model, LayerSampling(layers=1, every=2), 8, optimizer, look)
    assert all(module.weight.requires_grad for module in blocks.values())


def test_moved_moments_come_back_as_they_were():
    """A layer that rests for a while and goes on equals one that was never away, if the others do not move."""
    model = adapted(layers=2)
    blocks, optimizer = trained_blocks(model), optimizer_of(model)
    schedule = LayerSampling(layers=1, every=1, moments="move")
    away = {}

    def look(step):
        for name, module in blocks.items():
            state = optimizer.state.get(module.weight)
            if name in away and state and module.weight.requires_grad:
                for key, value in away.pop(name).items():
                    assert torch.equal(torch.as_tensor(state[key]), value), (name, key)
            if name not in away and (kept := schedule.state_dict()["moments"].get(name)):
                away[name] = {key: torch.as_tensor(value).clone() for key, value in kept.items()}

    train(model, schedule, 10, optimizer, look)
    assert not schedule.state_dict()["moments"]


def test_more_layers_than_there_are_is_refused_by_name():
    model = adapted(layers=2)
    with pytest.raises(ValueError, match="layers=3 train at a time, but only 2"):
        LayerSampling(layers=3).begin(model, optimizer_of(model), 10)


@pytest.mark.parametrize("wrong", [{"layers": 0}, {"every": 0}, {"moments": "burn"}])
def test_settings_out_of_range_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        LayerSampling(**wrong)


def test_a_plain_trainer_resumes_as_if_it_had_not_stopped(tmp_path):
    """With moments moved away, so that they must be in the checkpoint."""

    def trained(directory, steps, resume=None):
        torch.manual_seed(0)
        model = adapted()
        rows = [{"input_ids": torch.arange(6) + i, "labels": torch.arange(6) + i} for i in range(16)]
        arguments = TrainingArguments(
            output_dir=str(directory),
            max_steps=steps,
            save_steps=5,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            per_device_train_batch_size=2,
            use_cpu=True,
            disable_tqdm=True,
            report_to=[],
        )
        callback = ScheduleCallback(LayerSampling(layers=2, every=2, moments="move"))
        Trainer(model, arguments, train_dataset=rows, callbacks=[callback]).train(resume_from_checkpoint=resume)
        return {name: blocks.weight.detach().clone() for name, blocks in trained_blocks(model).items()}

    straight = trained(tmp_path / "a", 10)
    resumed = trained(tmp_path / "a", 10, resume=str(tmp_path / "a" / "checkpoint-5"))
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    assert any(bool(weight.any()) for weight in straight.values())


def test_a_checkpoint_without_the_schedule_is_refused(tmp_path):
    test_a_plain_trainer_resumes_as_if_it_had_not_stopped(tmp_path)
    (tmp_path / "a" / "checkpoint-5" / "schedules.pt").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-5 has no schedules.pt"):
        callback = ScheduleCallback(LayerSampling())
        arguments = TrainingArguments(str(tmp_path / "a"), max_steps=10, use_cpu=True, report_to=[], disable_tqdm=True)
        rows = [{"input_ids": torch.arange(6), "labels": torch.arange(6)}] * 4
        trainer = Trainer(adapted(), arguments, train_dataset=rows, callbacks=[callback])
        trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-5"))
