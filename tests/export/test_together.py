"""Adapters that share no weight add exactly: in the model, as a weighted sum, and through the files of a checkpoint."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch
from helpers import batch, tiny_gpt2, tiny_llama
from mixtures import EXPERTS, tiny_qwen3_moe
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from smt_peft import SMTConfig, select_blocks
from smt_peft.cli import main
from smt_peft.export.merge import merge_adapter
from smt_peft.tuner.layer import SMTLayer

pytestmark = [pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")]
NAMES = ("a", "b", "c")
SIZES = (8, 4, [2, 16])


def adapters(directory, build=tiny_llama, dtype=torch.bfloat16, **settings):
    """`base` and three trained adapters on disk, each chosen to avoid those before; the base, loaded."""
    build().to(dtype).save_pretrained(directory / "base", max_shard_size="40KB")
    base, made = AutoModelForCausalLM.from_pretrained(directory / "base", dtype="auto"), []
    for name, size in zip(NAMES, SIZES, strict=True):
        config = SMTConfig(
            **{"density": 0.15, "score": "random", "task_type": "CAUSAL_LM", "init_weights": False} | settings,
            block_size=size,
            avoid=list(made) or None,
        )
        config.selection = select_blocks(base, config)
        made.append(config.selection)
        model = get_peft_model(base, config, adapter_name=name)
        model.save_pretrained(directory, selected_adapters=[name])
        base = model.unload()
    return base


def dense(model, name):
    """Dense fp32 deltas by module."""
    layers = {layer.smt_name: layer for layer in model.modules() if isinstance(layer, SMTLayer)}
    return {key: layer.get_delta_weight(name) for key, layer in layers.items()}


def tensors_of(directory):
    return {name: t for file in sorted(directory.glob("*.safetensors")) for name, t in load_file(file).items()}


def test_merged_together_is_the_base_and_all_deltas_rounded_once_in_any_order(tmp_path):
    base = adapters(tmp_path)
    weights = {
        name: module.weight.detach().clone() for name, module in base.named_modules() if hasattr(module, "weight")
    }
    model = PeftModel.from_pretrained(base, tmp_path / "a", adapter_name="a")
    for name in NAMES[1:]:
        model.load_adapter(tmp_path / name, adapter_name=name)
    deltas = [dense(model, name) for name in NAMES]
    expected = {
        name: (weights[name].double() + sum(part[name].double() for part in deltas)).float().bfloat16()
        for name in deltas[0]
    }
    assert all(((part[name] != 0).int() for part in deltas) for name in expected)
    for name in expected:
        assert int(sum((part[name] != 0).int() for part in deltas).max()) == 1

    model.add_weighted_adapter(list(NAMES), [1.0] * 3, "sum")
    model.add_weighted_adapter(list(NAMES[::-1]), [1.0] * 3, "reversed")
    one, other = dense(model, "sum"), dense(model, "reversed")
    assert all(torch.equal(one[name], sum(part[name] for part in deltas)) for name in expected)
    assert all(torch.equal(one[name], other[name]) for name in expected)
    for names in (["sum"], *map(list, itertools.permutations(NAMES))):
        model.merge_adapter(names)
        for name, weight in expected.items():
            assert torch.equal(model.get_submodule(f"base_model.model.{name}").weight, weight), (names, name)
        model.unmerge_adapter()

    orders = {"abc": NAMES, "cab": ("c", "a", "b")}
    for out, order in orders.items():
        words = [str(tmp_path / name) for name in order]
        assert main(["merge", *words, str(tmp_path / out)]) == 0
    found = tensors_of(tmp_path / "abc")
    assert all(torch.equal(found[f"{name}.weight"], weight) for name, weight in expected.items())
    again = tensors_of(tmp_path / "cab")
    assert all(torch.equal(tensor, again[name]) for name, tensor in found.items())
    # What no adapter touches is what the base has.
    plain = tensors_of(tmp_path / "base")
    assert all(torch.equal(found[name], plain[name]) for name in plain if name.removesuffix(".weight") not in expected)


CODE = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/in turn", dtype="auto").eval()
other = AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/together", dtype="auto").eval()
batch = torch.load(sys.argv[1] + "/batch.pt")
assert torch.equal(model(**batch).logits, other(**batch).logits)
assert not any(name.startswith("smt_peft") for name in sys.modules)
print("equal")
"""


@pytest.mark.parametrize(
    "build, settings",
    [(tiny_gpt2, {}), (tiny_qwen3_moe, {"target_modules": None, "target_parameters": EXPERTS, "density": 0.08})],
    ids=["stored transposed", "experts"],
)
def test_one_after_the_other_gives_the_same_bytes(build, settings, tmp_path):
    adapters(tmp_path, build, torch.float32, **settings)
    merge_adapter([tmp_path / name for name in NAMES], tmp_path / "together")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = PeftModel.from_pretrained(base, tmp_path / "a", adapter_name="a")
    for name in NAMES[1:]:
        model.load_adapter(tmp_path / name, adapter_name=name)
    for name in NAMES:
        model.merge_adapter([name])
    model.merge_and_unload().save_pretrained(tmp_path / "in turn")
    one, other = tensors_of(tmp_path / "together"), tensors_of(tmp_path / "in turn")
    assert one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    torch.save(batch(), tmp_path / "batch.pt")
    done = subprocess.run([sys.executable, "-c", CODE, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout.strip().endswith("equal"), done.stderr


def test_what_cannot_be_merged_together_leaves_nothing(tmp_path):
    base = adapters(tmp_path)
    tied = get_peft_model(
        base, SMTConfig(density=0.5, block_size=16, score="random", target_modules=["q_proj"], init_weights=False)
    )
    tied.save_pretrained(tmp_path / "meets")
    full = get_peft_model(
        tied.unload(), SMTConfig(density=0.1, score="random", target_modules=["q_proj"], modules_to_save=["lm_head"])
    )
    full.save_pretrained(tmp_path / "full")
    cases = {
        "meets": r"layers\.\d\.self_attn\.q_proj: .*a and .*meets change the same weights",
        "full": "full trains lm_head.weight in full, which is no delta",
        "a": "change the same weights",
        "none": "there is no adapter in",
    }
    for other, message in cases.items():
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            merge_adapter([tmp_path / "a", tmp_path / other], tmp_path / "out")
        assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="merges one adapter"):
        merge_adapter([tmp_path / "a", tmp_path / "b"], tmp_path / "out", onto="dequantised")
    with pytest.raises(ValueError, match="there is no adapter to merge"):
        merge_adapter([], tmp_path / "out")
    (tmp_path / "other").mkdir()
    config = (tmp_path / "b" / "adapter_config.json").read_text()
    for file in (tmp_path / "b").iterdir():
        (tmp_path / "other" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "other" / "adapter_config.json").write_text(config.replace("/base", "/elsewhere"))
    with pytest.raises(ValueError, match="only adapters of one base can be merged together"):
        merge_adapter([tmp_path / "a", tmp_path / "other"], tmp_path / "out")
    # The same directory in other words.
    (tmp_path / "other" / "adapter_config.json").write_text(config.replace("/base", "/base/../base"))
    merge_adapter([tmp_path / "a", tmp_path / "other"], tmp_path / "out")
