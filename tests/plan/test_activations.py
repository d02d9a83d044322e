"""What is counted without values is what the allocator gives out with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from counted import DENSITY, RANK, SIZE, Model, counted
from peft.tuners.lora import LoraLayer

from benchmarks.cost import methods, warmup
from benchmarks.cost.memory import step_memory, trace
from benchmarks.cost.methods import Method
from benchmarks.cost.model import Case, random_batch
from smt_peft.optim import MeZO
from smt_peft.plan.methods import empty
from smt_peft.plan.warmup import warm_up

# Made anew for every model, as PEFT writes the names of what it has found into a config.
MEASURED: dict[str, Callable[[], Method]] = {
    "smt": lambda: methods.smt(DENSITY),
    "rosa": lambda: methods.smt(DENSITY, lora_rank=RANK),
    "smt, int8": lambda: methods.smt(DENSITY, saved_activations="int8"),
    "lora": lambda: methods.lora(RANK),
    "dora": lambda: methods.lora(RANK, use_dora=True),
    "full": methods.full,
}
# Scored by weights alone; with sides above 256, up to which LAPACK takes a copy that is not seen without values.
BY_WEIGHTS = ("magnitude", "small_magnitude", "low_rank_magnitude")
SCORES = [score for score in warmup.SCORES if score not in BY_WEIGHTS]
# Kept on the CPU whatever the device: of a recomputed layer the state of the random generator, and of LoRA's scaling
# the factor, a scalar of 8 bytes. The count is of what lies on the device.
GENERATOR, FACTOR = torch.get_rng_state().nbytes, 8


def kept_on_the_cpu(model: Model, method: Method) -> int:
    trained = method.started(model.build).model
    layers = sum(isinstance(module, LoraLayer) for module in trained.modules())
    return GENERATOR * trained.config.num_hidden_layers * model.checkpointing + FACTOR * layers


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", MEASURED)
def test_a_step_of_a_llama_is_counted_to_the_byte(method, checkpointing):
    model = Model(checkpointing=checkpointing)
    state, step = counted(model, method)
    truth = step_memory(lambda note: MEASURED[method]().started(model.build, note), SIZE)
    assert step.gradients == truth["gradient_bytes"]
    assert step.phase == truth["peak_phase"]
    assert step.saved == truth["saved_bytes"] - kept_on_the_cpu(model, MEASURED[method]())
    assert sum(state.weights.values()) == truth["weights_bytes"]
    peak = state.total + step.peak
    assert abs(peak / truth["peak_bytes"] - 1) < 0.01


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ["smt", "lora", "full"])
def test_a_step_of_an_encoder_is_counted(method, checkpointing):
    model = Model("bert", checkpointing)
    state, step = counted(model, method)
    truth = step_memory(lambda note: MEASURED[method]().started(model.build, note), SIZE)
    assert step.saved == truth["saved_bytes"] - kept_on_the_cpu(model, MEASURED[method]())
    assert abs((state.total + step.peak) / truth["peak_bytes"] - 1) < 0.1


@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.parametrize("method", ["smt", "lora"])
def test_a_step_without_a_backward_pass_is_counted(method, name):
    model = Model(name)
    state, step = counted(model, method, "mezo")
    forward_only = replace(MEASURED[method](), optimizer=MeZO, backward=False)
    truth = step_memory(lambda note: forward_only.started(model.build, note), SIZE)
    assert step.gradients == state.moments == truth["gradient_bytes"] == 0
    assert step.phase == truth["peak_phase"] == "forward"
    # What is kept besides: an fp64 number; the loss is in fp64 as well, 4 bytes more than counted.
    assert step.saved == truth["saved_bytes"] - 4
    assert abs((state.total + step.peak) / truth["peak_bytes"] - 1) < 0.01


@pytest.mark.parametrize("method", MEASURED)
def test_what_lives_from_step_to_step_is_stored_in_as_many_bytes(method):
    model = Model()
    state, _ = counted(model, method)
    training = MEASURED[method]().started(model.build)
    training.step(SIZE)
    trained = [parameter for parameter in training.model.parameters() if parameter.requires_grad]
    moments = [value for each in training.optimizer.state.values() for value in each.values()]
    assert state.trained == (0 if method == "full" else sum(parameter.nbytes for parameter in trained))
    assert state.moments == sum(moment.nbytes for moment in moments)


@pytest.mark.parametrize("score", SCORES)
def test_the_warm_up_pass_takes_what_is_counted(score):
    case = Case(hidden=128, layers=2, tokens=64, density=0.02)
    span = trace(lambda note: warmup.choose_traced(case, score, note))[-1]
    model = empty(case.build)
    planned = warm_up(model, warmup.config(case, score), lambda: random_batch(model, case.batch, False))
    if score == "random":
        assert planned == 0
    else:
        assert planned == pytest.approx(span.peak - span.start, rel=0.1)


@pytest.mark.parametrize("score", BY_WEIGHTS)
def test_scoring_weights_takes_what_is_counted_with_the_scores_of_all_matrices(score):
    case = Case(hidden=512, layers=2, tokens=64, density=0.02)
    span = trace(lambda note: warmup.choose_traced(case, score, note))[-1]
    model = empty(case.build)
    planned = warm_up(model, warmup.config(case, score), lambda: random_batch(model, case.batch, False))
    assert planned == pytest.approx(span.peak - span.start, rel=0.1)
