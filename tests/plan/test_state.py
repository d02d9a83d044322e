"""What lives from step to step: every optimizer of a run, and weights that are packed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from smt_peft.optim import SMTAdamW
from smt_peft.plan.packed import Packing
from smt_peft.plan.state import optimizer
from smt_peft.training.yaml.schema import SMT_OPTIMIZERS

SHAPES = [(6, 16, 16), (1, 8, 40), (24, 40), (24,)]


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(shape)) for shape in SHAPES]


def stored(made: torch.optim.Optimizer, trained: list[nn.Parameter]) -> int:
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    made.step()
    values = [value for state in made.state.values() for value in state.values()]
    return sum(value.nbytes for value in values if isinstance(value, torch.Tensor))


@pytest.mark.parametrize(("name", "state_dtype"), SMT_OPTIMIZERS.items())
def test_our_optimizer_keeps_what_is_counted(name, state_dtype):
    trained = parameters()
    kept = stored(SMTAdamW(trained, state_dtype=state_dtype), trained)
    assert kept == sum(map(optimizer(name).moments, trained))


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("adamw_torch", torch.optim.AdamW),
        ("adamw_torch_fused", lambda params: torch.optim.AdamW(params, fused=True)),
        ("sgd", torch.optim.SGD),
        ("adagrad", torch.optim.Adagrad),
        ("rmsprop", torch.optim.RMSprop),
    ],
)
def test_the_optimizers_of_pytorch_keep_what_is_counted(name, make):
    trained = parameters()
    assert stored(make(trained), trained) == sum(map(optimizer(name).moments, trained))


def test_adafactor_keeps_what_is_counted():
    from transformers.optimization import Adafactor

    trained = parameters()
    made = Adafactor(trained, lr=1e-3, scale_parameter=False, relative_step=False)
    assert stored(made, trained) == sum(map(optimizer("adafactor").moments, trained))


def test_an_unknown_optimizer_is_taken_for_adam_and_says_so():
    unknown, known = optimizer("galore_adamw"), optimizer("adamw_torch")
    weight = torch.ones(8, 8)
    assert unknown.moments(weight) == known.moments(weight)
    assert "galore_adamw" in unknown.assumed
    assert not known.assumed


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("code", ["nf4", "fp4"])
def test_four_bits_are_stored_in_as_many_bytes(code, double):
    bnb = pytest.importorskip("bitsandbytes")
    rows, cols = 96, 200
    settings = {"quant_type": code, "compress_statistics": double}
    packed = bnb.nn.Params4bit(torch.randn(rows, cols), requires_grad=False, **settings).to("cpu")
    state = packed.quant_state
    tensors = [packed.data, state.absmax, state.code]
    if double:
        tensors += [state.offset, state.state2.absmax, state.state2.code]
    assert sum(tensor.nbytes for tensor in tensors) == Packing(code, 4, double).bytes(rows, cols)
