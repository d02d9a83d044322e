"""Whole rows and columns trained: what PaCA and S2FT compute in their own, permuted or partial, form."""

from __future__ import annotations

import copy
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_no_worse_than_torch, batch, tiny_gpt2, tiny_llama
from peft import LoraConfig, PeftModel, get_peft_model
from saved import save
from torch import nn
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from smt_peft import SMTConfig, select_blocks
from smt_peft.export.lora import convert_to_lora
from smt_peft.presets import preset
from smt_peft.tuner.layer import SMTLayer

COUPLED = {"density": 0.5, "score": "random"}


def adapted(base, **settings):
    return get_peft_model(base, SMTConfig(**settings)).train()


def layers(model):
    return {layer.smt_name: layer for layer in model.modules() if isinstance(layer, SMTLayer)}


class Permuted:
    """S2FT as its paper writes it: chosen heads and channels first, so that what trains is one dense slice a matrix.

    Args:
        base: a Llama of two query heads to a key/value head.
        blocks: of an adapter on it.
    """

    def __init__(self, base, blocks):
        self.model = copy.deepcopy(base).requires_grad_(False)
        self.slices: dict[str, nn.Parameter] = {}
        for number, layer in enumerate(self.model.model.layers):
            path = f"model.layers.{number}"
            self._take(
                f"{path}.mlp", layer.mlp, ("gate_proj", "up_proj"), ("gate_proj", "up_proj"), "down_proj", blocks
            )
            attention = layer.self_attn
            self._take(f"{path}.self_attn", attention, ("q_proj", "k_proj", "v_proj"), ("v_proj",), "o_proj", blocks)

    def _take(self, path, module, movable, producers, consumer, blocks):
        count = 2 if "attn" in path else module.down_proj.in_features
        chosen = blocks[f"{path}.{consumer}"][:, 1].tolist()
        order = torch.tensor(chosen + [c for c in range(count) if c not in chosen])
        for name in movable:
            weight = getattr(module, name).weight
            weight.data = weight.data.unflatten(0, (count, -1))[order].flatten(0, 1)
        weight = getattr(module, consumer).weight
        weight.data = weight.data.unflatten(1, (count, -1))[:, order].flatten(1)
        share = len(chosen) / count
        for name in (*producers, consumer):
            if f"{path}.{name}" in blocks:
                weight, side = getattr(module, name).weight, int(name == consumer)
                part = weight.narrow(side, 0, round(share * weight.shape[side]))
                self.slices[f"{path}.{name}"] = nn.Parameter(part.clone())

    def weights(self):
        composed = {}
        for name, part in self.slices.items():
            weight = self.model.get_submodule(name).weight
            side = int(part.shape[0] == weight.shape[0])
            rest = weight.narrow(side, part.shape[side], weight.shape[side] - part.shape[side])
            composed[f"{name}.weight"] = torch.cat((part, rest), side)
        return composed

    def __call__(self, **inputs):
        return functional_call(self.model, self.weights(), kwargs=inputs)


def as_slice(blocks_Brc, name):
    """Blocks in the order of their channels as one dense slice."""
    consumer = name.endswith(("o_proj", "down_proj"))
    return blocks_Brc.transpose(0, 1).flatten(1) if consumer else blocks_Brc.flatten(0, 1)


@pytest.mark.parametrize("forward", ["swap", "additive"])
@pytest.mark.parametrize("coupled", ["both", "consumers"])
def test_coupled_blocks_train_as_the_dense_slices_of_the_permuted_model(coupled, forward):
    """The function, the gradients of one step, and what is computed after it; fp64 is the truth."""
    torch.manual_seed(0)
    base = tiny_llama(hidden=64)
    model = adapted(copy.deepcopy(base), coupled=coupled, forward=forward, **COUPLED)
    found = layers(model)
    blocks = {name: layer.smt_blocks["default"].index for name, layer in found.items()}
    plain, truth = Permuted(base, blocks), Permuted(base.double(), blocks)
    assert plain.slices.keys() == found.keys()
    outputs = [each(**batch()) for each in (model, plain, truth)]
    for output in outputs:
        output.loss.backward()
    assert_no_worse_than_torch(*(output.logits.detach() for output in outputs))
    for name, layer in found.items():
        ours = as_slice(layer.smt_blocks["default"].weight.grad, name)
        assert_no_worse_than_torch(ours, plain.slices[name].grad, truth.slices[name].grad)
    for trained in ((p for p in model.parameters() if p.requires_grad), plain.slices.values(), truth.slices.values()):
        torch.optim.SGD(list(trained), lr=0.5).step()
    after = [each(**batch()).logits.detach() for each in (model, plain, truth)]
    assert_no_worse_than_torch(*after)
    assert (after[2] - outputs[2].logits).abs().max() > 1e-3


@pytest.mark.parametrize("forward", ["swap", "additive"])
def test_paca_trains_its_columns_and_keeps_no_others(forward):
    """Against `F.linear` with the columns as a parameter of their own; of X the chosen columns alone are kept."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(48, 40), nn.Linear(40, 24))
    x, dy = torch.randn(6, 7, 48), torch.randn(6, 7, 24)
    model = adapted(
        copy.deepcopy(base), target_modules=["0", "1"], forward=forward, **preset("paca")["smt"] | {"num_blocks": 5}
    )
    indices = {name: layer.smt_blocks["default"].index[:, 1] for name, layer in layers(model).items()}

    def partial(dtype):
        parts = {}

        def run(x):
            for name, linear in base.named_children():
                weight, bias = linear.weight.detach().to(dtype), linear.bias.detach().to(dtype)
                parts[name] = weight[:, indices[name].long()].requires_grad_()
                x = F.linear(x, weight.index_copy(1, indices[name].long(), parts[name]), bias)
            return x

        y = run(x.to(dtype))
        y.backward(dy.to(dtype))
        return y.detach(), {name: part.grad for name, part in parts.items()}

    plain, truth = partial(torch.float32), partial(torch.float64)
    y = model(x)
    y.backward(dy)
    assert_no_worse_than_torch(y.detach(), plain[0], truth[0])
    for name, layer in layers(model).items():
        assert len(indices[name]) == 5
        ours = layer.smt_blocks["default"].weight.grad[:, :, 0].t()
        assert_no_worse_than_torch(ours, plain[1][name], truth[1][name])


def kept_bytes(model, x):
    """Bytes of storages that autograd keeps besides parameters and the input itself."""
    owned = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x).sum().backward()
    return sum(seen.values())


def test_columns_keep_their_part_of_the_input_and_rows_keep_all_of_it():
    linear, tokens, rank = nn.Linear(64, 64, bias=False), 32, 4
    x = torch.randn(tokens, 64, requires_grad=True)
    shapes = {"columns": (-1, 1), "rows": (1, -1), "matched": 16}
    kept = {}
    for name, size in shapes.items():
        spread = "assignment" if name == "matched" else "free"
        model = adapted(
            nn.Sequential(copy.deepcopy(linear)),
            target_modules=["0"],
            block_size=size,
            spread=spread,
            score="random",
            density=rank / 64 if name != "matched" else 0.25,
        )
        kept[name] = kept_bytes(model, x)
    lora = get_peft_model(nn.Sequential(copy.deepcopy(linear)), LoraConfig(r=rank // 2, target_modules=["0"])).train()
    kept["lora"] = kept_bytes(lora, x)
    row = 4 * tokens
    # LoRA of half the rank has as many parameters, and keeps the input and what it is reduced to.
    assert kept == {"columns": row * rank, "rows": row * 64, "matched": row * 64, "lora": row * (64 + rank // 2)}


def test_merging_is_the_forward_and_unmerging_is_the_base():
    for make in (tiny_llama, tiny_gpt2):
        base = make().eval()
        untouched = copy.deepcopy(base.state_dict())
        model = adapted(base, coupled="both", init_weights=False, **COUPLED).eval()
        adapter = model(**batch()).logits
        model.merge_adapter()
        torch.testing.assert_close(model(**batch()).logits, adapter, rtol=0, atol=1e-5)
        model.unmerge_adapter()
        restored = model.unload().state_dict()
        assert all(torch.equal(restored[name], value) for name, value in untouched.items())


def test_the_lora_form_is_as_wide_as_the_channels():
    model = adapted(tiny_llama(), coupled="consumers", init_weights=False, **COUPLED)
    form = convert_to_lora(model, "exact")
    for name, layer in layers(model).items():
        blocks = layer.smt_blocks["default"]
        assert form.ranks[name] == min(len(blocks.index) * blocks.grid.block_cols, *blocks.grid.shape)
        pair = (form.tensors[f"base_model.model.{name}.lora_{part}.weight"] for part in "BA")
        assert torch.equal(torch.matmul(*pair), layer.get_delta_weight("default"))


LOAD = """
import sys, torch, smt_peft
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, logits = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
ids = torch.arange(16).view(2, 8)
assert model.peft_config["default"].coupled == "both"
assert torch.equal(model(input_ids=ids).logits, torch.load(logits))
"""


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_an_adapter_of_several_shapes_loads_in_a_fresh_process(tmp_path, build):
    model = save(tmp_path, build, coupled="both", density=0.5, block_size="auto")
    shapes = {tuple(shape) for _, *shape in model.peft_config["default"].block_pattern.values()}
    assert len(shapes) >= 4
    torch.save(model(input_ids=torch.arange(16).view(2, 8)).logits, tmp_path / "logits.pt")
    paths = (tmp_path / "base", tmp_path / "adapter", tmp_path / "logits.pt")
    done = subprocess.run([sys.executable, "-c", LOAD, *map(str, paths)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # And on a base whose pairs are not known any more: the shapes are in the file.
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    for module in base.modules():
        vars(module).pop("head_dim", None)
    assert layers(PeftModel.from_pretrained(base, tmp_path / "adapter")).keys() == layers(model).keys()


def test_a_selection_by_gradients_is_what_trains():
    base = tiny_llama()
    config = SMTConfig(coupled="both", density=0.5)
    config.selection = select_blocks(base, config, [batch()], progress=False)
    model = get_peft_model(base, config)
    blocks = {name: layer.smt_blocks["default"].index for name, layer in layers(model).items()}
    assert blocks.keys() == config.selection.blocks.keys()
    assert all(torch.equal(index, config.selection.blocks[name]) for name, index in blocks.items())
    # The same config serves another model, though the first has filled it in.
    again = select_blocks(tiny_llama(), SMTConfig(coupled="both", density=0.5), [batch()], progress=False)
    assert again.grids == config.selection.grids


def test_channels_and_blocks_are_added_up_exactly():
    model = adapted(tiny_llama(), coupled="both", init_weights=False, **COUPLED)
    model.add_adapter("blocks", SMTConfig(density=0.2, block_size=8, score="random", init_weights=False))
    expected = {
        name: sum(layer.get_delta_weight(part) for part in layer.smt_blocks) for name, layer in layers(model).items()
    }
    model.add_weighted_adapter(["default", "blocks"], [1.0, 1.0], "sum")
    for name, layer in layers(model).items():
        torch.testing.assert_close(layer.get_delta_weight("sum"), expected[name], rtol=0, atol=1e-7)
    assert model.peft_config["sum"].coupled is None


def test_a_selection_outside_the_channels_is_refused():
    base = tiny_llama()
    other = select_blocks(base, SMTConfig(score="random", density=0.1), progress=False)
    with pytest.raises(ValueError, match="coupled='both' has no effect beside a selection"):
        get_peft_model(base, SMTConfig(coupled="both", selection=other))
    by_hand = replace(other, provenance={})
    with pytest.raises(ValueError, match="which is no target of the model"):
        get_peft_model(base, SMTConfig(coupled="both", selection=by_hand))
