"""Settings beside a selection that was made before: those that it settles say the same, or are refused by name."""

from __future__ import annotations

import pytest
import torch
from helpers import Mlp
from peft import get_peft_model

from smt_peft import SMTConfig, select_blocks
from smt_peft.config.agreement import disagreements

MADE = {
    "density": 0.3,
    "block_size": 4,
    "score": "magnitude",
    "spread": "free",
    "budget": "per_layer",
    "max_lora_rank": 8,
}
TARGETS = ["up", "down"]


def mlp() -> Mlp:
    """Always the same."""
    torch.manual_seed(0)
    return Mlp()


@pytest.fixture(scope="module")
def selection():
    return select_blocks(mlp(), SMTConfig(**MADE, target_modules=TARGETS))


def test_what_is_left_out_or_said_again_is_no_contradiction(selection):
    assert disagreements(selection, {}) == {} == disagreements(selection, MADE)
    config = SMTConfig(selection=selection, **MADE, target_modules=TARGETS, seed=3)
    get_peft_model(mlp(), config)
    get_peft_model(mlp(), SMTConfig(selection=selection, target_modules=TARGETS, max_lora_rank=16))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"density": 0.01}, r"density=0.01 has no effect beside a selection.*was made with density=0.3; leave density"),
        ({"num_blocks": 3, "block_size": 4}, "num_blocks=3 .* was made with num_blocks=None"),
        ({"density_pattern": {"up": 0.5}}, "density_pattern=.* was made with density_pattern=None"),
        ({"block_size": 8}, "block_size=8 .* was made with block_size=4"),
        ({"block_size": [4, 8]}, r"block_size=\[4, 8\] "),
        ({"score": "diagonal"}, "score='diagonal' .* was made with score='magnitude'"),
        ({"score": len}, "score='callable:len' "),
        ({"spread": "capped"}, "spread='capped'"),
        ({"coupled": "consumers"}, "coupled='consumers' .* was made with coupled=None"),
        ({"budget": "global"}, "budget='global' .* was made with budget='per_layer'"),
        ({"max_lora_rank": 4}, "max_lora_rank=4 .* was made with max_lora_rank=8"),
        ({"max_column_share": 0.5}, "max_column_share=0.5 .* was made with max_column_share=None"),
    ],
)
def test_what_says_otherwise_is_refused_by_name(selection, settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        SMTConfig(selection=selection, **settings)
    selection.save(tmp_path / "s.safetensors")
    with pytest.raises(ValueError, match=message):
        SMTConfig(selection=str(tmp_path / "s.safetensors"), **settings)


def test_a_path_that_is_set_later_is_looked_at_when_it_is_read(selection, tmp_path):
    selection.save(tmp_path / "s.safetensors")
    config = SMTConfig(target_modules=TARGETS, spread="capped")
    config.selection = str(tmp_path / "s.safetensors")
    model = mlp()
    before = str(model)
    with pytest.raises(ValueError, match="spread='capped' has no effect"):
        get_peft_model(model, config)
    assert str(model) == before
    config = SMTConfig(target_modules=TARGETS)
    config.selection = str(tmp_path / "s.safetensors")
    get_peft_model(model, config)


def test_a_combination_has_no_settings_of_its_own(selection):
    other = select_blocks(mlp(), SMTConfig(**MADE | {"score": "random"}, target_modules=TARGETS))
    both = selection | other
    assert disagreements(both, {"block_size": 4}) == {}
    assert "has blocks of 4 x 4" in disagreements(both, {"block_size": 8})["block_size"]
    assert "was combined of others" in disagreements(both, {"density": 0.3})["density"]
    assert disagreements(both, {"max_lora_rank": 8}).keys() == {"max_lora_rank"}
