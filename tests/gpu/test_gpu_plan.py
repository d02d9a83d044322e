"""What `smt plan` counts without a GPU, against what the GPU's allocator gives out."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from benchmarks.cost import methods
from benchmarks.cost.memory import step_memory
from benchmarks.cost.methods import Method
from benchmarks.cost.model import checkpointed, llama, random_batch
from smt_peft.optim import SMTAdamW
from smt_peft.plan.activations import step
from smt_peft.plan.device import Device
from smt_peft.plan.layers import Layers
from smt_peft.plan.methods import assumed_selection, empty, full, smt
from smt_peft.plan.state import optimizer, state_of

pytestmark = pytest.mark.gpu
SIZE = (2, 1024)
LLAMA = {
    "vocab_size": 8192,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
}
CONFIG = methods.smt_config(0.01)
RANK = 16
METHODS: dict[str, tuple[Method, str]] = {
    "smt": (methods.smt(0.01, optimizer=SMTAdamW), "smt_adamw"),
    "lora": (methods.lora(RANK), "adamw_torch_fused"),
    "full": (methods.full(), "adamw_torch_fused"),
}


def without_values(name: str, build):
    base = empty(build)
    if name == "smt":
        return smt(base, CONFIG, assumed_selection(base, CONFIG))
    if name == "full":
        return full(base)
    # As the benchmark trains it: adapters in the dtype of the model.
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
    return get_peft_model(base, config, autocast_adapter_dtype=False).to("meta").train()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_a_step_takes_what_was_planned(name, checkpointing):
    method, optim = METHODS[name]

    def build(device: str = "cuda"):
        return checkpointed(llama(LLAMA, device, torch.bfloat16), checkpointing)

    sized = without_values(name, lambda: build("meta"))
    own = optimizer(optim, "cuda")
    taken = own.temporaries(Layers().trained(sized))
    planned = step(sized, lambda: random_batch(sized, SIZE, False), Device("cuda"), temporaries=taken)
    truth = step_memory(lambda note: method.started(build, note), SIZE, "cuda")
    assert planned.gradients == pytest.approx(truth["gradient_bytes"], rel=0.01)
    assert planned.saved == pytest.approx(truth["saved_bytes"], rel=0.1)
    assert state_of(sized, own).total + planned.peak == pytest.approx(truth["peak_bytes"], rel=0.1)
