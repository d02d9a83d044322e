"""A warm-up pass with activation checkpointing: the same scores bit for bit, and less saved for backward."""

from __future__ import annotations

import pytest
import torch
from helpers import batch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from smt_peft import SMTConfig, select_blocks

BATCHES = [batch(rows=2, length=24, seed=i) for i in range(2)]
SIZES = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4}
SCORES = ["grad_abs", "mean_abs", "activation"]


def llama(layers: int = 4) -> nn.Module:
    """Its attention drops by `self.attention_dropout if self.training`."""
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=layers, intermediate_size=64, attention_dropout=0.5))


def opt(layers: int = 4) -> nn.Module:
    """Its layers drop what they add by `self.training` of their own, and its stack drops whole layers."""
    return OPTForCausalLM(
        OPTConfig(
            **SIZES,
            num_hidden_layers=layers,
            ffn_dim=64,
            word_embed_proj_dim=32,
            dropout=0.5,
            attention_dropout=0.5,
            layerdrop=0.5,
        )
    )


def bert(layers: int = 4) -> nn.Module:
    """`nn.Dropout`, in modules of its own."""
    return BertForMaskedLM(
        BertConfig(
            **SIZES,
            num_hidden_layers=layers,
            intermediate_size=64,
            hidden_dropout_prob=0.5,
            attention_probs_dropout_prob=0.5,
        )
    )


class OldStack(nn.Module):
    """Decides by itself, as stacks did before layers could, and drops layers and outputs at rates of its own."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Dropout(0.5)) for _ in range(4))
        self.gradient_checkpointing, self.layerdrop, self.dropout = False, 0.5, 0.5
        self.recomputed = 0

    def forward(self, x):
        for layer in self.layers:
            if self.training and torch.rand([]) < self.layerdrop:
                continue
            if self.gradient_checkpointing and self.training:
                self.recomputed += 1
                x = checkpoint(layer, x, use_reentrant=False)
            else:
                x = layer(x)
        return nn.functional.dropout(x, self.dropout, self.training).square().mean()


def select(model: nn.Module, score: str, batches=None):
    config = SMTConfig(target_modules="all-linear", density=0.3, block_size=4, score=score)
    return select_blocks(model, config, batches or BATCHES, progress=False)


def assert_same(one, other):
    assert one == other
    for name, expected in one.scores.items():
        assert torch.equal(other.scores[name], expected), name


@pytest.mark.parametrize("build", [llama, opt, bert])
@pytest.mark.parametrize("score", SCORES)
def test_scores_are_those_without_checkpointing_bit_for_bit(build, score):
    torch.manual_seed(0)
    model = build().train()
    plain = select(model, score)
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        assert_same(plain, select(model, score))


def test_a_stack_that_checkpoints_by_itself_drops_nothing():
    torch.manual_seed(0)
    model, xs = OldStack().train(), [(torch.randn(8, 32),) for _ in range(2)]
    plain = select(model, "grad_abs", xs)
    model.gradient_checkpointing = True
    assert_same(plain, select(model, "grad_abs", xs))
    assert model.recomputed == 8
    assert (model.layerdrop, model.dropout) == (0.5, 0.5)


class Saved:
    """Bytes of the storages that a forward pass saves for backward, those of the weights aside."""

    def __init__(self, model: nn.Module):
        self.weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self.kept = {}

    def __call__(self, model, batch):
        with saved_tensors_hooks(self._pack, lambda tensor: tensor):
            return model(**batch).loss

    def _pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.weights:
            # Held, so that no other storage gets its address.
            self.kept[storage.data_ptr()] = storage
        return tensor

    def total(self) -> int:
        return sum(storage.nbytes() for storage in self.kept.values())


def saved_by_a_layer(build, checkpointing: bool) -> float:
    """What each layer of a model adds to what is saved."""
    totals = {}
    for layers in (2, 4):
        model = build(layers).eval()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        saved = Saved(model)
        config = SMTConfig(target_modules="all-linear", density=0.3, block_size=4, score="grad_abs")
        select_blocks(model, config, BATCHES[:1], loss_fn=saved, progress=False)
        totals[layers] = saved.total()
    return (totals[4] - totals[2]) / 2


@pytest.mark.parametrize("build", [llama, opt, bert])
def test_a_checkpointed_layer_saves_its_input_alone(build):
    hidden = 2 * 24 * 32 * 4
    assert saved_by_a_layer(build, checkpointing=True) <= hidden
    assert saved_by_a_layer(build, checkpointing=False) > 5 * hidden
