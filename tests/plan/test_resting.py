"""What layers take that train in turn: counted without values as the allocator gives it out with them."""

from __future__ import annotations

from pathlib import Path

import pytest
from counted import DENSITY, SIZE, Model
from test_activations import GENERATOR
from test_plan import TINY, write_run

from benchmarks.cost import methods
from benchmarks.cost.memory import step_memory
from benchmarks.cost.methods import smt_config
from benchmarks.cost.model import random_batch
from smt_peft.plan.activations import step
from smt_peft.plan.device import Device
from smt_peft.plan.methods import assumed_selection, empty, smt
from smt_peft.plan.plan import Plan, plan
from smt_peft.plan.resting import Turn
from smt_peft.plan.state import optimizer, state_of
from smt_peft.plan.table import table
from smt_peft.schedules import LayerSampling
from smt_peft.training.yaml.schema import load_run


def lowest() -> LayerSampling:
    return LayerSampling(layers=1, every=1, order="ascending")


def measured(model: Model) -> dict:
    def start(note):
        training = methods.smt(DENSITY).started(model.build, note)
        lowest().begin(training.model, training.optimizer, 1)
        return training

    return step_memory(start, SIZE)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_in_which_layers_rest_is_counted_to_the_byte(checkpointing):
    model = Model(checkpointing=checkpointing)
    sized = empty(model.build)
    selection = assumed_selection(sized, smt_config(DENSITY))
    sized = smt(sized, smt_config(DENSITY), selection)
    Turn(lowest()).settle(sized, selection)
    own = optimizer("adamw_torch")
    counted = step(
        sized,
        lambda: random_batch(sized, SIZE, False),
        Device("cpu"),
        temporaries=own.temporaries([p for p in sized.parameters() if p.requires_grad]),
    )
    state, truth = state_of(sized, own), measured(model)
    assert counted.gradients == truth["gradient_bytes"]
    # Of every layer that is recomputed, the state of the random generator lies on the CPU.
    assert counted.saved == truth["saved_bytes"] - GENERATOR * 2 * checkpointing
    assert sum(state.weights.values()) == truth["weights_bytes"]
    assert state.trained + state.tables + state.moments == truth["training_bytes"]
    assert abs((state.total + counted.peak) / truth["peak_bytes"] - 1) < 0.01


def planned(directory: Path, depth: int, **block) -> tuple[Plan, Plan]:
    """Without and with a block for the turns."""
    run = write_run(directory, {**TINY, "num_hidden_layers": depth})
    turns = [f"layer_sampling={{{', '.join(f'{key}: {value}' for key, value in block.items())}}}"]
    return plan(load_run(run)), plan(load_run(run, turns))


@pytest.mark.parametrize("layers", [4, 12])
def test_moments_and_gradients_are_those_of_the_layers_that_train(tmp_path, layers):
    """Also where some layers stand for others."""
    whole, turns = planned(tmp_path, layers, layers=1)
    assert turns.smt.trainable == whole.smt.trainable and turns.smt.state.trained == whole.smt.state.trained
    assert turns.smt.state.moments * layers == whole.smt.state.moments
    assert turns.smt.gradients * layers == whole.smt.gradients
    assert turns.smt.step.saved < whole.smt.step.saved and turns.peak <= whole.peak
    assert [each.peak() for each in turns.methods[1:]] == [each.peak() for each in whole.methods[1:]]
    assert any("the lowest, with which most is saved" in line for line in turns.assumed)
    assert not any("layer_sampling" in line for line in whole.assumed)


def test_layers_that_stand_for_others_count_as_those_would(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    _, abridged = planned(tmp_path / "a", 8, layers=2)
    monkeypatch.setattr("smt_peft.plan.layers._kept", lambda alike: (len(alike), 1))
    (tmp_path / "b").mkdir()
    _, whole = planned(tmp_path / "b", 8, layers=2)
    assert abridged.smt.state == whole.smt.state and abridged.smt.step == whole.smt.step


@pytest.mark.parametrize(
    ("block", "told"),
    [
        ("freezing={share: 0.8}", "freezing: a step in which nothing is frozen"),
        ("regrowth={every: 20}", "regrowth: a step that gathers no scores"),
    ],
)
def test_what_is_not_counted_of_a_schedule_is_told(tmp_path, block, told):
    run = write_run(tmp_path, TINY)
    assert any(told in line for line in plan(load_run(run, ["optim=smt_adamw", block])).assumed)


def test_a_dry_run_shows_it(tmp_path):
    _, turns = planned(tmp_path, 4, layers=1, moments="move")
    assert "moments that were moved to the CPU are" in " ".join(table(turns).split())
