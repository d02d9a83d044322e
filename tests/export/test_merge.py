"""A merged checkpoint is base + delta, rounded once, and loads without this package."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from helpers import tiny_gpt2, tiny_llama
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from smt_peft import SMTConfig
from smt_peft.export.merge import merge_adapter


@pytest.fixture(params=["llama fp32", "llama bf16", "gpt2"])
def saved(request, tmp_path):
    """A base on disk, an adapter over it with deltas that matter, and the model in memory."""
    base = tiny_gpt2() if request.param == "gpt2" else tiny_llama(tied=True)
    if request.param == "llama bf16":
        base = base.to(torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="auto")
    config = SMTConfig(score="random", density=0.2, block_size=8, init_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    model.save_pretrained(tmp_path / "adapter")
    return model, tmp_path


def test_merged_weights_are_base_plus_delta_rounded_once(saved):
    model, path = saved
    merge_adapter(path / "adapter", path / "merged")
    base = AutoModelForCausalLM.from_pretrained(path / "base", dtype="auto").state_dict()
    merged = AutoModelForCausalLM.from_pretrained(path / "merged", dtype="auto").state_dict()
    deltas = {
        name.removeprefix("base_model.model."): module.get_delta_weight("default")
        for name, module in model.named_modules()
        if hasattr(module, "smt_blocks")
    }
    assert len(deltas) > 4
    changed = 0
    for name, weight in merged.items():
        delta = deltas.get(name.removesuffix(".weight"))
        expected = base[name] if delta is None else (base[name].float() + delta).to(base[name].dtype)
        assert weight.dtype == base[name].dtype
        assert torch.equal(weight, expected)
        changed += not torch.equal(weight, base[name])
    assert changed == len(deltas)


def test_the_merged_model_loads_where_this_package_is_absent(saved):
    _, path = saved
    merge_adapter(path / "adapter", path / "merged")
    code = (
        "import sys; sys.modules['smt_peft'] = None; sys.modules['peft'] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        f"print(AutoModelForCausalLM.from_pretrained({str(path / 'merged')!r}).num_parameters())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == AutoModelForCausalLM.from_pretrained(path / "base").num_parameters()


@pytest.fixture
def adapter(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(base, SMTConfig(score="random", block_size=8, density=0.1)).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_output_directory_with_files_is_refused(adapter, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty; choose a new directory"):
        merge_adapter(adapter, out)
    assert [path.name for path in out.iterdir()] == ["notes.txt"]
    (out / "notes.txt").unlink()
    merge_adapter(adapter, out)
    assert (out / "model.safetensors").exists()


def rewrite(adapter, **changed) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))


def test_a_directory_without_an_adapter_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no adapter in"):
        merge_adapter(tmp_path, tmp_path / "out")


def test_a_missing_base_is_named(adapter, tmp_path):
    rewrite(adapter, base_model_name_or_path=str(tmp_path / "gone"))
    with pytest.raises(ValueError, match="gone, named in the adapter's base_model_name_or_path, cannot be loaded"):
        merge_adapter(adapter, tmp_path / "out")
    rewrite(adapter, base_model_name_or_path=None)
    with pytest.raises(ValueError, match="names no base model"):
        merge_adapter(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_config_is_named(adapter, tmp_path):
    (adapter / "adapter_config.json").write_text('{"base_model')
    with pytest.raises(ValueError, match="adapter_config.json is damaged"):
        merge_adapter(adapter, tmp_path / "out")
