"""DeepSpeed ZeRO-2 and ZeRO-3 in two processes learn what one process learns, and what they save is whole."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from cases import told
from conftest import flat
from helpers import assert_no_worse_than_torch, batch
from launch import HERE, python, run_worker
from lesson import base, chosen_equal, config, logits
from peft import get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file

from smt_peft import BlockSelection, select_blocks

# Looked for, not imported: that takes seconds, and changes what Transformers does in this process.
pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed; see `make engines`")

FORWARDS = {
    "zero2": "swap",
    "zero2_smt_adamw": "swap",
    "zero3": "additive",
    "zero3_smt_adamw": "additive",
    "zero3_init": "additive",
    "zero3_init_inside": "additive",
}


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("deepspeed")
    run_worker("deepspeed_worker.py", directory)
    python(HERE / "reload.py", *[directory / name / "adapter" for name in FORWARDS])
    return directory


@pytest.mark.parametrize("engine", FORWARDS)
def test_losses_and_adapter_are_those_of_one_process(out, engine, truth, single):
    losses = torch.tensor(told(out, engine)["losses"], dtype=torch.float64)
    assert_no_worse_than_torch(losses.float(), single.losses.float(), truth.losses)
    saved = load_file(out / engine / "adapter" / "adapter_model.safetensors")
    assert_no_worse_than_torch(flat(saved), single.deltas, truth.deltas)


@pytest.mark.parametrize("engine", FORWARDS)
def test_saved_adapter_is_whole_and_the_base_untouched(out, engine):
    """peft#2450, trl#4416: what engines keep in parts was saved as empty tensors."""
    found = told(out, engine)
    assert found["keys_missing"] == found["keys_extra"] == found["base_changed"] == []
    saved = load_file(out / engine / "adapter" / "adapter_model.safetensors")
    assert min(tensor.numel() for tensor in saved.values()) > 0


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


@pytest.mark.parametrize("engine", FORWARDS)
def test_parameters_are_counted_whole(out, engine):
    assert told(out, engine)["trainable"] == list(
        get_peft_model(base(), config()).base_model.get_nb_trainable_parameters()
    )


@pytest.mark.parametrize("engine", [engine for engine in FORWARDS if "zero3" in engine])
def test_merging_into_partitioned_weights_is_refused(out, engine):
    message = told(out, engine)["merging"]
    assert "model.layers.0.self_attn.q_proj" in message and "ZeRO-3" in message


def test_blocks_are_chosen_through_an_engine_that_partitions_the_weights(out):
    message = told(out, "choose")["message"]
    assert "q_proj" in message and "deepspeed.initialize" in message
    everything = [batch(rows=2, seed=10 + i) for i in range(4)]
    alone = select_blocks(base(), config(score="grad_abs"), everything, num_batches=4, progress=False)
    for rank in (0, 1):
        assert chosen_equal(BlockSelection.load(out / "choose" / f"grad_abs_{rank}.safetensors"), alone)
