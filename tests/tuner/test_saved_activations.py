"""`saved_activations="int8"` over every kind of layer: less is saved, and nothing but the blocks' gradients changes."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from helpers import batch, tiny_gpt2, tiny_llama
from mixtures import EXPERTS, tiny_gpt_oss, tiny_qwen3_moe
from packing import DEQUANTISABLE, packed_linear
from peft import PeftConfig, get_peft_model
from torch import nn

from smt_peft import SMTConfig, ops
from smt_peft.tuner import hotswap_adapter, make_room
from smt_peft.tuner.layer import SMTLayer
from smt_peft.tuner.linear import Linear

SETTINGS = {"density": 0.2, "block_size": 8, "score": "random"}
INPUTS = {"rows": 4, "length": 24}


def experts(make, how):
    model = make()
    model.set_experts_implementation(how)
    return model


def packed(kind):
    model = tiny_llama()
    for owner in list(model.model.layers.modules()):
        for name, child in list(owner.named_children()):
            if type(child) is nn.Linear:
                setattr(owner, name, packed_linear(child, kind))
    return model


EXPERTS_ONLY = {"target_modules": [], "target_parameters": EXPERTS}
CASES = {
    "swap": (tiny_llama, {}),
    "additive": (tiny_llama, {"forward": "additive"}),
    "conv1d": (tiny_gpt2, {}),
    "few columns": (tiny_llama, {"spread": "free", "max_column_share": 0.3}),
    "tables": (tiny_llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    **{f"experts, {how}": (lambda how=how: experts(tiny_qwen3_moe, how), EXPERTS_ONLY)
       for how in ("eager", "batched_mm", "grouped_mm")},
    "experts, flipped": (lambda: experts(tiny_gpt_oss, "eager"), EXPERTS_ONLY),
    **{kind: (lambda kind=kind: packed(kind), {}) for kind in DEQUANTISABLE},
}  # fmt: skip


def adapted(case, **settings):
    make, own = CASES[case]
    torch.manual_seed(0)
    return get_peft_model(make(), SMTConfig(**SETTINGS | own | settings)).train()


def one_step(model):
    """Logits, gradients of the blocks by module, and bytes saved for backward."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(**batch(**INPUTS))
    output.loss.backward()
    layers = {layer.smt_name: layer for layer in model.modules() if isinstance(layer, SMTLayer)}
    return (
        output.logits,
        {name: each.smt_blocks["default"].weight.grad for name, each in layers.items()},
        sum(kept.values()),
    )


def bounds(model):
    """How far the gradient of each linear layer may be off: `|dY|^T s / 2`, all tokens being one group."""
    found, seen = {}, {}
    for layer in (layer for layer in model.modules() if isinstance(layer, Linear)):
        layer.register_forward_pre_hook(lambda layer, args: seen.update({layer: args[0].detach().flatten(0, -2)}))

        def backward(layer, _, grads):
            steps = seen[layer].abs().amax(0) / 127
            off = (grads[0].flatten(0, -2).abs().sum(0)[:, None] * steps / 2).contiguous()
            found[layer.smt_name] = ops.block_gather(off, layer.smt_blocks["default"].layout())

        layer.register_full_backward_hook(backward)
    model(**batch(**INPUTS)).loss.backward()
    return found


@pytest.mark.parametrize("case", CASES)
def test_less_is_saved_and_only_gradients_of_blocks_change_and_those_little(case):
    logits, exact, whole = one_step(adapted(case))
    logits_8bit, found, fewer = one_step(adapted(case, saved_activations="int8"))
    assert torch.equal(logits, logits_8bit)
    limits = bounds(adapted(case))
    assert exact and (limits or case.startswith("experts"))
    for name, truth in exact.items():
        if name in limits:
            assert bool(((found[name] - truth).abs() <= limits[name] * (1 + 1e-5) + 1e-5 * truth.abs().max()).all())
        # Tables keep ids, not inputs.
        assert torch.equal(found[name], truth) == name.endswith("embed_tokens")
    assert fewer < whole


def test_the_setting_is_saved_and_an_adapter_that_trains_on_in_another_process_has_it(tmp_path):
    model = adapted("swap", saved_activations="int8", init_weights=False)
    model.save_pretrained(tmp_path / "adapter")
    model.unload().save_pretrained(tmp_path / "base")
    code = """
import sys
from peft import PeftModel
from transformers import AutoModelForCausalLM
import smt_peft
from smt_peft.tuner.delta import SMTBlocks
base = AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/base")
for trainable in (True, False):
    model = PeftModel.from_pretrained(base, sys.argv[1] + "/adapter", is_trainable=trainable, torch_device="cpu")
    assert model.peft_config["default"].saved_activations == "int8"
    assert all(blocks.int8 for blocks in model.modules() if isinstance(blocks, SMTBlocks))
    base = model.unload()
print("arrived")
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout.split()[-1:] == ["arrived"], done.stderr


def test_swapping_in_an_adapter_with_more_blocks_keeps_it(tmp_path):
    adapted("swap", density=0.4, init_weights=False).save_pretrained(tmp_path / "more")
    model = adapted("swap", saved_activations="int8")
    make_room(model, "default", [PeftConfig.from_pretrained(tmp_path / "more")])
    hotswap_adapter(model, tmp_path / "more", "default")
    blocks = [layer.smt_blocks["default"] for layer in model.modules() if isinstance(layer, SMTLayer)]
    assert blocks and all(each.int8 for each in blocks)


def test_each_adapter_has_its_own():
    model = adapted("swap", saved_activations="int8")
    model.add_adapter("full", SMTConfig(**SETTINGS))
    for layer in (layer for layer in model.modules() if isinstance(layer, SMTLayer)):
        assert layer.smt_blocks["default"].int8 and not layer.smt_blocks["full"].int8
