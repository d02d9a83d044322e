"""A run that trains another method of PEFT than SMT."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig
from transformers import AutoModelForCausalLM

from smt_peft.export.merge import load_adapter, merge_adapter
from smt_peft.training.adapters import check_mergeable, train_adapter
from smt_peft.training.errors import ConfigError
from smt_peft.training.yaml.schema import load_run


def test_another_method_trains_on_the_rows_of_a_run_and_is_merged(workshop, tmp_path):
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    train_adapter(load_run(workshop.write("lora", max_steps=2)), config)
    assert config.base_model_name_or_path is None
    adapter = load_adapter(workshop.directory / "lora")
    assert any(weight.abs().max() > 0 for name, weight in adapter.named_parameters() if "lora_B" in name)
    merge_adapter(workshop.directory / "lora", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    expected = adapter.merge_and_unload(safe_merge=True).state_dict()
    assert all(torch.equal(merged[name], expected[name]) for name in expected)


def test_a_directory_that_holds_a_run_is_refused(workshop):
    run = load_run(workshop.write("twice", max_steps=1))
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    train_adapter(run, config)
    with pytest.raises(ConfigError, match="choose another output_dir"):
        train_adapter(run, config)


def test_a_target_that_is_not_there_is_laid_to_the_config(workshop):
    run = load_run(workshop.write("nothing", max_steps=1))
    with pytest.raises(ConfigError, match="peft_config: .*nope"):
        train_adapter(run, LoraConfig(target_modules=["nope"]))


@pytest.mark.parametrize(
    ("config", "message"),
    [({"r": 8}, "must be a config of PEFT, got dict"), (PromptTuningConfig(num_virtual_tokens=4), "adds a prompt")],
)
def test_what_cannot_be_merged_is_refused(config, message):
    with pytest.raises(ConfigError, match=message):
        check_mergeable(config)
