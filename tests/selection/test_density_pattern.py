"""Densities of single modules: a budget of their own, outside of everybody else's."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from helpers import batch, tiny_llama
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from smt_peft import BlockSelection, SMTConfig, select_blocks
from smt_peft.bases.targets import find_targets
from smt_peft.selection.budget import make_scopes

Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"


def shares(selection):
    """Per module the share of its weights that was chosen."""
    return {
        name: grid.effective_numel(selection.blocks[name]) / grid.numel if name in selection.blocks else 0.0
        for name, grid in selection.grids.items()
    }


def chosen(score="random", **settings):
    config = SMTConfig(**{"density": 0.05, "block_size": 4, "score": score, **settings})
    torch.manual_seed(0)
    data = [batch()] if config.needs_data else None
    return select_blocks(tiny_llama(), config, data, progress=False)


@pytest.mark.parametrize("score", ["random", "diagonal", "magnitude", "grad_abs"])
@pytest.mark.parametrize("spread", ["free", "capped", "assignment"])
def test_a_module_gets_its_own_density_and_the_others_the_common_one(score, spread):
    got = shares(chosen(score, spread=spread, density_pattern={"q_proj": 0.5, "layers.1.mlp.up_proj": 0.25}))
    assert {name: share for name, share in got.items() if "q_proj" in name or name == UP} == {
        "model.layers.0.self_attn.q_proj": 0.5,
        "model.layers.1.self_attn.q_proj": 0.5,
        UP: 0.25,
    }
    assert all(0.03 < share <= 0.05 for name, share in got.items() if "q_proj" not in name and name != UP)


@pytest.mark.parametrize("budget", ["global", "per_layer", {"self_attn": 0.5, "mlp": 0.5}], ids=str)
def test_it_stands_outside_of_a_shared_budget(budget):
    plain = chosen("grad_abs", budget=budget, spread="free", exclude_modules=["q_proj"])
    with_pattern = chosen("grad_abs", budget=budget, spread="free", density_pattern={"q_proj": 0.5})
    assert {name: share for name, share in shares(with_pattern).items() if "q_proj" in name} == {
        Q: 0.5,
        Q.replace("layers.0", "layers.1"): 0.5,
    }
    others = {name: blocks for name, blocks in with_pattern.blocks.items() if "q_proj" not in name}
    assert BlockSelection(others, plain.grids) == plain


def test_matching_is_that_of_loras_rank_pattern():
    keys = [
        "q_proj",
        r"layers\.1\.mlp\.(up|gate)_proj",
        ".*k_proj",
        "proj",
        "elf_attn.v_proj",
        r"layers.0.mlp.down_proj",
    ]
    names = list(find_targets(tiny_llama(), SMTConfig()))
    for key in keys:
        config = LoraConfig(r=2, rank_pattern={key: 3}, target_modules="all-linear")
        lora = get_peft_model(tiny_llama(), config).base_model.model
        expected = [name for name in names if lora.get_submodule(name).r["default"] == 3]
        assert [name for name in names if SMTConfig(density_pattern={key: 0.3}).density_key(name)] == expected, key


def test_the_first_pattern_that_matches_counts():
    got = shares(chosen(density_pattern={r"layers\.0\..*q_proj": 0.25, "q_proj": 0.5}))
    assert got[Q] == 0.25 and got[Q.replace("layers.0", "layers.1")] == 0.5


def test_auto_block_size_follows_it():
    config = SMTConfig(density=0.01, density_pattern={"q_proj": 0.5})
    assert config.grid((64, 64), Q).block_shape == (32, 32)
    assert config.grid((64, 64), UP).block_shape == (4, 4)
    selection = select_blocks(tiny_llama(hidden=64), SMTConfig(density_pattern={"q_proj": 0.5}, score="random"), None)
    assert selection.grids[Q].block_shape == (32, 32) and selection.grids[UP].block_shape == (4, 4)


def test_a_pattern_without_effect_is_an_error():
    for pattern in ({"nothing": 0.5}, {"q_proj": 0.5, r".*\.q_proj": 0.2}):
        with pytest.raises(ValueError, match="is the first to match none of the 14 targeted modules") as raised:
            chosen(density_pattern=pattern)
        assert str(raised.value).startswith(f"density_pattern[{list(pattern)[-1]!r}]")


def test_contradictions_are_errors():
    with pytest.raises(ValueError, match="set density instead of num_blocks"):
        SMTConfig(num_blocks=3, block_size=4, density_pattern={"q_proj": 0.5})
    with pytest.raises(ValueError, match=r"budget\['q_proj'\] matches only modules that density_pattern has taken"):
        chosen(budget={"q_proj": 0.5, "mlp": 0.5}, density_pattern={"q_proj": 0.5})
    for value in ({}, ["q_proj"], {"q_proj": 0}, {"q_proj": 1.5}, {"q_proj": True}, {"(": 0.5}, {3: 0.5}):
        with pytest.raises(ValueError, match="density_pattern"):
            SMTConfig(density_pattern=value)


def test_scopes_are_named_by_pattern_and_module():
    config = SMTConfig(block_size=4, budget="global", density_pattern={"q_proj": 0.5})
    grids = {name: config.grid(target.shape, name) for name, target in find_targets(tiny_llama(), config).items()}
    labels = [scope.label for scope in make_scopes(grids, config)]
    assert labels[0] == "the whole model" and labels[1] == f"density_pattern['q_proj'], module {Q}"
    every = SMTConfig(block_size=4, budget="global", density_pattern={".*": 0.5})
    assert len(make_scopes(grids, every)) == len(grids)


def test_saved_with_the_adapter_and_reloaded_in_a_fresh_process(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = SMTConfig(density=0.05, score="random", density_pattern={"q_proj": 0.5}, init_weights=False)
    model = get_peft_model(base, config).eval()
    model.save_pretrained(tmp_path / "adapter")
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert saved["density_pattern"] == {"q_proj": 0.5} and saved["block_pattern"][Q][1:] == [16, 16]
    torch.save({"batch": batch(), "logits": model(**batch()).logits.detach()}, tmp_path / "expected.pt")
    code = """
import sys, torch, smt_peft
from peft import AutoPeftModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1] + "/adapter").eval()
expected = torch.load(sys.argv[1] + "/expected.pt")
assert torch.equal(model(**expected["batch"]).logits, expected["logits"])
print("equal")
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout.strip().endswith("equal"), done.stderr
