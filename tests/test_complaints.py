"""What users of other methods ran into, each thread as a test.

Elsewhere: transformers#28531 (resuming under a named adapter) in hosts/test_trainers.py; trl#4416 and peft#2450 (empty
tensors on disk) in engines/; unsloth#11014's experts in bases/test_parameters.py.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys

import pytest
import torch
from helpers import batch, tiny_llama
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from smt_peft import SMTConfig

SETTINGS = {"target_modules": "all-linear", "density": 0.2, "block_size": 8, "score": "random", "init_weights": False}

RELOAD = """
import sys, torch, smt_peft
from peft import PeftModel
from transformers import AutoModelForCausalLM
directory, name, low_cpu_mem_usage = sys.argv[1], sys.argv[2], sys.argv[3] == "True"
base = AutoModelForCausalLM.from_pretrained(directory + "/base")
place = directory + "/adapter" + ("" if sys.argv[4] == "default" else "/" + sys.argv[4])
model = PeftModel.from_pretrained(base, place, adapter_name=name, low_cpu_mem_usage=low_cpu_mem_usage).eval()
torch.save(model(**torch.load(directory + "/batch.pt")).logits.detach(), directory + "/logits.pt")
"""


@pytest.fixture
def base(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    return AutoModelForCausalLM.from_pretrained(tmp_path / "base")


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize(("saved_as", "loaded_as"), [("default", "default"), ("default", "b"), ("a", "default")])
def test_what_is_loaded_is_what_was_saved(base, tmp_path, saved_as, loaded_as, low_cpu_mem_usage):
    """peft#1678: other weights at every load. peft#1689: the saved adapter differs from the model."""
    model = get_peft_model(base, SMTConfig(**SETTINGS), adapter_name=saved_as)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for seed in range(3):
        model.train()(**batch(seed=seed)).loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path / "adapter")
    torch.save(batch(), tmp_path / "batch.pt")
    # Twice, in a process of its own each time.
    for _ in range(2):
        arguments = [str(tmp_path), loaded_as, str(low_cpu_mem_usage), saved_as]
        done = subprocess.run([sys.executable, "-c", RELOAD, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert torch.equal(torch.load(tmp_path / "logits.pt"), model.eval()(**batch()).logits)


def digests(model) -> dict[str, str]:
    return {name: hashlib.sha256(t.numpy().tobytes()).hexdigest() for name, t in model.state_dict().items()}


def test_a_merge_changes_what_it_should_and_nothing_else(base, tmp_path):
    """peft#2586: merging changed nothing."""
    before, logits = digests(base), base(**batch()).logits
    model = get_peft_model(base, SMTConfig(**SETTINGS)).eval()
    model.save_pretrained(tmp_path / "adapter")
    touched = {f"{name}.weight" for name in model.peft_config["default"].block_pattern}
    adapted = model(**batch()).logits
    merged = model.merge_and_unload()
    assert not torch.allclose(adapted, logits)
    # Not the same products in the same order, hence not bit for bit; the swap forward is.
    torch.testing.assert_close(merged(**batch()).logits, adapted)
    after = digests(merged)
    assert after.keys() == before.keys()
    assert {name for name in after if after[name] != before[name]} == touched
    with pytest.raises(ValueError, match="the base weights are not those expected"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["reentrant", "non-reentrant"])
def test_checkpointing_leaves_the_gradients_alone(kind, training):
    """peft#1142: gradient checkpointing with adapters; twice as slow is what this cannot show, other numbers it can."""

    def gradients(checkpointing):
        torch.manual_seed(0)
        model = get_peft_model(tiny_llama(), SMTConfig(**SETTINGS)).train(training)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": kind == "reentrant"})
        model(**batch(), use_cache=False).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys() and plain
    assert all(torch.equal(gradient, checkpointed[name]) for name, gradient in plain.items())


class TestNothingStaysFrozenInSilence:
    """unsloth#11014: silently untrained weights are worse than an error."""

    @pytest.mark.parametrize("names", [["q_prj"], "nothing.*"])
    def test_names_that_match_nothing(self, names):
        with pytest.raises(ValueError, match="not found in the base model.*linear layers are named.*q_proj"):
            get_peft_model(tiny_llama(), SMTConfig(target_modules=names, density=0.1))

    def test_names_of_which_some_match_nothing_are_told(self, caplog):
        with caplog.at_level("INFO", "smt_peft"):
            get_peft_model(tiny_llama(), SMTConfig(target_modules=["q_proj", "expert_proj"], density=0.1))
        assert "no module is named expert_proj" in caplog.text and "q_proj" not in caplog.text

    def test_modules_without_a_block_are_named(self, caplog):
        config = SMTConfig(target_modules=["q_proj", "k_proj"], block_size=8, num_blocks=1, budget="global")
        with caplog.at_level("INFO", "smt_peft"):
            get_peft_model(tiny_llama(), config)
        told = caplog.text
        assert "3 of 4 targeted modules hold no chosen block and stay frozen" in told
        assert told.count("_proj") >= 3

    def test_every_trained_parameter_gets_a_gradient(self):
        model = get_peft_model(tiny_llama(), SMTConfig(**SETTINGS)).train()
        model(**batch()).loss.backward()
        for name, parameter in model.named_parameters():
            assert not parameter.requires_grad or parameter.grad.any(), name
