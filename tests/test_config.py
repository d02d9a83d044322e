"""SMTConfig: ranges, contradictions, and what is saved."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest
import torch
from peft import PeftConfig, get_peft_model

from smt_peft import SMTConfig

REFUSED = {
    "density zero": ({"density": 0}, "density must be above 0"),
    "density negative": ({"density": -0.1}, "density must be above 0"),
    "density above one": ({"density": 1.5}, "at most 1"),
    "density NaN": ({"density": float("nan")}, "density"),
    "density text": ({"density": "1%"}, "density"),
    "both amounts": ({"density": 0.1, "num_blocks": 3, "block_size": 8}, "both density=0.1 and num_blocks=3"),
    "num_blocks zero": ({"num_blocks": 0, "block_size": 8}, "num_blocks must be a positive int"),
    "num_blocks float": ({"num_blocks": 1.5, "block_size": 8}, "num_blocks must be a positive int"),
    "block_size zero": ({"block_size": 0}, "block_size must be positive"),
    "block_size below -1": ({"block_size": (8, -2)}, "block_size must be positive"),
    "block_size text": ({"block_size": "big"}, "block_size must be 'auto'"),
    "block_size of three": ({"block_size": (8, 8, 8)}, "block_size must be 'auto'"),
    "block_size of one": ({"block_size": [8]}, "block_size must be"),
    "block_size float": ({"block_size": 8.0}, "block_size must be 'auto'"),
    "auto without density": ({"num_blocks": 3}, "block_size='auto' follows from density"),
    "unknown score": ({"score": "grad_abz"}, "unknown score 'grad_abz'; did you mean 'grad_abs'"),
    "unknown budget": ({"budget": "per_modul"}, "unknown budget 'per_modul'; did you mean 'per_module'"),
    "unknown spread": ({"spread": "wide"}, "unknown spread"),
    "unknown forward": ({"forward": "swop"}, "unknown forward 'swop'; did you mean 'swap'"),
    "unknown saved activations": (
        {"saved_activations": "int4"},
        "unknown saved_activations 'int4'; did you mean 'int8'",
    ),
    "budget share": ({"budget": {"up": 0}}, r"budget\['up'\] must be above 0"),
    "budget sum": ({"budget": {"up": 0.7, "down": 0.7}}, "add up to 1.4"),
    "budget regex": ({"budget": {"(": 1.0}}, "no valid regular expression"),
    "budget empty": ({"budget": {}}, "empty map"),
    "column share": ({"max_column_share": 2}, "max_column_share"),
    "lora rank": ({"max_lora_rank": 0}, "max_lora_rank"),
    "target regex": ({"target_modules": "("}, "target_modules .* no valid regular expression"),
    "layers_pattern alone": ({"target_modules": ["up"], "layers_pattern": "layers"}, "layers_to_transform"),
    "layers with regex": ({"target_modules": "up", "layers_to_transform": [0]}, "cannot be used"),
    "target_parameters": ({"target_parameters": "experts"}, "target_parameters must be a list"),
    "selection type": ({"selection": 3}, "selection must be a BlockSelection"),
    "seed": ({"seed": 0.5}, "seed must be an int"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(kind):
    settings, message = REFUSED[kind]
    with pytest.raises(ValueError, match=message):
        SMTConfig(**settings)


@pytest.mark.parametrize(
    ("density", "shape", "side"),
    [
        (0.0084, (4096, 4096), 32),
        (0.049, (4096, 11008), 128),
        (0.04, (192, 512), 4),
        (1.0, (4096, 4096), 256),
        (0.01, (10, 20), 4),
        (0.0084, (1024, 4096), 8),
    ],
)
def test_auto_block_size_lets_one_matching_reach_every_stripe(density, shape, side):
    assert SMTConfig(density=density).grid(shape).block_shape == (side, side)


def test_blocks_clip_to_the_matrix():
    assert SMTConfig(block_size=(64, -1)).grid((10, 20)).block_shape == (10, 20)
    assert SMTConfig(density=0.5).grid((3, 2)).block_shape == (3, 2)


def test_saved_settings(tmp_path):
    config = SMTConfig(target_modules=["up", "down"], density=0.2, budget={"up": 0.5, "down": 0.5})
    assert "selection" not in config.to_dict()
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, SMTConfig)
    assert loaded.to_dict() == config.to_dict()


def test_a_callable_score_is_saved_by_name_and_the_adapter_still_loads(tmp_path):
    def own_score(weight, grad):
        return grad.abs()

    config = SMTConfig(score=own_score)
    assert config.needs_data
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert "own_score" in loaded.score and loaded.score.startswith("callable:")


def test_defaults_work_on_a_small_layer():
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(20, 10)), SMTConfig(target_modules=["0"]))
    model(torch.randn(3, 20)).sum().backward()


class TestRegistration:
    def test_twice_is_once(self):
        from peft.utils.peft_types import PeftType

        from smt_peft._register import register

        before = list(PeftType)
        assert register() is True
        assert list(PeftType) == before and before.count("SMT") == 1
        assert PeftType("SMT") is PeftType.SMT and PeftType["SMT"] is PeftType.SMT
        assert pickle.loads(pickle.dumps(PeftType.SMT)) is PeftType.SMT

    def test_yields_to_a_peft_that_has_its_own(self):
        code = """
from peft.utils.peft_types import PeftType
import importlib.util, sys, peft.mapping as mapping
member = str.__new__(PeftType, "SMT"); member._name_ = member._value_ = "SMT"
type.__setattr__(PeftType, "SMT", member)
PeftType._member_map_["SMT"] = PeftType._value2member_map_["SMT"] = member
PeftType._member_names_.append("SMT")
theirs = type("TheirConfig", (), {})
mapping.PEFT_TYPE_TO_CONFIG_MAPPING[member] = theirs
import smt_peft
from smt_peft._register import register
assert register() is False
assert mapping.PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.SMT] is theirs
print("yielded")
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stdout.strip() == "yielded", done.stderr

    def test_a_config_unpickles_in_a_fresh_process(self, tmp_path):
        (tmp_path / "config.pkl").write_bytes(pickle.dumps(SMTConfig(density=0.2)))
        code = "import pickle, sys; print(pickle.load(open(sys.argv[1], 'rb')).density)"
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "config.pkl")], capture_output=True, text=True
        )
        assert done.stdout.strip() == "0.2", done.stderr
