"""Adapters on disk: what is saved loads again, in a fresh process too, and what is damaged is refused by name."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from helpers import batch, tiny_gpt2, tiny_llama
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from smt_peft import SMTConfig, select_blocks

SETTINGS = {"target_modules": "all-linear", "density": 0.2, "block_size": 8, "score": "magnitude"}


def trained(base, **settings):
    model = get_peft_model(base, SMTConfig(**{**SETTINGS, "init_weights": False, **settings}))
    return model.eval()


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """A base checkpoint, an adapter on it, and the logits of both together."""
    tmp_path = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    # Counts that differ from module to module, as a global budget gives them.
    model = trained(base, budget="global", spread="free")
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path, model(**batch()).logits.detach()


@pytest.fixture
def saved(pristine, tmp_path):
    """The same, for a test to damage."""
    path, logits = pristine
    shutil.copytree(path, tmp_path, dirs_exist_ok=True)
    return tmp_path, logits


def test_the_files_are_pefts_own_layout(saved):
    path, _ = saved
    config = json.loads((path / "adapter" / "adapter_config.json").read_text())
    tensors = load_file(path / "adapter" / "adapter_model.safetensors")
    assert config["peft_type"] == "SMT" and "selection" not in config
    counts = {count for count, _, _ in config["block_pattern"].values()}
    assert len(counts) > 1
    for module, (count, rows, cols) in config["block_pattern"].items():
        weight = tensors.pop(f"base_model.model.{module}.smt_blocks.weight")
        index = tensors.pop(f"base_model.model.{module}.smt_blocks.index")
        assert weight.shape == (count, rows, cols) and weight.dtype == torch.float32
        assert index.shape == (count, 2) and index.dtype == torch.int32
    assert not tensors


def test_the_model_card_says_what_to_import(saved):
    path, _ = saved
    card = (path / "adapter" / "README.md").read_text()
    assert card.count("import smt_peft") == 1
    model = trained(AutoModelForCausalLM.from_pretrained(path / "base"))
    model.save_pretrained(path / "adapter")
    assert (path / "adapter" / "README.md").read_text().count("import smt_peft") == 1
    # And what that spares its reader.
    code = "import sys; from peft import PeftConfig; PeftConfig.from_pretrained(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, str(path / "adapter")], capture_output=True, text=True)
    assert "KeyError: 'SMT'" in done.stderr


# In a process of its own, every road by which an adapter gets into a model, and what must hold at its end.
ROADS = """
import sys
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
import smt_peft

directory = sys.argv[1]
adapter, expected = directory + "/adapter", torch.load(directory + "/expected.pt")


def base(**settings):
    return AutoModelForCausalLM.from_pretrained(directory + "/base", **settings)


def logits(model):
    return model.eval()(**expected["batch"]).logits


def arrives(model):
    return torch.equal(logits(model), expected["logits"])


def peft_model():
    model = PeftModel.from_pretrained(base(), adapter)
    return arrives(model) and not any(p.requires_grad for p in model.parameters())


def peft_model_through_meta():
    return arrives(PeftModel.from_pretrained(base(), adapter, low_cpu_mem_usage=True))


def auto_peft_model():
    return arrives(AutoPeftModelForCausalLM.from_pretrained(adapter))


def injected():
    model = inject_adapter_in_model(PeftConfig.from_pretrained(adapter), base())
    set_peft_model_state_dict(model, load_file(adapter + "/adapter_model.safetensors"))
    return arrives(model)


def transformers():
    model = base()
    model.load_adapter(adapter)
    return arrives(model)


def auto_model():
    return arrives(AutoModelForCausalLM.from_pretrained(adapter))


def a_second_adapter_and_the_first_deleted():
    model = PeftModel.from_pretrained(base(), adapter, "first")
    model.load_adapter(adapter, "second")
    model.delete_adapter("first")
    model.set_adapter("second")
    return arrives(model)


def a_bf16_copy_of_the_base():
    model = PeftModel.from_pretrained(base(dtype=torch.bfloat16), adapter)
    return torch.allclose(logits(model).float(), expected["logits"], atol=0.05)


def to_go_on_training():
    model = PeftModel.from_pretrained(base(), adapter, is_trainable=True).train()
    model(**expected["batch"]).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    return len(trained) > 0 and all(p.grad is not None for p in trained)


print("arrived:", *(name for name in sys.argv[2:] if globals()[name]()))
"""
NAMES = re.findall(r"def (\w+)\(\):", ROADS)


@pytest.fixture(scope="module")
def arrived(pristine):
    path, logits = pristine
    torch.save({"batch": batch(), "logits": logits}, path / "expected.pt")
    done = subprocess.run([sys.executable, "-c", ROADS, str(path), *NAMES], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.rpartition("arrived:")[2].split()


@pytest.mark.parametrize("road", NAMES)
def test_what_was_saved_arrives_in_a_fresh_process(arrived, road):
    assert road in arrived


def test_modules_to_save_and_gpt2(tmp_path):
    base = tiny_gpt2().eval()
    base.save_pretrained(tmp_path / "base")
    model = trained(base, modules_to_save=["ln_f"])
    model.save_pretrained(tmp_path / "adapter")
    torch.save({"batch": batch(), "logits": model(**batch()).logits}, tmp_path / "expected.pt")
    done = subprocess.run([sys.executable, "-c", ROADS, str(tmp_path), "peft_model"], capture_output=True, text=True)
    assert done.stdout.split()[-1] == "peft_model", done.stderr


class TestWrongBase:
    def test_other_weights(self, saved):
        path, _ = saved
        torch.manual_seed(1)
        with pytest.raises(
            ValueError, match=r"model\.layers\.\S+: the base weights are not those.*base_model_name_or_path"
        ):
            PeftModel.from_pretrained(tiny_llama(), path / "adapter")

    def test_other_shapes(self, saved):
        path, _ = saved
        _edit_config(path, base_fingerprint=None)
        with pytest.raises(ValueError, match="block_pattern|has shape|matches no target"):
            PeftModel.from_pretrained(tiny_llama(hidden=16), path / "adapter")

    def test_fewer_layers(self, saved):
        path, _ = saved
        with pytest.raises(ValueError, match=r"block_pattern names 'model.layers.1.*no target module"):
            PeftModel.from_pretrained(tiny_llama(layers=1), path / "adapter")

    def test_the_model_is_as_before_the_error(self, saved):
        path, _ = saved
        torch.manual_seed(1)
        model = get_peft_model(tiny_llama(), SMTConfig(**SETTINGS))
        names = [name for name, _ in model.named_parameters()]
        with pytest.raises(ValueError, match="base weights"):
            model.load_adapter(path / "adapter", "other")
        assert [name for name, _ in model.named_parameters()] == names
        assert list(model.peft_config) == ["default"]


def _damage(path, change):
    file = path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if key.endswith("q_proj.smt_blocks.index"))
    change(tensors, key, key.replace("index", "weight"))
    save_file(tensors, file, {"format": "pt"})


def _edit_config(path, **changes):
    file = path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def _set(key_of, value):
    def change(tensors, index, weight):
        key = index if key_of == "index" else weight
        tensors[key] = value(tensors[key])

    return change


DAMAGES = {
    "out of range": (_set("index", lambda t: t + 1000), "outside the grid"),
    "negative": (_set("index", lambda t: t - 1), "outside the grid"),
    "duplicated": (_set("index", lambda t: t[:1].expand_as(t).contiguous()), "listed twice"),
    "unsorted": (_set("index", lambda t: t.flip(0).contiguous()), "not sorted"),
    "wrong dtype": (_set("index", lambda t: t.float()), "must be int32"),
    "int64": (_set("index", lambda t: t.long()), "must be int32"),
    "NaN": (_set("weight", lambda t: t * float("nan")), "NaN or infinity"),
    "infinite": (_set("weight", lambda t: t + float("inf")), "NaN or infinity"),
    "integer weight": (_set("weight", lambda t: t.int()), "not a float type"),
    "wrong shape": (_set("weight", lambda t: t[:, :4].contiguous()), "has shape"),
    "no index": (lambda tensors, index, weight: tensors.pop(index), "has no smt_blocks.index"),
    "no weight": (lambda tensors, index, weight: tensors.pop(weight), "has no smt_blocks.weight"),
}


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_adapter_is_refused_by_module_name(saved, kind, low_cpu_mem_usage):
    path, _ = saved
    change, message = DAMAGES[kind]
    _damage(path, change)
    with pytest.raises(ValueError, match=f"layers.0.self_attn.q_proj: .*{message}"):
        PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(path / "base"), path / "adapter", low_cpu_mem_usage=low_cpu_mem_usage
        )


def test_a_damaged_adapter_leaves_the_model_it_was_loaded_into(saved):
    path, logits = saved
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(path / "base"), path / "adapter")
    _damage(path, DAMAGES["NaN"][0])
    with pytest.raises(ValueError, match="NaN or infinity"):
        model.load_adapter(path / "adapter", "other")
    assert list(model.peft_config) == ["default"]
    assert not any(".other." in name for name, _ in model.named_parameters())
    assert torch.equal(model(**batch()).logits, logits)


def test_a_road_that_skips_the_checks_still_meets_them_before_an_operation(saved):
    path, _ = saved
    _damage(path, DAMAGES["out of range"][0])
    loaded = AutoModelForCausalLM.from_pretrained(path / "base")
    with pytest.raises(ValueError, match="q_proj: .*outside the grid"):
        loaded.load_adapter(str(path / "adapter"))
        loaded(**batch())


@pytest.mark.parametrize("keep", [0, 5, 200, -100])
def test_a_truncated_adapter_file(saved, keep):
    path, _ = saved
    file = path / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    base = AutoModelForCausalLM.from_pretrained(path / "base")
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors cannot be read.*save the adapter again"):
        PeftModel.from_pretrained(base, path / "adapter")
    assert not any("smt" in name for name, _ in base.named_modules())


@pytest.mark.parametrize("entry", [[3], [3, 8, -1], [0, 8, 8], "x", [3, 8, "8"], [10**9, 8, 8]], ids=str)
def test_a_damaged_block_pattern(saved, entry):
    path, _ = saved
    pattern = json.loads((path / "adapter" / "adapter_config.json").read_text())["block_pattern"]
    _edit_config(path, block_pattern={**pattern, next(iter(pattern)): entry})
    with pytest.raises(ValueError, match="block_pattern"):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(path / "base"), path / "adapter")


def test_a_selection_for_another_model_is_refused_before_anything_changes():
    config = SMTConfig(**SETTINGS)
    selection = select_blocks(tiny_llama(), config, None)
    torch.manual_seed(1)
    for base, message in (
        (tiny_llama(), "base weights are not those"),
        (tiny_llama(hidden=16), "selection is for a"),
        (tiny_llama(layers=1), "no target of the model"),
    ):
        names = [name for name, _ in base.named_modules()]
        with pytest.raises(ValueError, match=message):
            get_peft_model(base, SMTConfig(**SETTINGS, selection=selection))
        assert [name for name, _ in base.named_modules()] == names


def test_a_selection_by_path(tmp_path):
    base = tiny_llama()
    selection = select_blocks(base, SMTConfig(**SETTINGS), None)
    selection.save(tmp_path / "s.safetensors")
    model = get_peft_model(base, SMTConfig(**SETTINGS, selection=str(tmp_path / "s.safetensors")))
    assert model.peft_config["default"].block_pattern == {
        name: [len(blocks), 8, 8] for name, blocks in selection.blocks.items()
    }
    with pytest.raises(FileNotFoundError, match="select_blocks"):
        get_peft_model(tiny_llama(), SMTConfig(**SETTINGS, selection=str(tmp_path / "none")))
