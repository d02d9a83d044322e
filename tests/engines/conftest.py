"""What the tests of engines share: what one process learns from the whole batches, in fp64 and in less."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from lesson import adamw, student, train, trainable
from peft import get_peft_model_state_dict
from torch import Tensor


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass
class Alone:
    """A training in one process."""

    losses: Tensor
    adapter: dict[str, Tensor]

    @property
    def deltas(self) -> Tensor:
        return flat(self.adapter)


def flat(adapter: dict[str, Tensor]) -> Tensor:
    return torch.cat([adapter[key].flatten() for key in sorted(adapter) if key.endswith(".weight")])


def alone(dtype: torch.dtype, through=lambda model: model) -> Alone:
    model = student(dtype)
    if dtype == torch.float64:
        model.double()  # PEFT keeps adapters in fp32
    losses = train(through(model), adamw(trainable(model)))
    adapter = {key: tensor.clone() for key, tensor in get_peft_model_state_dict(model).items()}
    return Alone(torch.tensor(losses, dtype=torch.float64), adapter)


@pytest.fixture(scope="session")
def truth() -> Alone:
    return alone(torch.float64)


@pytest.fixture(scope="session")
def single() -> Alone:
    return alone(torch.float32)


@pytest.fixture(scope="session")
def single_bf16() -> Alone:
    """Weights and blocks in bf16 for the pass, the blocks' own values and their gradients in fp32."""

    def through(model):
        names = dict(model.named_parameters())

        def call(**rows):
            return torch.func.functional_call(model, {name: p.bfloat16() for name, p in names.items()}, kwargs=rows)

        call.train = model.train
        return call

    return alone(torch.float32, through)
