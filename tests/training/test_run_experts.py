"""A run over a mixture of experts, from YAML to a verified adapter."""

from __future__ import annotations

import json

import torch
from helpers import byte_tokenizer
from mixtures import EXPERTS, tiny_mixtral
from runs import smt

from smt_peft import SMTConfig, select_blocks
from smt_peft.training.compare import lora_config


def test_a_run_trains_experts_and_verifies_them(workshop, tmp_path):
    torch.manual_seed(0)
    tokens = {"vocab_size": 264, "eos_token_id": 256, "pad_token_id": 257}
    tiny_mixtral(**tokens).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    smt_settings = {"target_modules": ["q_proj"], "target_parameters": EXPERTS, "block_size": 8, "density": 0.1}
    path = workshop.write(
        "experts",
        model_name_or_path=str(tmp_path / "model"),
        output_dir=str(tmp_path / "run"),
        max_steps=4,
        verify=True,
        compare_lora=True,
        smt={**smt_settings, "warmup_batches": 2},
    )
    done = smt("train", path)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["after"]["eval_loss"] < metrics["before"]["eval_loss"]
    assert set(metrics["verified"]["passed"].values()) == {True}
    config = SMTConfig.from_pretrained(tmp_path / "run")
    assert sum("experts" in name for name in config.block_pattern) == 4
    merged = smt("merge", tmp_path / "run", tmp_path / "merged")
    assert merged.returncode == 0, merged.stderr


def test_lora_on_experts_is_as_large():
    from peft import get_peft_model

    model = tiny_mixtral()
    settings = {"target_modules": ["q_proj"], "target_parameters": EXPERTS, "block_size": 8, "density": 0.5}
    selection = select_blocks(model, SMTConfig(**settings, score="random"))
    config = lora_config(selection)
    trainable, _ = get_peft_model(model, config).get_nb_trainable_parameters()
    per_rank = trainable / config.r
    assert abs(trainable - selection.effective_numel) <= per_rank / 2
