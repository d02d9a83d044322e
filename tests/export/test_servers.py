"""The LoRA form for engines: what they are told, one rank for all modules, and the same function with PEFT alone."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import get_args

import pytest
import torch
from helpers import batch, tiny_gpt2, tiny_llama
from safetensors.torch import load_file
from saved import save

from smt_peft.cli import main
from smt_peft.export.lora import convert_to_lora, exact_ranks
from smt_peft.export.servers import RANKS, serving_notes, vllm_rank
from smt_peft.tuner.layer import SMTLayer

pytestmark = [pytest.mark.filterwarnings("ignore:.*tie_word_embeddings"), pytest.mark.filterwarnings("ignore:fan_in")]
CAPPED = {"max_lora_rank": 8, "block_size": 4, "density": 0.02, "spread": "free", "budget": "global"}


@pytest.mark.parametrize(
    ("rank", "allowed"), [(1, 1), (2, 8), (8, 8), (9, 16), (64, 64), (257, 320), (512, 512), (513, None)]
)
def test_the_next_rank_that_vllm_takes(rank, allowed):
    assert vllm_rank(rank) == allowed


def test_the_ranks_are_those_of_vllm():
    vllm = pytest.importorskip("vllm.config.lora")
    assert get_args(vllm.MaxLoRARanks) == RANKS


CODE = """
import sys, torch
from peft import AutoPeftModelForCausalLM
expected = torch.load(sys.argv[1] + "/expected.pt")
for form in ("lora", "uniform"):
    model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1] + "/" + form).eval()
    found = {}
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            assert module.scaling["default"] == 1
            found[name] = module.get_delta_weight("default")
    assert found.keys() == expected["deltas"].keys()
    assert all(torch.equal(delta, expected["deltas"][name]) for name, delta in found.items()), form
    logits = model(**expected["batch"]).logits
    error, size = (logits - expected["logits"]).abs().max(), expected["logits"].abs().max()
    assert error <= 1e-5 * size, (form, error, size)
assert not any(name.startswith("smt_peft") for name in sys.modules)
print("equal")
"""


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_a_capped_adapter_is_served_as_lora_without_loss(build, tmp_path, capsys):
    model = save(tmp_path, build, **CAPPED)
    assert len(set(exact_ranks(model).values())) > 1
    command = ["export", str(tmp_path / "adapter"), "--format", "lora", "--rank", "exact"]
    assert main([*command, str(tmp_path / "lora")]) == 0
    told = capsys.readouterr().out
    assert "vLLM: vllm serve BASE --enable-lora --max-lora-rank 8" in told and "--uniform-rank" in told
    assert main([*command, str(tmp_path / "uniform"), "--uniform-rank"]) == 0
    assert "--uniform-rank" not in capsys.readouterr().out
    settings = json.loads((tmp_path / "uniform" / "adapter_config.json").read_text())
    assert (
        settings["r"] == settings["lora_alpha"] <= 8 and not settings["rank_pattern"] and not settings["alpha_pattern"]
    )
    # As vLLM and SGLang read them: factors alone, those of SGLang all of rank r.
    for form in ("lora", "uniform"):
        tensors = load_file(tmp_path / form / "adapter_model.safetensors")
        ranks = [t.shape[0] if "lora_A" in key else t.shape[1] for key, t in tensors.items()]
        assert all("lora_A" in key or "lora_B" in key for key in tensors) and max(ranks) == settings["r"]
        assert form == "lora" or set(ranks) == {settings["r"]}
    layers = {layer.smt_name: layer for layer in model.modules() if isinstance(layer, SMTLayer)}
    deltas = {name: layer.get_delta_weight("default") for name, layer in layers.items()}
    expected = {"batch": batch(), "logits": model(**batch()).logits.detach(), "deltas": deltas}
    torch.save(expected, tmp_path / "expected.pt")
    done = subprocess.run([sys.executable, "-c", CODE, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout.strip().endswith("equal"), done.stderr


def test_tables_have_one_rank_too(tmp_path):
    model = save(tmp_path, tiny_llama, **CAPPED | {"target_modules": ["embed_tokens", "q_proj", "up_proj"]})
    form, uniform = convert_to_lora(model, "exact"), convert_to_lora(model, "exact").uniform()
    assert set(uniform.ranks.values()) == {form.config.r}
    for key, tensor in ((key, tensor) for key, tensor in uniform.tensors.items() if ".lora_" in key):
        side = 0 if "lora_A" in key or "embedding_A" in key else 1
        assert tensor.shape[side] == form.config.r
        own = form.tensors[key].shape[side]
        assert torch.equal(tensor.narrow(side, 0, own), form.tensors[key])
        assert not tensor.narrow(side, own, form.config.r - own).any()


def test_what_an_engine_would_refuse_is_told(tmp_path):
    full = save(tmp_path / "full", tiny_llama, modules_to_save=["lm_head"])
    (note,) = serving_notes(convert_to_lora(full, "exact"))
    assert "refuse it for its modules_to_save; merge it instead" in note
    wide = save(tmp_path / "wide", lambda: tiny_llama(hidden=640, layers=1), block_size=1, density=0.05, spread="free")
    form = convert_to_lora(wide, "exact")
    assert form.config.r > 512 and "vLLM takes no rank above 512; merge it" in serving_notes(form)[0]
