"""An adapter loaded in place of another, without a new compilation."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import torch
from helpers import batch, tiny_llama
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter as pefts_hotswap_adapter
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from smt_peft import SMTConfig
from smt_peft.tuner import hotswap_adapter, make_room

SETTINGS = {"target_modules": ["q_proj", "up_proj"], "block_size": 8, "score": "random", "init_weights": False}
# Name, settings: `first` is loaded; the others are swapped in.
ADAPTERS = {
    "first": {"density": 0.3},
    "elsewhere": {"density": 0.3, "seed": 1},
    "fewer": {"density": 0.1, "seed": 2},
    "fewer modules": {"density": 0.2, "target_modules": ["q_proj"], "seed": 3},
    "more": {"density": 0.5, "seed": 4},
    "other modules": {"density": 0.1, "target_modules": ["v_proj"]},
    "other blocks": {"density": 0.3, "block_size": 4},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A base, adapters on it, and each one's logits when loaded by itself."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("hotswap")
    tiny_llama().save_pretrained(path / "base")
    logits = {}
    for name, settings in ADAPTERS.items():
        model = get_peft_model(base_of(path), SMTConfig(**{**SETTINGS, **settings})).eval()
        model.save_pretrained(path / name)
        logits[name] = model(**batch()).logits.detach()
    return path, logits


def base_of(path):
    return AutoModelForCausalLM.from_pretrained(path / "base")


def loaded(path, name="first", **kwargs):
    return PeftModel.from_pretrained(base_of(path), path / name, **kwargs).eval()


def assert_unchanged(model, before):
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", ["elsewhere", "fewer", "fewer modules"])
def test_it_is_as_if_the_adapter_had_been_loaded_by_itself(saved, name):
    path, logits = saved
    model = loaded(path)
    parameters = {name: id(p) for name, p in model.named_parameters()}
    assert torch.equal(model(**batch()).logits, logits["first"])
    hotswap_adapter(model, path / name, "default")
    # Zero blocks change no value, but may change which of two equal sums a kernel takes.
    torch.testing.assert_close(model(**batch()).logits, logits[name], rtol=1e-6, atol=1e-6)
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    model.merge_adapter()
    torch.testing.assert_close(model(**batch()).logits, logits[name], rtol=1e-6, atol=1e-6)
    model.unmerge_adapter()
    hotswap_adapter(model, path / "first", "default")
    assert torch.equal(model(**batch()).logits, logits["first"])


def test_what_was_swapped_in_saves_and_reloads_in_a_fresh_process(saved, tmp_path):
    path, logits = saved
    model = loaded(path)
    hotswap_adapter(model, path / "fewer", "default")
    model.save_pretrained(tmp_path / "again")
    torch.save({"batch": batch(), "logits": model(**batch()).logits.detach()}, tmp_path / "expected.pt")
    code = """
import sys, torch, smt_peft
from peft import AutoPeftModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1] + "/again").eval()
expected = torch.load(sys.argv[1] + "/expected.pt")
assert torch.equal(model(**expected["batch"]).logits, expected["logits"])
print("equal")
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout.strip().endswith("equal"), done.stderr


@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_compiled_model_is_not_compiled_anew(saved, fullgraph):
    path, logits = saved
    model = loaded(path)
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph.forward

    inputs = {"input_ids": batch()["input_ids"], "use_cache": False}
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=fullgraph)
    with torch.no_grad():
        compiled(**inputs)
        count = len(compilations)
        assert count
        for name in ("elsewhere", "fewer", "fewer modules", "first"):
            hotswap_adapter(compiled, path / name, "default")
            torch.testing.assert_close(compiled(**inputs).logits, logits[name], rtol=1e-5, atol=1e-6)
    assert len(compilations) == count


def test_room_for_a_larger_adapter(saved):
    path, logits = saved
    model = loaded(path)
    with pytest.raises(ValueError, match=r"up_proj: the saved adapter has 16 blocks.*room for 9.*make_room"):
        hotswap_adapter(model, path / "more", "default")
    make_room(model, "default", [PeftConfig.from_pretrained(path / name) for name in ("more", "fewer")])
    torch.testing.assert_close(model(**batch()).logits, logits["first"], rtol=1e-6, atol=1e-6)
    assert not any(p.requires_grad for p in model.parameters())
    for name in ("more", "fewer", "first"):
        hotswap_adapter(model, path / name, "default")
        torch.testing.assert_close(model(**batch()).logits, logits[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "name, message",
    [
        ("other modules", r"layers\.0\.self_attn\.v_proj: the saved adapter has blocks in this module"),
        ("other blocks", r"up_proj: the saved adapter has blocks of 4 x 4, the loaded one of 8 x 8"),
        ("more", r"up_proj: the saved adapter has 16 blocks"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_changes(saved, name, message):
    path, _ = saved
    model = loaded(path)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        hotswap_adapter(model, path / name, "default")
    assert_unchanged(model, before)
    if name != "more":
        with pytest.raises(ValueError, match=message):
            make_room(model, "default", [PeftConfig.from_pretrained(path / name)])
        assert_unchanged(model, before)


@pytest.mark.parametrize("part, change", [("weight", float("nan")), ("index", 99)])
def test_a_damaged_file_is_refused_before_anything_changes(saved, tmp_path, part, change):
    path, _ = saved
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path / "elsewhere" / file.name)
    # The last module, so that an eager copy would have written the others by then.
    tensors[[key for key in tensors if key.endswith(f"smt_blocks.{part}")][-1]][0] = change
    save_file(tensors, file, {"format": "pt"})
    (tmp_path / "adapter_config.json").write_text((path / "elsewhere" / "adapter_config.json").read_text())
    model = loaded(path)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.q_proj: "):
        hotswap_adapter(model, tmp_path, "default")
    assert_unchanged(model, before)


def test_other_refusals(saved, tmp_path):
    path, _ = saved
    model = loaded(path)
    with pytest.raises(ValueError, match="no SMT adapter 'other'"):
        hotswap_adapter(model, path / "fewer", "other")
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"q_proj: adapter default is merged.*unmerge_adapter"):
        hotswap_adapter(model, path / "fewer", "default")
    model.unmerge_adapter()
    get_peft_model(base_of(path), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match=r"lora is an adapter of another method \(LORA\)"):
        hotswap_adapter(model, tmp_path / "lora", "default")
    full = get_peft_model(base_of(path), SMTConfig(**SETTINGS, density=0.1, modules_to_save=["lm_head"]))
    full.save_pretrained(tmp_path / "full")
    with pytest.raises(ValueError, match="the saved adapter has modules_to_save"):
        hotswap_adapter(model, tmp_path / "full", "default")
    with pytest.raises(ValueError, match="the loaded adapter has modules_to_save"):
        hotswap_adapter(full, path / "fewer", "default")
    with pytest.raises(ValueError, match="before torch.compile"):
        make_room(torch.compile(model), "default", [])


def test_room_that_a_weight_does_not_have_is_refused_before_anything_changes(saved):
    path, _ = saved
    model = loaded(path)
    before = copy.deepcopy(model.state_dict())
    config = PeftConfig.from_pretrained(path / "more")
    config.block_pattern["model.layers.1.mlp.up_proj"][0] = 10**6
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj: block_pattern asks for 1000000 blocks"):
        make_room(model, "default", [config])
    assert_unchanged(model, before)


def test_another_base_is_refused(saved, tmp_path):
    path, _ = saved
    torch.manual_seed(1)
    other = get_peft_model(tiny_llama(), SMTConfig(**SETTINGS, density=0.3))
    other.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="the base weights are not those expected"):
        hotswap_adapter(loaded(path), tmp_path, "default")


def test_embeddings_are_swapped_when_the_table_is_the_same(saved, tmp_path):
    path, _ = saved
    settings = {**SETTINGS, "target_modules": ["embed_tokens"], "density": 0.3}
    first, second = (get_peft_model(base_of(path), SMTConfig(**settings, seed=seed)).eval() for seed in (0, 1))
    second.save_pretrained(tmp_path / "same")
    assert any("base_layer" in key for key in load_file(tmp_path / "same" / "adapter_model.safetensors"))
    hotswap_adapter(first, tmp_path / "same", "default")
    assert torch.equal(first(**batch()).logits, second(**batch()).logits)
    # Also while another adapter is merged into it.
    first.add_adapter("merged", SMTConfig(**settings, seed=2))
    first.merge_adapter(["merged"])
    hotswap_adapter(first, tmp_path / "same", "default")
    first.unmerge_adapter()
    assert torch.equal(first(**batch()).logits, second(**batch()).logits)
    second.get_input_embeddings().base_layer.weight.data[0] += 1
    second.save_pretrained(tmp_path / "other")
    config = tmp_path / "other" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_fingerprint": None}))
    with pytest.raises(ValueError, match="embed_tokens.*brings a weight of its own"):
        hotswap_adapter(first, tmp_path / "other", "default")


def test_pefts_own_function_refuses_before_anything_changes(saved):
    path, _ = saved
    model = loaded(path)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="(?i)hot-?swapping only supports .*LORA.* but SMT was passed"):
        pefts_hotswap_adapter(model, str(path / "fewer"), "default", torch_device="cpu")
    assert_unchanged(model, before)
