"""What PEFT trains or stacks beside the blocks: token rows, whole modules, some layers only, other methods."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from helpers import batch, tiny_llama
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from smt_peft import SMTConfig
from smt_peft.tuner.layer import SMTLayer

SETTINGS = {"target_modules": ["q_proj", "up_proj"], "density": 0.3, "block_size": 8, "score": "random"}
pytestmark = pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")


def wrapped(model):
    return {layer.smt_name for layer in model.modules() if isinstance(layer, SMTLayer)}


def train(model, steps=8, lr=0.05):
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**batch()).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


class TestTokenRows:
    TOKENS = batch()["input_ids"].unique()[:3].tolist()

    @pytest.mark.parametrize("tied", [False, True])
    def test_they_train_together_with_the_blocks(self, tied):
        base = tiny_llama(tied=tied)
        before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
        model = get_peft_model(base, SMTConfig(**SETTINGS, trainable_token_indices=self.TOKENS))
        losses = train(model.train())
        assert losses[-1] < losses[0]
        state = model.state_dict()
        deltas = [tensor for name, tensor in state.items() if "trainable_tokens_delta" in name]
        # A tied head shares the rows of the table, which are kept once under each name.
        assert len(deltas) == 1 + tied and all(tensor.shape == (3, 32) for tensor in deltas)
        assert not torch.equal(deltas[0], before["model.embed_tokens.weight"][self.TOKENS])
        blocks = [tensor for name, tensor in state.items() if name.endswith("smt_blocks.default.weight")]
        assert len(blocks) == 4 and all(tensor.any() for tensor in blocks)
        base_weights = model.unload().state_dict()
        assert all(torch.equal(base_weights[name], tensor) for name, tensor in before.items())

    def test_by_the_name_of_a_module(self):
        model = get_peft_model(tiny_llama(), SMTConfig(**SETTINGS, trainable_token_indices={"lm_head": [1, 2]}))
        trained = [name for name, p in model.named_parameters() if p.requires_grad and "smt_blocks" not in name]
        assert trained == ["base_model.model.lm_head.token_adapter.trainable_tokens_delta.default"]

    def test_blocks_of_whole_rows_of_a_table_are_the_other_way(self):
        config = SMTConfig(target_modules=["embed_tokens"], block_size=(1, -1), num_blocks=4, score="grad_sq")
        model = get_peft_model(tiny_llama(), config)
        assert model.peft_config["default"].block_pattern == {"model.embed_tokens": [4, 1, 32]}


class TestWholeModules:
    def test_they_train_together_with_the_blocks(self):
        model = get_peft_model(tiny_llama(), SMTConfig(**SETTINGS, modules_to_save=["norm"]))
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        train(model.train())
        changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
        assert {name.rsplit(".", 3)[1] for name in changed} == {"smt_blocks", "modules_to_save"}
        assert "base_model.model.model.norm.modules_to_save.default.weight" in changed

    def test_a_target_trained_in_full_is_refused_by_name(self):
        model = get_peft_model(tiny_llama(), SMTConfig(**SETTINGS, modules_to_save=["embed_tokens"]))
        config = SMTConfig(**SETTINGS | {"target_modules": ["embed_tokens"]})
        with pytest.raises(ValueError, match=r"embed_tokens is trained besides the blocks already"):
            model.add_adapter("other", config)
        assert list(model.peft_config) == ["default"]

    def test_mixed_batches(self):
        model = get_peft_model(tiny_llama(), SMTConfig(**SETTINGS, modules_to_save=["lm_head"], init_weights=False))
        config = SMTConfig(**SETTINGS | {"target_modules": ["embed_tokens", "v_proj"]}, modules_to_save=["lm_head"])
        model.add_adapter("other", config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "modules_to_save" in name:
                    parameter.add_(torch.randn_like(parameter))
        model.eval()
        ids = batch(rows=3)["input_ids"]
        mixed = model(input_ids=ids, adapter_names=["default", "__base__", "other"]).logits
        for row, name in ((0, "default"), (2, "other")):
            model.set_adapter(name)
            alone = model(input_ids=ids[row : row + 1]).logits
            torch.testing.assert_close(mixed[row : row + 1], alone, rtol=1e-5, atol=1e-5)
        with model.disable_adapter():
            alone = model(input_ids=ids[1:2]).logits
        torch.testing.assert_close(mixed[1:2], alone, rtol=1e-5, atol=1e-5)


class TestSomeLayers:
    @pytest.mark.parametrize("layers, expected", [(0, {0}), ([0], {0}), ([1], {1}), ([0, 1], {0, 1})])
    def test_only_these_are_wrapped(self, layers, expected):
        model = get_peft_model(tiny_llama(), SMTConfig(**SETTINGS, layers_to_transform=layers))
        assert wrapped(model) == {
            f"model.layers.{layer}.{name}" for layer in expected for name in ("self_attn.q_proj", "mlp.up_proj")
        }

    def test_a_table_lies_in_no_layer(self):
        config = SMTConfig(**SETTINGS | {"target_modules": ["embed_tokens", "q_proj"]}, layers_to_transform=[1])
        assert wrapped(get_peft_model(tiny_llama(), config)) == {"model.layers.1.self_attn.q_proj"}


def test_all_of_them_saved_and_reloaded_in_a_fresh_process(tmp_path):
    cases = {
        "tokens": (False, {"trainable_token_indices": [1, 5]}),
        "tied tokens": (True, {"trainable_token_indices": [1, 5]}),
        "modules": (False, {"modules_to_save": ["lm_head"]}),
        "some layers": (False, {"layers_to_transform": [1]}),
    }
    for name, (tied, settings) in cases.items():
        path = tmp_path / name
        tiny_llama(tied=tied).save_pretrained(path / "base")
        base = AutoModelForCausalLM.from_pretrained(path / "base")
        model = get_peft_model(base, SMTConfig(**SETTINGS, **settings))
        train(model.train(), steps=3)
        model.eval().save_pretrained(path / "adapter")
        torch.save({"batch": batch(), "logits": model(**batch()).logits.detach()}, path / "expected.pt")
    code = """
import sys, torch, smt_peft
from peft import AutoPeftModelForCausalLM
for path in sys.argv[1:]:
    model = AutoPeftModelForCausalLM.from_pretrained(path + "/adapter").eval()
    expected = torch.load(path + "/expected.pt")
    assert torch.equal(model(**expected["batch"]).logits, expected["logits"]), path
print("equal")
"""
    paths = [str(tmp_path / name) for name in cases]
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True)
    assert done.stdout.strip().endswith("equal"), done.stderr


class TestOtherMethods:
    """`PeftMixedModel` builds the layers of each method it knows by name, so none can be let in from outside."""

    def test_a_mixed_model_refuses_it_by_name_and_stays_as_it_was(self):
        base = tiny_llama()
        names = [name for name, _ in base.named_modules()]
        with pytest.raises(ValueError, match="'SMT' is not compatible with the `PeftMixedModel`"):
            get_peft_model(base, SMTConfig(**SETTINGS), mixed=True)
        assert [name for name, _ in base.named_modules()] == names
        mixed = get_peft_model(base, LoraConfig(target_modules=["q_proj"]), mixed=True)
        before = copy.deepcopy(mixed.state_dict())
        with pytest.raises(ValueError, match="'SMT' is not compatible with the `PeftMixedModel`"):
            mixed.add_adapter("other", SMTConfig(**SETTINGS))
        assert list(mixed.peft_config) == ["default"] and mixed.state_dict().keys() == before.keys()

    @pytest.mark.parametrize("smt_first", [False, True])
    def test_another_method_in_one_model_is_refused(self, smt_first):
        configs = [SMTConfig(**SETTINGS), LoraConfig(target_modules=["q_proj"])]
        first, second = configs if smt_first else configs[::-1]
        model = get_peft_model(tiny_llama(), first)
        names = [name for name, _ in model.named_modules()]
        with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
            model.add_adapter("other", second)
        assert [name for name, _ in model.named_modules()] == names and list(model.peft_config) == ["default"]

    @pytest.mark.filterwarnings("ignore:You are trying to modify", "ignore:Already found a `peft_config`")
    def test_lora_wrapped_around_the_model_goes_over_the_blocks(self):
        model = get_peft_model(tiny_llama(), SMTConfig(**SETTINGS, init_weights=False)).eval()
        expected = model(**batch()).logits
        lora = get_peft_model(model.base_model.model, LoraConfig(target_modules=["q_proj", "v_proj"])).eval()
        assert torch.equal(lora(**batch()).logits, expected)
