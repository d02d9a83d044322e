"""An adapter trained on a quantised base, merged three ways: into its floats, those it was trained on, and packed."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys

import pytest
import torch
from helpers import batch, tiny_llama
from packing import same_storage, storage
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from smt_peft import SMTConfig
from smt_peft.cli import main
from smt_peft.export.merge import merge_adapter
from smt_peft.tuner.quantised import QuantisedLinear

pytest.importorskip("bitsandbytes")
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
BASES = {
    "nf4 fp32": (NF4, torch.float32),
    "nf4 bf16": ({**NF4, "bnb_4bit_compute_dtype": "bfloat16"}, torch.bfloat16),
    "fp4 fp32": ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, torch.float32),
    "int8 fp32": ({"load_in_8bit": True}, torch.float32),
    "int8 bf16": ({"load_in_8bit": True}, torch.bfloat16),
}
# Reads a merged checkpoint where neither this package nor PEFT is to be had.
LOGITS = """
import sys, torch
sys.modules["smt_peft"] = sys.modules["peft"] = None
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
assert "quantization_config" not in model.config.to_dict()
save_file({"logits": model(input_ids=torch.load(sys.argv[2])).logits.detach()}, sys.argv[3])
"""


@pytest.fixture(autouse=True)
def quiet():
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


@pytest.fixture
def saved(request, tmp_path):
    """A base on disk, in fp32, an adapter on its quantised copy, and that model in memory."""
    from transformers import BitsAndBytesConfig

    settings, dtype = BASES[getattr(request, "param", "nf4 fp32")]
    tiny_llama(hidden=64).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=BitsAndBytesConfig(**settings), dtype=dtype
    )
    config = SMTConfig(score="diagonal", density=0.1, block_size=8, init_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    model.save_pretrained(tmp_path / "adapter")
    return model, tmp_path


def logits(model):
    return model(input_ids=batch()["input_ids"]).logits.detach()


@pytest.mark.parametrize("saved", BASES, indirect=True)
def test_onto_dequantised_is_what_was_trained_bit_for_bit(saved):
    model, path = saved
    merge_adapter(path / "adapter", path / "merged", onto="dequantised")
    merged = AutoModelForCausalLM.from_pretrained(path / "merged", dtype="auto")
    assert not hasattr(merged, "quantization_method") and merged.dtype == model.config.dtype
    assert torch.equal(logits(merged), logits(model.train()))


def test_a_dequantised_merge_loads_alone_in_a_fresh_process(saved):
    model, path = saved
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    expected = logits(model.train())
    torch.set_num_threads(threads)
    merge_adapter(path / "adapter", path / "merged", onto="dequantised")
    torch.save(batch()["input_ids"], path / "ids.pt")
    arguments = [path / "merged", path / "ids.pt", path / "logits.safetensors"]
    done = subprocess.run([sys.executable, "-c", LOGITS, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert torch.equal(load_file(path / "logits.safetensors")["logits"], expected)


@pytest.mark.parametrize("saved", BASES, indirect=True)
def test_onto_the_checkpoint_adds_to_the_floats_the_base_was_made_from(saved):
    model, path = saved
    merge_adapter(path / "adapter", path / "merged")
    base = AutoModelForCausalLM.from_pretrained(path / "base", dtype="auto").state_dict()
    merged = AutoModelForCausalLM.from_pretrained(path / "merged", dtype="auto").state_dict()
    deltas = {m.smt_name: m.get_delta_weight("default") for m in model.modules() if isinstance(m, QuantisedLinear)}
    assert len(deltas) == 14
    for name, weight in merged.items():
        delta = deltas.get(name.removesuffix(".weight"), 0)
        assert torch.equal(weight, base[name] + delta)


@pytest.mark.parametrize("saved", ["nf4 fp32", "int8 fp32"], indirect=True)
def test_onto_quantised_packs_the_sum_anew(saved, caplog):
    caplog.set_level("INFO", logger="smt_peft")
    model, path = saved
    merge_adapter(path / "adapter", path / "merged", onto="quantised")
    assert "merged into the quantised weights of 14 layers" in caplog.text
    assert re.search(r"left \d+% of the update", caplog.text)
    merged = AutoModelForCausalLM.from_pretrained(path / "merged")
    assert merged.is_quantized
    in_memory = model.merge_and_unload()
    assert same_storage(storage(merged), storage(in_memory))
    # In training mode: in evaluation bitsandbytes may repack its weights for the CPU.
    assert torch.equal(logits(merged.train()), logits(in_memory.train()))


def test_the_command_line(saved, capsys):
    model, path = saved
    assert main(["merge", str(path / "adapter"), str(path / "merged"), "--onto", "dequantised"]) == 0
    merged = AutoModelForCausalLM.from_pretrained(path / "merged")
    assert torch.equal(logits(merged), logits(model.train()))


def test_what_rebuilds_the_base_is_saved_with_the_adapter(saved):
    _, path = saved
    record = json.loads((path / "adapter" / "adapter_config.json").read_text())["base_quantization"]
    assert record["quant_method"] == "bitsandbytes" and record["load_in_4bit"] is True
    assert record["bnb_4bit_use_double_quant"] is True and record["dtype"] == "float32"


def test_a_base_of_floats_cannot_be_dequantised(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(model, SMTConfig(score="diagonal", density=0.1, block_size=8))
    model.save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_quantization"] is None
    for onto in ("dequantised", "quantised"):
        with pytest.raises(ValueError, match="trained on a base of floats; use onto='checkpoint'"):
            merge_adapter(tmp_path / "adapter", tmp_path / "merged", onto=onto)
    with pytest.raises(ValueError, match="onto must be one of checkpoint, dequantised, quantised, got 'base'"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged", onto="base")
    assert not (tmp_path / "merged").exists()


def test_a_base_that_is_stored_quantised_has_no_floats_to_merge_into(saved):
    model, path = saved
    expected = logits(model.train())
    model.unload().save_pretrained(path / "packed")
    file = path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": str(path / "packed")}))
    with pytest.raises(ValueError, match="stored quantised.*--onto dequantised"):
        merge_adapter(path / "adapter", path / "merged")
    merge_adapter(path / "adapter", path / "merged", onto="dequantised")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(path / "merged")), expected)


def test_a_damaged_record_is_refused(saved):
    _, path = saved
    file = path / "adapter" / "adapter_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "base_quantization": {"quant_method": "unheard of"}}))
    with pytest.raises(ValueError, match="base_quantization in the adapter's config cannot be used"):
        merge_adapter(path / "adapter", path / "merged", onto="dequantised")
