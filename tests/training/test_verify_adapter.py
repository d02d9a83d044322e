"""`smt verify`: an adapter that is what it says passes, and every other is told by the check that finds it."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from helpers import tiny_gpt2, tiny_llama
from mixtures import EXPERTS, tiny_qwen3_moe
from safetensors.torch import load_file, save_file
from saved import save

from smt_peft.cli import main
from smt_peft.export.merge import merge_adapter
from smt_peft.training.verify_adapter import verify_adapter

CASES = {
    "bf16": (tiny_llama, {"dtype": torch.bfloat16, "shard": "20KB"}),
    "low-rank pairs in bf16": (tiny_llama, {"dtype": torch.bfloat16, "lora_rank": 3, "lora_alpha": 5}),
    "transposed, low-rank pairs": (tiny_gpt2, {"lora_rank": 3}),
    "transposed, a head in full": (tiny_gpt2, {"modules_to_save": ["ln_f"]}),
    "experts": (tiny_qwen3_moe, {"target_modules": None, "target_parameters": EXPERTS, "density": 0.3}),
}


def outcome(checks):
    return {check.name: check.passed for check in checks}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_sound_adapter_passes_every_check(case, tmp_path):
    build, settings = case
    save(tmp_path, build, **settings)
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    checks = verify_adapter(tmp_path / "adapter", merged_dir=tmp_path / "merged")
    names = ["files", "blocks", "base", "reload", "merge", "merged"]
    assert outcome(checks) == dict.fromkeys(names, True), "\n".join(map(str, checks))


@pytest.fixture
def ready(tmp_path):
    save(tmp_path, tiny_llama)
    return tmp_path


def change(file, name, function):
    tensors = load_file(file)
    tensors[name] = function(tensors[name])
    save_file(tensors, file, metadata={"format": "pt"})


Q = "base_model.model.model.layers.0.self_attn.q_proj.smt_blocks."


def cut(ready):
    file = ready / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    return "files", "is damaged"


def not_a_number(ready):
    change(ready / "adapter" / "adapter_model.safetensors", Q + "weight", lambda w: w * float("nan"))
    return "blocks", "holds NaN"


def unsorted(ready):
    change(ready / "adapter" / "adapter_model.safetensors", Q + "index", lambda index: index.flip(0).contiguous())
    return "blocks", "not sorted"


def other_base(ready):
    torch.manual_seed(5)
    tiny_llama().save_pretrained(ready / "base")
    return "base", "trained on another base"


def other_architecture(ready):
    shutil.rmtree(ready / "base")
    tiny_gpt2().save_pretrained(ready / "base")
    return "base", "adapter belongs to another model"


def no_base(ready):
    shutil.rmtree(ready / "base")
    return "base", "cannot be loaded"


@pytest.mark.parametrize("damage", [cut, not_a_number, unsorted, other_base, other_architecture, no_base])
def test_damage_is_found_by_the_check_that_looks_for_it(ready, damage, capsys):
    name, words = damage(ready)
    checks = verify_adapter(ready / "adapter")
    assert outcome(checks)[name] is False and "reload" not in outcome(checks)
    assert main(["verify", str(ready / "adapter")]) == 1
    said = capsys.readouterr()
    assert f"{name:<8}  FAILED" in said.out and words in said.out and f"failed: {name}" in said.err


def test_a_merged_checkpoint_of_something_else_fails(ready):
    shutil.copytree(ready / "base", ready / "merged")
    last = verify_adapter(ready / "adapter", merged_dir=ready / "merged")[-1]
    assert (last.name, last.passed) == ("merged", False)
    assert "is not base + delta, rounded once" in last.detail


def test_a_base_elsewhere_is_taken_instead(ready):
    (ready / "base").rename(ready / "moved")
    assert outcome(verify_adapter(ready / "adapter"))["base"] is False
    assert set(outcome(verify_adapter(ready / "adapter", str(ready / "moved"))).values()) == {True}


def test_a_base_without_safetensors_is_looked_at_when_loaded(ready):
    torch.save(load_file(ready / "base" / "model.safetensors"), ready / "base" / "pytorch_model.bin")
    (ready / "base" / "model.safetensors").unlink()
    found = outcome(verify_adapter(ready / "adapter"))
    assert found == {"files": True, "blocks": None, "base": None, "reload": True, "merge": True}


def test_of_what_is_neither_language_model_nor_classifier_the_files_are_checked(tmp_path):
    save(tmp_path, tiny_llama)
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "task_type": "TOKEN_CLS"}))
    found = outcome(verify_adapter(tmp_path / "adapter", merged_dir=tmp_path / "merged"))
    assert found == {"files": True, "blocks": True, "base": True, "reload": None, "merged": True}


@pytest.mark.parametrize("onto", ["checkpoint", "dequantised"])
def test_an_adapter_of_a_quantised_base_and_both_its_merges_pass(tmp_path, onto):
    pytest.importorskip("bitsandbytes")
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from smt_peft import SMTConfig

    tiny_llama(hidden=64).save_pretrained(tmp_path / "base")
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=quantization, dtype=torch.float32
    )
    config = SMTConfig(score="diagonal", density=0.1, block_size=8, init_weights=False, task_type="CAUSAL_LM")
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", onto=onto)
    checks = verify_adapter(tmp_path / "adapter", merged_dir=tmp_path / "merged")
    assert set(outcome(checks).values()) == {True}, "\n".join(map(str, checks))


def test_what_is_printed_names_every_check(ready, capsys):
    settings = ready / "adapter" / "adapter_config.json"
    assert json.loads(settings.read_text())["peft_type"] == "SMT"
    assert main(["verify", str(ready / "adapter"), "--base", str(ready / "base")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [
        [name, "ok"] for name in ("files", "blocks", "base", "reload", "merge")
    ]
