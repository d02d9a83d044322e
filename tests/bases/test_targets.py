"""Which modules a config names."""

from __future__ import annotations

import copy
import json
import logging
import subprocess
import sys

import pytest
import torch
from helpers import Mlp, batch, tiny_llama
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from smt_peft import SMTConfig, select_blocks
from smt_peft.bases.targets import find_targets


class Attending(nn.Module):
    """Two `nn.MultiheadAttention`, each followed by a linear layer."""

    def __init__(self):
        super().__init__()
        self.first, self.second = (nn.MultiheadAttention(16, 2, batch_first=True) for _ in range(2))
        self.up, self.down = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        x = self.up(self.first(x, x, x, need_weights=False)[0])
        return self.down(self.second(x, x, x, need_weights=False)[0])


class TestTargets:
    def test_names_regex_exclusion(self):
        model = Mlp()
        assert list(find_targets(model, SMTConfig(target_modules=["up"]))) == ["up"]
        assert list(find_targets(model, SMTConfig(target_modules="u.|down"))) == ["up", "down"]
        assert list(find_targets(model, SMTConfig(exclude_modules=["up"]))) == ["down"]
        assert list(find_targets(model, SMTConfig(modules_to_save=["down"]))) == ["up"]

    def test_nothing_matches(self):
        with pytest.raises(ValueError, match=r"'q_proj'.*not found.*named \['down', 'up'\]"):
            find_targets(Mlp(), SMTConfig(target_modules=["q_proj"]))

    def test_a_target_of_another_kind(self):
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
        with pytest.raises(ValueError, match="Target module 1 is a LayerNorm.*exclude_modules"):
            get_peft_model(model, SMTConfig(target_modules=["0", "1"]))
        assert isinstance(model[0], torch.nn.Linear)

    def test_the_config_of_the_caller_is_left_alone(self):
        config = SMTConfig()
        find_targets(Mlp(), config)
        assert config.target_modules == "all-linear"


class TestModulesThatAreNeverCalled:
    def test_all_linear_leaves_them_out_and_says_so(self, caplog):
        caplog.set_level(logging.INFO, logger="smt_peft")
        assert list(find_targets(Attending(), SMTConfig())) == ["up", "down"]
        (line,) = [line for line in caplog.messages if "out_proj" in line]
        assert line.startswith("first.out_proj is left out, and 1 more like it: nn.MultiheadAttention")

    def test_every_module_all_linear_takes_trains(self):
        model = get_peft_model(Attending(), SMTConfig(block_size=4, density=0.1))
        model(torch.randn(2, 3, 16)).square().sum().backward()
        trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert len(trained) == 2 and all(grad is not None and grad.any() for grad in trained.values())

    @pytest.mark.parametrize("names", [["up", "out_proj"], r"up|.*\.out_proj"])
    def test_named_they_are_refused(self, names):
        model = Attending()
        with pytest.raises(ValueError, match=r"first\.out_proj is never called.*exclude_modules"):
            get_peft_model(model, SMTConfig(target_modules=names))
        assert type(model.up) is nn.Linear
        config = SMTConfig(target_modules=names, exclude_modules=["out_proj"])
        assert list(find_targets(model, config)) == ["up"]

    def test_an_adapter_chosen_by_all_linear_loads(self, tmp_path):
        base = Attending()
        fresh = copy.deepcopy(base)
        model = get_peft_model(base, SMTConfig(block_size=4, density=0.1, init_weights=False))
        model.save_pretrained(tmp_path)
        assert "first.out_proj" in json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
        loaded = PeftModel.from_pretrained(fresh, tmp_path)
        x = torch.randn(2, 3, 16)
        with torch.no_grad():
            assert torch.equal(loaded.eval()(x), model.eval()(x))


class TestWrappedModels:
    @pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
    def test_an_adapter_of_another_method_is_refused(self, targets):
        lora = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
        for model in (lora, lora.get_base_model()):
            before = str(model)
            with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj carries .*\(lora\).*merge_and_unload"):
                get_peft_model(model, SMTConfig(target_modules=targets))
            assert str(model) == before
        beside = find_targets(lora.get_base_model(), SMTConfig(target_modules=["v_proj"]))
        assert list(beside) == [f"model.layers.{i}.self_attn.v_proj" for i in range(2)]

    def test_own_layers_are_seen_through_and_the_head_is_left_out(self):
        base = tiny_llama()
        expected = find_targets(base, SMTConfig())
        model = get_peft_model(base, SMTConfig(block_size=8, density=0.1))
        inner = find_targets(model.get_base_model(), SMTConfig())
        outer = find_targets(model, SMTConfig())
        assert len(expected) == 14
        assert {name: id(target.module) for name, target in inner.items()} == {
            name: id(target.module) for name, target in expected.items()
        }
        assert list(outer) == [f"base_model.model.{name}" for name in expected]

    def test_modules_trained_in_full_are_no_targets(self):
        model = get_peft_model(
            tiny_llama(), SMTConfig(target_modules=["q_proj"], block_size=8, density=0.1, modules_to_save=["lm_head"])
        )
        selection = select_blocks(model, SMTConfig(block_size=8, density=0.1), [batch()], progress=False)
        assert len(selection.grids) == 14
        assert not [name for name in selection.grids if "lm_head" in name]
        regex = SMTConfig(target_modules=r".*(q_proj|lm_head\..*)")
        assert all("q_proj" in name for name in find_targets(model.get_base_model(), regex))
        with pytest.raises(ValueError, match="lm_head is trained besides the blocks already.*exclude_modules"):
            find_targets(model.get_base_model(), SMTConfig(target_modules=["q_proj", "lm_head"]))

    def test_names_suggested_are_those_of_the_model(self):
        config = SMTConfig(target_modules=["up"], modules_to_save=["down"], block_size=4, density=0.1)
        model = get_peft_model(Mlp(), config)
        with pytest.raises(ValueError, match=r"linear layers are named \['up'\]"):
            find_targets(model.get_base_model(), SMTConfig(target_modules=["nothing"]))


class TestLayers:
    @pytest.mark.parametrize("names", ["all-linear", ["q_proj", "down_proj"]], ids=str)
    def test_only_the_layers_asked_for(self, names):
        targets = find_targets(tiny_llama(layers=3), SMTConfig(target_modules=names, layers_to_transform=[0, 2]))
        assert {name.split(".")[2] for name in targets} == {"0", "2"}
        assert len(targets) == 2 * (7 if names == "all-linear" else 2)

    def test_an_adapter_on_one_layer_loads(self, tmp_path):
        base = tiny_llama()
        state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
        config = SMTConfig(layers_to_transform=1, block_size=8, score="random", init_weights=False)
        model = get_peft_model(base, config).eval()
        model.save_pretrained(tmp_path)
        again = tiny_llama()
        again.load_state_dict(state)
        loaded = PeftModel.from_pretrained(again, tmp_path).eval()
        assert torch.equal(loaded(**batch()).logits, model(**batch()).logits)


def test_nothing_matched_is_the_error_peft_raises():
    with pytest.raises(NoMatchingPeftModuleError, match="not found in the base model"):
        find_targets(tiny_llama(), SMTConfig(target_modules=["none"]))


@pytest.mark.parametrize("kind", ["Embedding4bit", "Embedding8bit"])
def test_a_quantised_embedding_is_refused(kind):
    nn4 = pytest.importorskip("bitsandbytes").nn
    model = nn.Sequential(getattr(nn4, kind)(64, 64).to("cpu"), nn.Linear(64, 8))
    with pytest.raises(ValueError, match="Target module 0 is a quantised embedding .*exclude_modules"):
        find_targets(model, SMTConfig(target_modules=["0"], density=0.1))


@pytest.mark.parametrize(
    ("auto", "task", "head"),
    [
        (AutoModelForTokenClassification, "TOKEN_CLS", "score"),
        (AutoModelForQuestionAnswering, "QUESTION_ANS", "qa_outputs"),
        (AutoModelForSequenceClassification, "SEQ_CLS", "score"),
    ],
)
def test_all_linear_leaves_out_the_head_that_a_task_trains_in_full(auto, task, head, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    auto.from_pretrained(tmp_path / "base").save_pretrained(tmp_path / "base")
    inputs = {"input_ids": batch()["input_ids"][:1]}

    def adapted():
        base = auto.from_pretrained(tmp_path / "base")
        return get_peft_model(base, SMTConfig(task_type=task, density=0.1, block_size=8, init_weights=False)).eval()

    model = adapted()
    assert not any(head in name for name in model.peft_config["default"].block_pattern)
    assert any(head in name and p.requires_grad for name, p in model.named_parameters())
    model.save_pretrained(tmp_path / "adapter")
    # A second adapter meets a head that is wrapped already.
    model.load_adapter(tmp_path / "adapter", "other")
    torch.save((inputs, model(**inputs)[0].detach()), tmp_path / "expected.pt")
    code = f"""
import sys, torch, smt_peft
from peft import PeftModel
from transformers import {auto.__name__}
inputs, expected = torch.load(sys.argv[1] + "/expected.pt")
base = {auto.__name__}.from_pretrained(sys.argv[1] + "/base")
assert torch.equal(PeftModel.from_pretrained(base, sys.argv[1] + "/adapter").eval()(**inputs)[0], expected)
print("equal")
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout.strip().endswith("equal"), done.stderr
