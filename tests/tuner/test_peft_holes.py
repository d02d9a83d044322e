"""What PEFT's own tests pass over: they load where they saved, and a score finds the same blocks there again."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from helpers import batch, tiny_gpt2, tiny_llama
from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from smt_peft import BlockSelection, SMTConfig, select_blocks
from smt_peft.tuner.layer import SMTLayer

SETTINGS = {"target_modules": "all-linear", "density": 0.2, "block_size": 8, "score": "magnitude"}


def positions(model) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if "smt_blocks" in name and "index" in name}


def least_blocks(model) -> BlockSelection:
    """The blocks that `magnitude` ranks last, as many as it chooses: none that a loader would find by itself."""
    chosen = select_blocks(model, SMTConfig(**SETTINGS), None)
    blocks = {}
    for name, grid in chosen.grids.items():
        weight = model.get_submodule(name).weight.detach().abs()
        sums = weight.unflatten(0, (-1, grid.block_shape[0])).unflatten(2, (-1, grid.block_shape[1])).sum((1, 3))
        last = sums.flatten().argsort()[: len(chosen.blocks[name])]
        blocks[name] = grid.unflatten(last.sort().values)
    return BlockSelection(blocks, chosen.grids)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A base checkpoint, an adapter whose blocks are the base's least, its positions, and the logits of both."""
    path = tmp_path_factory.mktemp("least")
    torch.manual_seed(0)
    tiny_llama().save_pretrained(path / "base")
    base = AutoModelForCausalLM.from_pretrained(path / "base")
    config = SMTConfig(**SETTINGS, selection=least_blocks(base), init_weights=False)
    model = get_peft_model(base, config).eval()
    model.save_pretrained(path / "adapter")
    state = get_peft_model_state_dict(model)
    indices = {key: tensor.clone() for key, tensor in state.items() if key.endswith("index")}
    return path, indices, model(**batch()).logits.detach()


def by_peft_model(path):
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(path / "base"), path / "adapter")


def by_low_cpu_mem_usage(path):
    base = AutoModelForCausalLM.from_pretrained(path / "base")
    return PeftModel.from_pretrained(base, path / "adapter", low_cpu_mem_usage=True)


def by_a_second_adapter(path):
    base = AutoModelForCausalLM.from_pretrained(path / "base")
    model = get_peft_model(base, SMTConfig(**SETTINGS), "other")
    model.load_adapter(path / "adapter", "default")
    model.set_adapter("default")
    return model


def by_state_dict(path):
    config = PeftConfig.from_pretrained(path / "adapter")
    model = inject_adapter_in_model(config, AutoModelForCausalLM.from_pretrained(path / "base"))
    set_peft_model_state_dict(model, load_file(path / "adapter" / "adapter_model.safetensors"))
    return model


def by_transformers(path):
    model = AutoModelForCausalLM.from_pretrained(path / "base")
    model.load_adapter(str(path / "adapter"))
    return model


def by_the_adapters_folder(path):
    return AutoModelForCausalLM.from_pretrained(path / "adapter")


@pytest.mark.parametrize(
    "road",
    [
        by_peft_model,
        by_low_cpu_mem_usage,
        by_a_second_adapter,
        by_state_dict,
        by_transformers,
        by_the_adapters_folder,
    ],
)
def test_positions_that_no_score_finds_come_back_by_every_road(saved, road):
    path, indices, logits = saved
    model = road(path).eval()
    loaded = {key: tensor for key, tensor in positions(model).items() if ".other." not in key}
    assert len(loaded) == len(indices)
    for key, index in indices.items():
        name = key.removeprefix("base_model.model.").replace("smt_blocks.index", "smt_blocks.default.index")
        found = next(tensor for other, tensor in loaded.items() if other.endswith(name))
        assert found.dtype == torch.int32 and torch.equal(found, index), key
    assert torch.equal(model(**batch()).logits, logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_change_of_dtype_keeps_the_positions(dtype):
    # Beyond 2048 neither 16-bit type holds every whole number.
    model = nn.Sequential(nn.Linear(3, 5000))
    grid = SMTConfig(block_size=1, num_blocks=1).grid((5000, 3))
    blocks = torch.tensor([[2049, 0], [4095, 2], [4999, 1]], dtype=torch.int32)
    selection = BlockSelection({"0": blocks}, {"0": grid})
    model = get_peft_model(model, SMTConfig(target_modules=["0"], block_size=1, num_blocks=3, selection=selection))
    model.to(dtype).to(torch.float32)
    (index,) = positions(model).values()
    assert index.dtype == torch.int32 and torch.equal(index, blocks)
    layer = next(module for module in model.modules() if isinstance(module, SMTLayer))
    with torch.no_grad():
        layer.smt_blocks["default"].weight.fill_(1.0)
    assert torch.equal(layer.get_delta_weight("default").nonzero().int(), blocks)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_a_pickled_model_works_in_a_process_that_imports_nothing_of_this_package(tmp_path, make):
    model = get_peft_model(make(), SMTConfig(**SETTINGS, init_weights=False)).eval()
    torch.save(model, tmp_path / "model.pt")
    torch.save({"batch": batch(), "logits": model(**batch()).logits}, tmp_path / "expected.pt")
    code = """
import sys, torch
model = torch.load(sys.argv[1] + "/model.pt", weights_only=False)
expected = torch.load(sys.argv[1] + "/expected.pt")
assert torch.equal(model(**expected["batch"]).logits, expected["logits"])
model.merge_adapter()
model.unmerge_adapter()
assert torch.equal(model(**expected["batch"]).logits, expected["logits"])
print("equal")
"""
    assert run(code, tmp_path) == "equal"


def test_the_package_can_be_reloaded(tmp_path):
    code = """
import importlib
import smt_peft, smt_peft._register
from peft import PeftType, get_peft_config
member = PeftType.SMT
for module in (smt_peft._register, smt_peft):
    importlib.reload(module)
assert PeftType.SMT is member and list(PeftType).count("SMT") == 1
assert type(get_peft_config({"peft_type": "SMT", "target_modules": ["q"]})).__name__ == "SMTConfig"
print("equal")
"""
    assert run(code, tmp_path) == "equal"


def run(code: str, path) -> str:
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    return done.stdout.strip().splitlines()[-1] if done.returncode == 0 else done.stderr


def test_an_adapter_goes_by_its_state_dict_into_a_compiled_model():
    config = SMTConfig(**SETTINGS)
    state = get_peft_model_state_dict(inject_adapter_in_model(config, tiny_llama()))
    compiled = inject_adapter_in_model(SMTConfig(**SETTINGS), torch.compile(tiny_llama()), state_dict=state)
    shapes = {key.removeprefix("_orig_mod."): t.shape for key, t in get_peft_model_state_dict(compiled).items()}
    assert shapes == {key: tensor.shape for key, tensor in state.items()}


def test_a_mixed_model_is_refused_before_the_base_is_touched():
    base = tiny_llama()
    with pytest.raises(ValueError, match="not compatible with the `PeftMixedModel`"):
        get_peft_model(base, SMTConfig(**SETTINGS), mixed=True)
    assert not any(isinstance(module, SMTLayer) for module in base.modules())
