"""A packed base: what is counted without values is what bitsandbytes stores, and takes in a step."""

from __future__ import annotations

import pytest
import torch
from counted import DENSITY, LLAMA, RANK, SIZE, Model, lora_config
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from benchmarks.cost import methods as measured
from benchmarks.cost.memory import step_memory
from benchmarks.cost.model import checkpointed, llama, random_batch
from smt_peft.plan import methods
from smt_peft.plan.activations import step
from smt_peft.plan.layers import Layers
from smt_peft.plan.packed import Packing, pack
from smt_peft.plan.state import optimizer, state_of

PACKINGS = {
    "nf4": (Packing("nf4", 4), {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
    "fp4, double": (
        Packing("fp4", 4, True),
        {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    ),
    "int8": (Packing("int8", 8), {"load_in_8bit": True}),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> str:
    directory = str(tmp_path_factory.mktemp("model"))
    llama(LLAMA, "cpu", torch.float32).save_pretrained(directory)
    return directory


def quantised(directory: str, settings: dict, checkpointing: bool) -> nn.Module:
    config = BitsAndBytesConfig(**settings, bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, quantization_config=config, device_map={"": "cpu"}
    )
    model.config.use_cache = False
    return checkpointed(model.requires_grad_(False).train(), checkpointing)


def stored(model: nn.Module) -> int:
    """Bytes of all storages, those of codes and scales included."""
    found: dict[int, int] = {}

    def see(value: object) -> None:
        if isinstance(value, torch.Tensor):
            found[value.untyped_storage()._cdata] = value.untyped_storage().nbytes()

    for module in model.modules():
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            states = [tensor, *vars(tensor).values(), getattr(tensor, "quant_state", None)]
            states += [getattr(state, "state2", None) for state in states]
            for state in states:
                see(state)
                for value in vars(state).values() if hasattr(state, "absmax") else ():
                    see(value)
    return sum(found.values())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ["smt", "lora"])
@pytest.mark.parametrize("packing", PACKINGS)
def test_a_step_on_a_packed_base_is_counted(saved, packing, method, checkpointing):
    pytest.importorskip("bitsandbytes")
    form, settings = PACKINGS[packing]
    made = measured.smt(DENSITY) if method == "smt" else measured.lora(RANK)
    truth = step_memory(lambda note: made.started(lambda: quantised(saved, settings, checkpointing), note), SIZE)
    base = pack(methods.empty(Model(checkpointing=checkpointing).build), form)
    if method == "smt":
        config = measured.smt_config(DENSITY)
        sized = methods.smt(base, config, methods.assumed_selection(base, config))
    else:
        sized = methods.lora(base, lora_config(False))
    own = optimizer("adamw_torch")
    state, taken = state_of(sized, own), own.temporaries(Layers().trained(sized))
    found = step(sized, lambda: random_batch(sized, SIZE, False), temporaries=taken)
    assert found.gradients == truth["gradient_bytes"]
    assert state.total - sum(state.weights.values()) == truth["training_bytes"]
    # The loader's threads allocate the floats and this one frees them, so the base is not in this trace.
    above = truth["peak_bytes"] - truth["weights_bytes"] - truth["training_bytes"]
    assert found.peak == pytest.approx(above, rel=0.02)
    assert found.phase == truth["peak_phase"]


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_packed_base_is_stored_in_as_many_bytes(saved, packing):
    pytest.importorskip("bitsandbytes")
    form, settings = PACKINGS[packing]
    base = pack(methods.empty(Model().build), form)
    assert sum(state_of(base, optimizer("sgd")).weights.values()) == stored(quantised(saved, settings, False))
