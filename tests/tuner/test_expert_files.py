"""Adapters of experts on disk."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from helpers import batch
from mixtures import (
    EXPERTS,
    SETTINGS,
    adapted,
    tiny_gpt_oss,
    tiny_mixtral,
)
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from smt_peft import SMTConfig


@pytest.fixture(params=[tiny_mixtral, tiny_gpt_oss], ids=["mixtral", "gpt-oss"])
def saved(request, tmp_path):
    """A base checkpoint, an adapter on it, and the logits of both together."""
    request.param().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = adapted(base, target_modules=["q_proj"], budget="global", spread="free", density=0.1).eval()
    model.save_pretrained(tmp_path / "adapter")
    logits = model(**batch()).logits.detach()
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    return tmp_path, logits


class TestFiles:
    def test_blocks_are_named_by_their_parameter(self, saved):
        path, _ = saved
        config = SMTConfig.from_pretrained(path / "adapter")
        tensors = load_file(path / "adapter" / "adapter_model.safetensors")
        assert config.target_parameters == sorted(EXPERTS)
        assert any("experts" in name for name in config.block_pattern)
        for name, shape in config.block_pattern.items():
            assert list(tensors.pop(f"base_model.model.{name}.smt_blocks.weight").shape) == shape
            assert len(tensors.pop(f"base_model.model.{name}.smt_blocks.index")) == shape[0]
        assert not tensors

    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    def test_roads_in(self, saved, low_cpu_mem_usage):
        path, logits = saved
        base = AutoModelForCausalLM.from_pretrained(path / "base")
        model = PeftModel.from_pretrained(base, path / "adapter", low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(model(**batch()).logits, logits)
        loaded = AutoModelForCausalLM.from_pretrained(path / "base")
        loaded.load_adapter(str(path / "adapter"), low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(loaded.eval()(**batch()).logits, logits)

    def test_fresh_processes(self, saved):
        path, logits = saved
        torch.save({"batch": batch(), "logits": logits}, path / "expected.pt")
        code = """
import sys, torch, smt_peft
from peft import AutoPeftModelForCausalLM
path = sys.argv[1]
model = AutoPeftModelForCausalLM.from_pretrained(path + "/adapter").eval()
expected = torch.load(path + "/expected.pt")
assert torch.equal(model(**expected["batch"]).logits, expected["logits"])
print("equal")
"""
        plain = """
import sys, torch
from transformers import AutoModelForCausalLM
path = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(path + "/merged").eval()
expected = torch.load(path + "/expected.pt")
torch.testing.assert_close(model(**expected["batch"]).logits, expected["logits"], rtol=1e-4, atol=1e-5)
assert "smt_peft" not in sys.modules
print("equal")
"""
        for each in (code, plain):
            done = subprocess.run([sys.executable, "-c", each, str(path)], capture_output=True, text=True)
            assert done.stdout.strip().endswith("equal"), done.stderr

    def test_a_merged_checkpoint_holds_the_merged_parameters_exactly(self, saved):
        path, _ = saved
        base = AutoModelForCausalLM.from_pretrained(path / "base")
        merged = PeftModel.from_pretrained(base, path / "adapter").merge_and_unload()
        again = AutoModelForCausalLM.from_pretrained(path / "merged")
        for (name, ours), theirs in zip(merged.named_parameters(), again.parameters(), strict=True):
            assert torch.equal(ours, theirs), name

    def test_blocks_that_cross_experts_are_refused(self, saved):
        path, _ = saved
        config = SMTConfig.from_pretrained(path / "adapter")
        name = next(name for name in config.block_pattern if "experts" in name)
        config.block_pattern[name][1] = 7
        config.save_pretrained(path / "adapter")
        base = AutoModelForCausalLM.from_pretrained(path / "base")
        before = [(name, type(module)) for name, module in base.named_modules()]
        with pytest.raises(
            ValueError, match=r"experts\.\w+: blocks of 7 rows would reach from one expert into the next"
        ):
            PeftModel.from_pretrained(base, path / "adapter")
        assert [(name, type(module)) for name, module in base.named_modules()] == before

    def test_another_base_is_refused_and_nothing_is_left(self, saved):
        path, _ = saved
        base = AutoModelForCausalLM.from_pretrained(path / "base")
        with torch.no_grad():
            base.model.layers[0].mlp.experts.down_proj.add_(1)
        before = [(name, type(module)) for name, module in base.named_modules()]
        with pytest.raises(ValueError, match="another base model"):
            PeftModel.from_pretrained(base, path / "adapter")
        assert [(name, type(module)) for name, module in base.named_modules()] == before

    def test_a_failed_second_adapter_leaves_the_first(self):
        model = adapted(tiny_mixtral(), target_parameters=EXPERTS[1:]).eval()
        logits = model(**batch()).logits
        before = [(name, type(module)) for name, module in model.named_modules()]
        with pytest.raises(ValueError, match="overlay"):
            model.add_adapter("other", SMTConfig(**{**SETTINGS, "forward": "overlay"}))
        assert [(name, type(module)) for name, module in model.named_modules()] == before
        assert torch.equal(model(**batch()).logits, logits)
