"""Adapters through Transformers' own doors: `add_adapter`, `load_adapter`, `pipeline`, the `Auto` classes."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from helpers import save_tiny_model
from peft import AutoPeftModelForCausalLM, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from smt_peft import SMTConfig

SETTINGS = {"block_size": 8, "density": 0.1, "score": "random", "init_weights": False, "task_type": "CAUSAL_LM"}
INPUTS = {"input_ids": torch.arange(12)[None]}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A base model and an adapter with deltas, beside a tokenizer."""
    path = tmp_path_factory.mktemp("hosts")
    save_tiny_model(path / "model")
    torch.manual_seed(1)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(path / "model"), SMTConfig(**SETTINGS))
    model.save_pretrained(path / "adapter")
    AutoTokenizer.from_pretrained(path / "model").save_pretrained(path / "adapter")
    torch.save(model.eval()(**INPUTS).logits.detach(), path / "logits.pt")
    return path


@pytest.fixture
def model(directory):
    return AutoModelForCausalLM.from_pretrained(directory / "model").eval()


@pytest.fixture
def logits(directory):
    return torch.load(directory / "logits.pt")


def test_adapters_are_loaded_switched_and_switched_off(model, directory, logits):
    base = model(**INPUTS).logits
    model.load_adapter(str(directory / "adapter"), "trained")
    assert torch.equal(model(**INPUTS).logits, logits)
    torch.manual_seed(2)
    model.add_adapter(SMTConfig(**SETTINGS, seed=3), "other")
    model.set_adapter("other")
    assert model.active_adapters() == ["other"]
    assert not torch.equal(model(**INPUTS).logits, logits)
    model.disable_adapters()
    assert torch.equal(model(**INPUTS).logits, base)
    model.enable_adapters()
    model.set_adapter("trained")
    assert torch.equal(model(**INPUTS).logits, logits)
    model.delete_adapter("other")
    assert torch.equal(model(**INPUTS).logits, logits)


def test_an_adapter_of_transformers_is_saved_and_reloaded(model, directory, tmp_path):
    torch.manual_seed(2)
    model.add_adapter(SMTConfig(**SETTINGS))
    model.eval().save_pretrained(tmp_path / "adapter")
    torch.save(model(**INPUTS).logits.detach(), tmp_path / "logits.pt")
    code = """
import sys, torch, smt_peft
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
model.load_adapter(sys.argv[2] + "/adapter")
assert torch.equal(model.eval()(input_ids=torch.arange(12)[None]).logits, torch.load(sys.argv[2] + "/logits.pt"))
print("equal")
"""
    arguments = [sys.executable, "-c", code, str(directory / "model"), str(tmp_path)]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.stdout.strip().endswith("equal"), done.stderr


@pytest.mark.parametrize("auto", [AutoModelForCausalLM, AutoPeftModelForCausalLM])
def test_auto_classes_take_the_directory_of_an_adapter(auto, directory, logits):
    assert torch.equal(auto.from_pretrained(directory / "adapter").eval()(**INPUTS).logits, logits)


def test_a_pipeline_generates_with_the_adapter(directory):
    """As the merged model does, and not as the base."""
    tokenizer = AutoTokenizer.from_pretrained(directory / "model")

    def generated(model):
        generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
        return generator("upper: word1\n", max_new_tokens=12, do_sample=False)[0]["generated_text"]

    adapted = AutoPeftModelForCausalLM.from_pretrained(directory / "adapter")
    by_adapter = generated(adapted)
    # The directory itself is a model to a pipeline.
    assert by_adapter == generated(str(directory / "adapter"))
    assert by_adapter == generated(adapted.merge_and_unload())
    assert by_adapter != generated(str(directory / "model"))
