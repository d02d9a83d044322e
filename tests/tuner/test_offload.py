"""Models that Accelerate spreads over devices: weights that are here only while their layer computes."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from helpers import batch, tiny_llama
from peft import get_peft_model, get_peft_model_state_dict
from torch import nn

from smt_peft import SMTConfig, select_blocks
from smt_peft.tuner.linear import Linear


def config(**more) -> SMTConfig:
    return SMTConfig(**{"target_modules": "all-linear", "block_size": 8, "density": 0.15, "score": "random", **more})


def base() -> nn.Module:
    torch.manual_seed(0)
    return tiny_llama()


def offloaded(how: str, directory) -> nn.Module:
    model = base()
    if how == "cpu":
        return cpu_offload(model, execution_device=torch.device("cpu"))
    if how == "disk":
        return disk_offload(model, str(directory / "offload"), execution_device=torch.device("cpu"))
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu"}
    places |= {"model.layers.1": "disk", "model.norm": "cpu", "lm_head": "cpu"}
    return dispatch_model(model, places, main_device="cpu", offload_dir=str(directory / "offload"), force_hooks=True)


@pytest.fixture(params=["cpu", "disk", "some"])
def there(request, tmp_path) -> nn.Module:
    """The base with all its weights in memory or on disk between calls, or one layer of them on disk."""
    return offloaded(request.param, tmp_path)


def train(model: nn.Module) -> list[float]:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for seed in range(3):
        loss = model(**batch(seed=seed)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def additive(model: nn.Module) -> nn.Module:
    """The plain model, by the forward that hooked layers take: the same operations in the same order."""
    for layer in model.modules():
        if isinstance(layer, Linear):
            layer.base_layer.register_forward_hook(lambda *_: None)
    return model


def test_training_and_saving_give_what_the_plain_model_gives(there, tmp_path):
    plain, ours = additive(get_peft_model(base(), config())), get_peft_model(there, config())
    for layer in ours.modules():
        if isinstance(layer, Linear):
            assert layer.smt_blocks["default"].weight.device.type == "cpu"
    assert train(ours) == train(plain)
    hooked = [layer for layer in ours.modules() if isinstance(layer, Linear) and hasattr(layer.base_layer, "_hf_hook")]
    assert hooked and all(layer.extra_repr() == "forward=additive" for layer in hooked)
    expected, found = get_peft_model_state_dict(plain), get_peft_model_state_dict(ours)
    assert expected.keys() == found.keys() and all(torch.equal(expected[key], found[key]) for key in expected)
    ours.save_pretrained(tmp_path / "adapter")
    base().save_pretrained(tmp_path / "base")
    with torch.no_grad():
        torch.save({"batch": batch(), "logits": ours.eval()(**batch()).logits}, tmp_path / "expected.pt")
    done = subprocess.run([sys.executable, "-c", RELOAD, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout.strip().endswith("equal"), done.stderr


# Onto the plain base, and onto one that is offloaded again: the same operations there, so the same bits.
RELOAD = """
import sys, torch, smt_peft
from accelerate import cpu_offload
from peft import PeftModel
from transformers import AutoModelForCausalLM
expected = torch.load(sys.argv[1] + "/expected.pt")
for again in (False, True):
    base = AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/base", attn_implementation="eager")
    base = cpu_offload(base, execution_device=torch.device("cpu")) if again else base
    model = PeftModel.from_pretrained(base, sys.argv[1] + "/adapter").eval()
    with torch.no_grad():
        logits = model(**expected["batch"]).logits
    torch.testing.assert_close(logits, expected["logits"], rtol=0, atol=0 if again else 1e-6)
print("equal")
"""


@pytest.mark.parametrize("score", ["grad_abs", "grad_sum_abs", "activation", "magnitude"])
def test_blocks_are_chosen_as_on_the_plain_model(there, score):
    batches = [batch(seed=seed) for seed in range(2)]
    chosen, expected = (
        select_blocks(model, config(score=score), batches, num_batches=2, progress=False) for model in (there, base())
    )
    assert chosen.blocks.keys() == expected.blocks.keys()
    assert all(torch.equal(chosen.blocks[name], expected.blocks[name]) for name in expected.blocks)


@pytest.mark.parametrize("safe_merge", [False, True])
def test_merging_gives_what_the_plain_model_gives(there, safe_merge):
    plain, ours = (get_peft_model(model, config(init_weights=False)) for model in (base(), there))
    for name, parameter in plain.named_parameters():
        if "smt_blocks" in name:
            ours.get_parameter(name).data.copy_(parameter)
    expected, merged = (model.merge_and_unload(safe_merge=safe_merge).eval() for model in (plain, ours))
    ids = {"input_ids": batch()["input_ids"]}
    with torch.no_grad():
        assert torch.equal(merged(**ids).logits, expected(**ids).logits)


def test_a_merge_that_is_refused_has_written_nothing(there):
    ours = get_peft_model(there, config(init_weights=False))
    ids = {"input_ids": batch()["input_ids"]}
    with torch.no_grad(), ours.disable_adapter():
        before = ours.eval()(**ids).logits
    last = [layer for layer in ours.modules() if isinstance(layer, Linear)][-1]
    last.smt_blocks["default"].weight.data[0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaNs detected"):
        ours.merge_and_unload(safe_merge=True)
    with torch.no_grad(), ours.disable_adapter():
        assert torch.equal(ours(**ids).logits, before)
