"""Adapters with low-rank pairs beside their blocks, made into a checkpoint, a LoRA, or refused as a patch."""

from __future__ import annotations

import copy
import logging
import warnings

import pytest
import torch
from helpers import batch, tiny_gpt2, tiny_llama
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from saved import save
from transformers import AutoModelForCausalLM

from smt_peft import SMTConfig
from smt_peft.cli import main
from smt_peft.export.lora import convert_to_lora, exact_ranks
from smt_peft.export.merge import merge_adapter
from smt_peft.export.patch import export_patch
from smt_peft.training.verify_adapter import verify_adapter
from smt_peft.tuner.layer import SMTLayer

PAIR = {"lora_rank": 3, "lora_alpha": 5}
CASES = {
    "bf16 in shards": (tiny_llama, {"dtype": torch.bfloat16, "shard": "20KB"}),
    "fp32": (tiny_llama, {}),
    "stored transposed": (tiny_gpt2, {}),
    "ragged": (tiny_llama, {"block_size": [5, 7]}),
    "tied": (lambda: tiny_llama(tied=True), {"target_modules": ["lm_head", "q_proj"], "dtype": torch.bfloat16}),
    "a head in full": (tiny_llama, {"modules_to_save": ["lm_head"], "dtype": torch.bfloat16}),
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings"),
    pytest.mark.filterwarnings("ignore:.*embeddings are no longer tied"),
]


def tensors_of(directory):
    files = sorted(directory.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def deltas(model):
    return {m.smt_name: m.get_delta_weight("default") for m in model.modules() if isinstance(m, SMTLayer)}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_files_hold_what_merging_the_model_gives(case, tmp_path):
    build, settings = case
    model = save(tmp_path, build, **settings, **PAIR)
    report = merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    copy.deepcopy(model).merge_and_unload().save_pretrained(tmp_path / "by PEFT")
    expected, found = tensors_of(tmp_path / "by PEFT"), tensors_of(tmp_path / "merged")
    assert found.keys() == expected.keys() and report.changed
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    norms = {name for name in found if "norm" in name or "ln_" in name}
    assert norms <= report.untouched.keys()


@pytest.fixture
def ready(tmp_path):
    save(tmp_path, tiny_llama, **PAIR)
    return tmp_path


def test_a_pair_that_is_damaged_fails_the_check_of_the_blocks(ready):
    file = ready / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.model.layers.0.self_attn.q_proj.smt_low_rank.lora_A"][0, 0] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    check = next(check for check in verify_adapter(ready / "adapter") if check.passed is False)
    assert check.name == "blocks" and "q_proj: smt_low_rank.lora_A holds NaN" in check.detail
    with pytest.raises(ValueError, match="q_proj: smt_low_rank.lora_A holds NaN"):
        merge_adapter(ready / "adapter", ready / "merged")
    assert not (ready / "merged").exists()


def test_a_checkpoint_merged_without_the_pair_is_not_the_merged_one(ready, tmp_path):
    (tmp_path / "blocks").mkdir()
    model = save(tmp_path / "blocks", tiny_llama)
    plain = AutoModelForCausalLM.from_pretrained(ready / "base")
    blocks = get_peft_model(plain, SMTConfig(**{**model.peft_config["default"].to_dict(), "base_fingerprint": None}))
    blocks.merge_and_unload().save_pretrained(ready / "merged")
    last = verify_adapter(ready / "adapter", merged_dir=ready / "merged")[-1]
    assert (last.name, last.passed) == ("merged", False)


def test_there_is_no_patch(ready, capsys):
    with pytest.raises(ValueError, match="lora_rank=3: a low-rank pair changes every value"):
        export_patch(ready / "adapter", ready / "patch.safetensors")
    assert main(["export", str(ready / "adapter"), str(ready / "patch.safetensors"), "--format", "patch"]) != 0
    assert "lora_rank=3" in capsys.readouterr().err
    assert not (ready / "patch.safetensors").exists()


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_the_exact_lora_has_the_rank_of_both_and_their_factors_as_they_are(build, tmp_path):
    model = save(tmp_path, build, lora_rank=3)
    form, blocks = convert_to_lora(model, "exact"), save(tmp_path / "blocks", build)
    assert form.energy == 1 and form.ranks == exact_ranks(model)
    assert form.ranks == {name: rank + 3 for name, rank in exact_ranks(blocks).items()}
    for layer in (m for m in model.modules() if isinstance(m, SMTLayer)):
        name, pair = f"base_model.model.{layer.smt_name}", layer.smt_low_rank["default"]
        a, b = form.tensors[f"{name}.lora_A.weight"], form.tensors[f"{name}.lora_B.weight"]
        assert torch.equal(a[-3:], pair.lora_A) and torch.equal(b[:, -3:], pair.lora_B)
        truth = layer.get_delta_weight("default")
        product = b.double() @ a.double()
        torch.testing.assert_close(product.t() if build is tiny_gpt2 else product, truth.double(), rtol=1e-6, atol=1e-9)


def test_a_lora_of_lower_rank_tells_what_it_keeps(tmp_path):
    model = save(tmp_path, tiny_llama, **PAIR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        form = convert_to_lora(model, 4)
    for name, delta in deltas(model).items():
        spectrum = torch.linalg.svdvals(delta.double()).square()
        assert form.ranks[name] == 4
        assert form.energies[name] == pytest.approx(float(spectrum[:4].sum() / spectrum.sum()), abs=1e-5)


def test_blocks_of_zero_beside_a_pair_are_still_a_delta(tmp_path):
    model = save(tmp_path, tiny_llama, **PAIR)
    for layer in (m for m in model.modules() if isinstance(m, SMTLayer)):
        layer.smt_blocks["default"].weight.data.zero_()
    assert convert_to_lora(model, "exact").energy == 1


@pytest.mark.parametrize("onto", ["checkpoint", "dequantised"])
def test_an_adapter_of_a_quantised_base_merges(tmp_path, onto):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    tiny_llama(hidden=64).save_pretrained(tmp_path / "base")
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=quantization, dtype=torch.float32
    )
    settings = {"score": "diagonal", "density": 0.1, "block_size": 8, "init_weights": False, **PAIR}
    model = get_peft_model(base, SMTConfig(**settings, task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", onto=onto)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    if onto == "dequantised":
        torch.testing.assert_close(merged(**batch()).logits, model.train()(**batch()).logits)
        return
    floats = AutoModelForCausalLM.from_pretrained(tmp_path / "base").state_dict()
    for name, delta in deltas(model).items():
        assert torch.equal(merged.state_dict()[f"{name}.weight"], floats[f"{name}.weight"] + delta)
