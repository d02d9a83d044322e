"""A run on a base that is quantised while it is loaded."""

from __future__ import annotations

import json

import pytest
import torch
from runs import smt
from safetensors.torch import load_file

from smt_peft.training.errors import ConfigError
from smt_peft.training.yaml.schema import load_run

pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize(
    "keys",
    [
        {"load_in_4bit": True, "bnb_4bit_use_double_quant": True, "optim": "smt_adamw", "gradient_checkpointing": True},
        {"load_in_8bit": True, "dtype": "bfloat16"},
        {"load_in_4bit": True, "optim": "smt_adamw", "regrowth": {"every": 2, "score_steps": 1, "share": 0.9}},
        {"load_in_8bit": True, "freezing": {"share": 0.5, "moments": "drop"}},
    ],
    ids=["4-bit", "8-bit in bf16", "4-bit, regrown", "8-bit, some frozen"],
)
def test_selects_trains_and_verifies(workshop, keys):
    name = "-".join(keys)
    process = smt("train", workshop.write(name, verify=True, **keys))
    assert process.returncode == 0, process.stderr
    out = workshop.directory / name
    losses = [
        entry["loss"] for entry in json.loads((out / "metrics.json").read_text())["log_history"] if "loss" in entry
    ]
    assert losses[-1] < losses[0]
    assert process.stdout.count("verified") == 4
    settings = json.loads((out / "adapter_config.json").read_text())
    assert settings["base_quantization"]["load_in_4bit"] is ("load_in_4bit" in keys)
    # TRL casts what it trains on a quantised base to bf16.
    weights = [w for key, w in load_file(out / "adapter_model.safetensors").items() if key.endswith(".weight")]
    assert {weight.dtype for weight in weights} == {torch.float32}
    assert all((weight != weight.bfloat16()).any() for weight in weights)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"load_in_4bit": True, "load_in_8bit": True}, "load_in_8bit and load_in_4bit are both set; keep one"),
        ({"bnb_4bit_use_double_quant": True}, "bnb_4bit_use_double_quant has no effect without load_in_4bit"),
        (
            {"load_in_8bit": True, "bnb_4bit_quant_type": "fp4"},
            "bnb_4bit_quant_type has no effect without load_in_4bit",
        ),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf5"}, "bnb_4bit_quant_type must be 'nf4' or 'fp4', got 'nf5'"),
        ({"load_in_4bits": True}, "did you mean 'load_in_4bit'?"),
    ],
)
def test_keys_that_contradict_each_other(workshop, keys, message):
    with pytest.raises(ConfigError) as caught:
        load_run(workshop.write("wrong", **keys))
    assert message in str(caught.value)


def test_without_bitsandbytes_the_key_names_what_to_install(workshop, monkeypatch):
    monkeypatch.setattr("smt_peft.training.yaml.checks.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="load_in_4bit needs bitsandbytes, which is not installed: pip install"):
        load_run(workshop.write("missing", load_in_4bit=True))
