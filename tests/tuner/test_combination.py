"""Weighted sums of adapters."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from helpers import Mlp, batch, tiny_llama
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from smt_peft import SMTConfig
from smt_peft.tuner.layer import SMTLayer

SETTINGS = {"target_modules": ["up", "down"], "density": 0.3, "score": "random", "init_weights": False}


def mlp_with(*adapters):
    """An Mlp with adapters `a`, `b`, ...; each argument replaces settings of one."""
    model = get_peft_model(Mlp(), SMTConfig(**{**SETTINGS, **adapters[0]}), "a")
    for name, settings in zip("bcd", adapters[1:], strict=False):
        model.add_adapter(name, SMTConfig(**{**SETTINGS, **settings}))
    return model.eval()


def deltas(model, adapter):
    """Dense deltas per module, zero where a module has none of this adapter."""
    layers = [layer for layer in model.modules() if isinstance(layer, SMTLayer)]
    shapes = {layer.smt_name: layer.get_base_layer().weight.shape for layer in layers}
    found = {layer.smt_name: layer.get_delta_weight(adapter) for layer in layers if adapter in layer.smt_blocks}
    return {name: found.get(name, torch.zeros(shape)) for name, shape in shapes.items()}


SIZES = {
    "one size": [{"block_size": 4}, {"block_size": 4, "seed": 1}],
    "multiples": [{"block_size": 8}, {"block_size": 4, "seed": 1}, {"block_size": [4, 8], "seed": 2}],
    "ragged and coprime": [{"block_size": [8, 3]}, {"block_size": [5, 7], "seed": 1}],
    "whole rows and columns": [{"block_size": [1, -1]}, {"block_size": [-1, 1], "seed": 1}],
    "other modules": [{"block_size": 4, "target_modules": ["up"]}, {"block_size": 8, "target_modules": ["down"]}],
}


@pytest.mark.parametrize("adapters", SIZES.values(), ids=SIZES)
def test_the_delta_is_the_exact_sum(adapters):
    model = mlp_with(*adapters)
    names, weights = list("abcd"[: len(adapters)]), [0.7, -1.3, 0.1][: len(adapters)]
    model.add_weighted_adapter(names, weights, "sum")
    parts = [deltas(model, name) for name in names]
    for module, delta in deltas(model, "sum").items():
        exact = sum(weight * part[module].double() for weight, part in zip(weights, parts, strict=True))
        assert torch.equal(delta, exact.float())
    model.merge_adapter(["sum"])
    model.unmerge_adapter()


def test_over_a_bf16_base_it_is_as_exact():
    model = get_peft_model(Mlp(torch.bfloat16), SMTConfig(**SETTINGS, block_size=4), "a")
    model.add_weighted_adapter(["a"], [0.7], "sum")
    part = deltas(model, "a")
    assert all(torch.equal(delta, (0.7 * part[name].double()).float()) for name, delta in deltas(model, "sum").items())


def test_the_blocks_are_the_union():
    model = mlp_with({"block_size": 4}, {"block_size": 4, "seed": 1})
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum")
    for layer in (model.base_model.model.up, model.base_model.model.down):
        ours, others = (
            {tuple(row) for name in names for row in layer.smt_blocks[name].index.tolist()}
            for names in (["sum"], ["a", "b"])
        )
        assert ours == others


def test_it_is_neither_active_nor_trainable_until_asked_to_be():
    model = mlp_with({"block_size": 4}, {"block_size": 8})
    x = torch.randn(3, 20)
    before, trainable = model(x), [name for name, p in model.named_parameters() if p.requires_grad]
    model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "sum", combination_type="linear")
    assert torch.equal(model(x), before) and model.active_adapters == ["a"]
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trainable
    model.set_adapter("sum")
    assert not torch.equal(model(x), before)
    assert all(".sum." in name for name, p in model.named_parameters() if p.requires_grad)


def test_of_merged_adapters_too():
    model = mlp_with({"block_size": 4}, {"block_size": 8})
    expected = {name: part + deltas(model, "b")[name] for name, part in deltas(model, "a").items()}
    model.merge_adapter(["a"])
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum")
    assert all(torch.equal(delta, expected[name]) for name, delta in deltas(model, "sum").items())


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"adapters": ["a", "x"]}, "Adapter x does not exist; the model has a, b"),
        ({"weights": [1.0]}, "2 adapters and 1 weights"),
        ({"adapters": [], "weights": []}, "0 adapters"),
        ({"weights": [1.0, float("nan")]}, "weight of adapter b must be a finite number"),
        ({"adapter_name": "a"}, "there is an adapter a already"),
        ({"combination_type": "svd"}, "'linear' is exact and the only one"),
    ],
)
def test_what_cannot_be_combined_is_refused_and_adds_nothing(arguments, message):
    model = mlp_with({"block_size": 4}, {"block_size": 8})
    before = str(model)
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(
            **{"adapters": ["a", "b"], "weights": [1.0, 1.0], "adapter_name": "sum", **arguments}
        )
    assert str(model) == before and list(model.peft_config) == ["a", "b"]


def test_a_damaged_index_is_refused_by_module_name():
    model = mlp_with({"block_size": 4}, {"block_size": 8})
    model.base_model.model.down.smt_blocks["b"].index[-1] = 10**6
    with pytest.raises(ValueError, match="down: block .* lies outside the grid"):
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum")
    assert list(model.peft_config) == ["a", "b"]


def test_modules_trained_in_full_cannot_be_added():
    model = mlp_with({"block_size": 4, "target_modules": ["up"], "modules_to_save": ["down"]})
    with pytest.raises(ValueError, match=r"Adapter a has modules_to_save=\['down'\]"):
        model.add_weighted_adapter(["a"], [1.0], "sum")


def test_saved_and_reloaded_in_a_fresh_process(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    settings = {"density": 0.2, "score": "random", "init_weights": False}
    model = get_peft_model(base, SMTConfig(**settings, target_modules="all-linear", block_size=8), "a")
    model.add_adapter("b", SMTConfig(**settings, target_modules=["embed_tokens", "q_proj"], block_size=4))
    model.add_weighted_adapter(["a", "b"], [0.5, 2.0], "sum")
    model.set_adapter("sum")
    model.eval().save_pretrained(tmp_path, selected_adapters=["sum"])
    torch.save({"batch": batch(), "logits": model(**batch()).logits.detach()}, tmp_path / "expected.pt")
    code = """
import sys, torch, smt_peft
from peft import AutoPeftModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1] + "/sum").eval()
expected = torch.load(sys.argv[1] + "/expected.pt")
assert torch.equal(model(**expected["batch"]).logits, expected["logits"])
print("equal")
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout.strip().endswith("equal"), done.stderr
