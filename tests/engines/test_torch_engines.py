"""DDP, FSDP1 and FSDP2 in two processes learn what one process learns, and what they save is whole."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from cases import told
from conftest import flat
from helpers import assert_no_worse_than_torch
from launch import HERE, python, run_worker
from lesson import base, config, logits
from peft import get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file

FORWARDS = {
    "ddp": "swap",
    "ddp_smt_adamw": "swap",
    # Inside FSDP1 a weight is a view of a flat parameter, and the blocks are a unit of their own.
    "fsdp1_flat": "additive",
    "fsdp1_orig": "additive",
    "fsdp1_flat_smt_adamw": "additive",
    "fsdp1_orig_smt_adamw": "additive",
    "fsdp2": "swap",
    "fsdp2_kept": "swap",
    "fsdp2_bf16": "swap",
}


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("torch_engines")
    run_worker("torch_worker.py", directory)
    python(HERE / "reload.py", *[directory / name / "adapter" for name in FORWARDS])
    return directory


@pytest.mark.parametrize("engine", FORWARDS)
def test_losses_and_adapter_are_those_of_one_process(out, engine, truth, single, single_bf16):
    # The engines sum over rows in another order than one process; both err from fp64, neither by right.
    ours, same = told(out, engine), single_bf16 if engine == "fsdp2_bf16" else single
    losses = torch.tensor(ours["losses"], dtype=torch.float64)
    one, bits = same.losses.float(), torch.bfloat16 if engine == "fsdp2_bf16" else torch.float32
    assert_no_worse_than_torch(losses.float(), one.to(bits) if bits is torch.bfloat16 else one, truth.losses)
    saved = load_file(out / engine / "adapter" / "adapter_model.safetensors")
    assert_no_worse_than_torch(flat(saved), same.deltas, truth.deltas)


@pytest.mark.parametrize("engine", FORWARDS)
def test_saved_adapter_is_whole_and_the_base_untouched(out, engine):
    """peft#2450, trl#4416: what engines keep in parts was saved as empty tensors."""
    found = told(out, engine)
    assert found["keys_missing"] == found["keys_extra"] == found["base_changed"] == []
    saved = load_file(out / engine / "adapter" / "adapter_model.safetensors")
    assert min(tensor.numel() for tensor in saved.values()) > 0
    assert all(tensor.abs().sum() > 0 for key, tensor in saved.items() if key.endswith(".weight"))


@pytest.mark.parametrize("engine", FORWARDS)
def test_a_fresh_process_reads_the_adapter_onto_the_plain_base(out, engine):
    directory = out / engine / "adapter"
    model = get_peft_model(base(), config())
    set_peft_model_state_dict(model, load_file(directory / "adapter_model.safetensors"))
    assert torch.equal(load_file(directory / "logits.safetensors")["logits"], logits(model))
    assert not torch.equal(logits(model), logits(base()))


@pytest.mark.parametrize("engine", FORWARDS)
def test_every_layer_takes_the_forward_that_its_engine_allows(out, engine):
    assert told(out, engine)["forwards"] == [FORWARDS[engine]]


def test_checkpointing_gives_the_gradients_of_one_process_without_it(out):
    done = {tuple(combination) for combination in told(out, "checkpointing")["done"]}
    kinds = ("none", "reentrant", "non-reentrant")
    assert done == set(itertools.product(("ddp", "fsdp2"), kinds, (False, True)))


@pytest.mark.parametrize("engine", ["fsdp1", "fsdp2"])
def test_merging_into_sharded_weights_is_refused_and_unloading_gives_the_base(out, engine):
    for message in told(out, f"merging_{engine}")["messages"]:
        assert "model.layers.0.self_attn.q_proj" in message and "sharded" in message


def test_an_adapter_goes_in_before_the_model_is_sharded(out):
    message = told(out, "injecting")["message"]
    assert "q_proj" in message and "get_peft_model" in message


def test_an_adapter_is_loaded_onto_a_sharded_base(out):
    assert told(out, "loading")["forwards"] == ["additive"]
    told(out, "set_into_sharded")


def test_tensor_parallelism_is_refused_by_name_where_a_layer_has_a_part(out):
    for case in ("tensor_parallel", "parallel_split"):
        message = told(out, case)["message"]
        assert "model.layers.0.mlp.up_proj" in message and "tensor parallel" in message


def test_tensor_parallelism_is_right_where_a_layer_returns_the_whole(out):
    assert told(out, "parallel_joined") == {"difference": 0.0, "forwards": ["additive"]}


def test_smt_adamw_refuses_parts_of_tensors_by_name(out):
    assert "torch.optim.AdamW" in told(out, "fsdp2_smt_adamw")["message"]


def test_a_state_dict_with_parts_is_not_saved(out):
    messages = told(out, "parts")["messages"]
    for message in messages:
        assert "q_proj" in message and "accelerator.get_state_dict" in message
