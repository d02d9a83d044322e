"""Which matrices share channels: by the names and shapes of common architectures."""

from __future__ import annotations

import pytest
import torch
import transformers
from helpers import batch, tiny_gpt2, tiny_llama
from torch import nn

from smt_peft import SMTConfig
from smt_peft.bases.couplings import Coupling, Member, find_couplings
from smt_peft.bases.targets import find_targets

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 64,
}


def tiny(name: str, **settings):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES | {"attn_implementation": "eager"} | settings)
    return getattr(transformers, f"{name}Model")(config).eval()


# Channels of attention and feed-forward network, and where values lie: module, first stripe, step.
FOUND = {
    "llama": (tiny_llama, (2, 64), ("v_proj", 0, 1)),
    "gpt2": (tiny_gpt2, (4, 128), ("c_attn", 8, 1)),
    "bert": (lambda: tiny("Bert"), (4, 48), ("value", 0, 1)),
    "vit": (lambda: tiny("ViT"), (4, 48), ("v_proj", 0, 1)),
    "phi3": (lambda: tiny("Phi3", pad_token_id=0, eos_token_id=1, num_key_value_heads=2), (2, 48), ("qkv_proj", 6, 1)),
    "neox": (lambda: tiny("GPTNeoX"), (4, 48), ("query_key_value", 2, 3)),
    "qwen3": (lambda: tiny("Qwen3", num_key_value_heads=2, head_dim=16), (2, 48), ("v_proj", 0, 1)),
}


@pytest.mark.parametrize("name", FOUND)
def test_attention_and_feed_forward_of_every_layer_are_found(name):
    make, counts, (value, first, step) = FOUND[name]
    attention, feed_forward = find_couplings(make())[:2]
    assert (attention.channels, feed_forward.channels) == counts
    (rows,) = (member for member in attention.members if member.by_rows)
    assert rows.name.endswith("." + value) and (rows.first, rows.step) == (first, step)


def permuted(model: nn.Module, coupling: Coupling, seed: int) -> None:
    """Numbers the channels anew on every side: rows and their biases, columns; of an attention, its values alone."""
    order = torch.randperm(coupling.channels, generator=torch.Generator().manual_seed(seed))
    for member in coupling.members:
        module = model.get_submodule(member.name)
        weight = module.weight.data.t() if type(module).__name__ == "Conv1D" else module.weight.data
        lines = [weight if member.by_rows else weight.t()]
        if member.by_rows and module.bias is not None:
            lines.append(module.bias.data)
        stripes = member.stripes(torch.arange(coupling.channels))
        index = stripes[:, None] * member.width + torch.arange(member.width)
        for tensor in lines:
            tensor[index.flatten()] = tensor[index[order].flatten()]


@pytest.mark.parametrize("name", FOUND)
def test_channels_of_a_feed_forward_network_can_be_numbered_anew(name):
    """What makes two stripes one channel: no other numbering of one side gives the same function."""
    model = FOUND[name][0]().double().eval()
    inputs = {"pixel_values": torch.randn(1, 3, 224, 224).double()} if name == "vit" else {**batch()}
    inputs.pop("labels", None)
    with torch.no_grad():
        expected = model(**inputs)[0]
        coupling = find_couplings(model)[1]
        permuted(model, coupling, 1)
        torch.testing.assert_close(model(**inputs)[0], expected, rtol=0, atol=1e-10)
        permuted(model, Coupling(coupling.name, coupling.channels, coupling.members[:1]), 2)
        assert not torch.allclose(model(**inputs)[0], expected, atol=1e-6)


@pytest.mark.parametrize("name", FOUND)
def test_a_head_that_reads_nothing_makes_its_values_idle(name):
    """With the columns of a channel zero, nothing else than its rows of the values may be without effect."""
    model = FOUND[name][0]().double().eval()
    inputs = {"pixel_values": torch.randn(1, 3, 224, 224).double()} if name == "vit" else {**batch()}
    inputs.pop("labels", None)
    attention = find_couplings(model)[0]
    rows, columns = attention.members
    reader, maker = (model.get_submodule(member.name) for member in (columns, rows))
    flat = [
        module.weight.data.t() if type(module).__name__ == "Conv1D" else module.weight.data
        for module in (reader, maker)
    ]
    flat[0][:, columns.width : 2 * columns.width] = 0
    with torch.no_grad():
        expected = model(**inputs)[0]
        stripe = int(rows.stripes(torch.tensor([1])))
        flat[1][stripe * rows.width : (stripe + 1) * rows.width] += torch.randn(32)
        torch.testing.assert_close(model(**inputs)[0], expected, rtol=0, atol=1e-10)
        other = int(rows.stripes(torch.tensor([0])))
        flat[1][other * rows.width : (other + 1) * rows.width] += torch.randn(32)
        assert not torch.allclose(model(**inputs)[0], expected, atol=1e-6)


def test_only_targets_that_share_channels_are_left():
    model = tiny_llama(layers=1)
    names = {name.rpartition(".")[2] for name in find_targets(model, SMTConfig(coupled="both"))}
    assert names == {"v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    names = {name.rpartition(".")[2] for name in find_targets(model, SMTConfig(coupled="consumers"))}
    assert names == {"o_proj", "down_proj"}
    chosen = find_targets(model, SMTConfig(coupled="both", target_modules=["up_proj", "down_proj", "q_proj"]))
    assert {name.rpartition(".")[2] for name in chosen} == {"up_proj", "down_proj"}


class Odd(nn.Module):
    def __init__(self, **sides):
        super().__init__()
        for name, (rows, cols) in sides.items():
            self.add_module(name, nn.Linear(cols, rows))


@pytest.mark.parametrize(
    "sides",
    [{"first": (8, 4), "second": (4, 8)}, {"fc1": (8, 4), "fc2": (4, 6)}, {"v_proj": (8, 8), "o_proj": (8, 8)}],
    ids=["other names", "shapes that do not fit", "no head size"],
)
def test_a_model_without_pairs_is_refused_by_name(sides):
    with pytest.raises(ValueError, match="coupled='both': no two matrices of this model are known to share channels"):
        find_targets(Odd(**sides), SMTConfig(coupled="both", target_modules=list(sides)))


def test_targets_that_share_nothing_are_refused_with_the_names_that_do():
    with pytest.raises(
        ValueError, match=r"none of the 4 targeted .*named down_proj, gate_proj, o_proj, up_proj, v_proj"
    ):
        find_targets(tiny_llama(), SMTConfig(coupled="both", target_modules=["q_proj", "k_proj"]))
    with pytest.raises(ValueError, match="none of the 2 targeted modules, such as .*gate_proj"):
        find_targets(tiny_llama(), SMTConfig(coupled="consumers", target_modules=["gate_proj"]))


def test_a_member_numbers_its_stripes():
    member = Member("qkv", True, 8, first=2, step=3)
    assert member.stripes(torch.tensor([0, 2])).tolist() == [2, 8]
    assert member.grid((96, 32)).block_shape == (8, 32)
