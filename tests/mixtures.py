"""Tiny mixtures of experts, as Transformers stores them, modules that own their weights bare, and adapters on them."""

from __future__ import annotations

import copy

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from smt_peft import SMTConfig, ops
from smt_peft.tuner.experts import ParameterLayer
from smt_peft.tuner.layer import SMTLayer

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "attn_implementation": "eager",
}


def tiny_mixtral(experts: int = 4, **settings) -> MixtralForCausalLM:
    """Matrices of experts stored as `(out_features, in_features)`."""
    settings = {"intermediate_size": 48, "num_local_experts": experts, "num_experts_per_tok": 2} | settings
    return _drawn(MixtralForCausalLM(MixtralConfig(**COMMON | settings)))


def tiny_qwen3_moe(**settings) -> Qwen3MoeForCausalLM:
    settings = {"intermediate_size": 64, "moe_intermediate_size": 24, "num_experts": 4, "head_dim": 8} | settings
    return _drawn(Qwen3MoeForCausalLM(Qwen3MoeConfig(**COMMON | settings, num_experts_per_tok=2)))


def tiny_gpt_oss(**settings) -> GptOssForCausalLM:
    """Matrices of experts stored as `(in_features, out_features)`, with biases."""
    settings = {"intermediate_size": 48, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8} | settings
    full = {"layer_types": ["full_attention"] * 2, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    return _drawn(GptOssForCausalLM(GptOssConfig(**COMMON | settings | full)))


def tiny_llama4(**settings) -> Llama4ForCausalLM:
    """Every expert sees every token, in one batched product."""
    settings = {"intermediate_size": 48, "intermediate_size_mlp": 48, "num_local_experts": 4, "head_dim": 8} | settings
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_experts_per_tok": 1}
    return _drawn(Llama4ForCausalLM(Llama4TextConfig(**COMMON | settings | tokens)))


def _drawn(model: PreTrainedModel) -> PreTrainedModel:
    """Weights large enough that every expert's gradient counts, and biases that are not zero."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.1)
    return model


class Bank(nn.Module):
    """Matrices of its own, multiplied in whatever way `use` says."""

    def __init__(self, use, experts: int = 3, rows: int = 12, cols: int = 8):
        super().__init__()
        self.bank = Matrices(use, experts, rows, cols)

    def forward(self, x: Tensor) -> Tensor:
        return self.bank(x)


class Matrices(nn.Module):
    def __init__(self, use, experts: int, rows: int, cols: int):
        super().__init__()
        self.stack = nn.Parameter(torch.randn(experts, rows, cols))
        self.one = nn.Parameter(torch.randn(rows, cols))
        self.vector = nn.Parameter(torch.randn(rows))
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, x)


SETTINGS = {
    "target_modules": None,
    "target_parameters": EXPERTS,
    "block_size": 8,
    "density": 0.3,
    "score": "random",
    "init_weights": False,
}
MODELS = [tiny_mixtral, tiny_qwen3_moe, tiny_gpt_oss, tiny_llama4]
IMPLEMENTATIONS = ["eager", "batched_mm", "grouped_mm"]
CASES = [(make, how) for make in MODELS for how in (IMPLEMENTATIONS if make is not tiny_llama4 else ["eager"])]


def built(make, how="eager"):
    model = make()
    if make is not tiny_llama4:
        model.set_experts_implementation(how)
    return model


def adapted(model, **settings):
    return get_peft_model(model, SMTConfig(**{**SETTINGS, **settings}))


def layers(model) -> dict[str, ParameterLayer]:
    return {module.smt_name: module for module in model.modules() if isinstance(module, ParameterLayer)}


def parameter_of(layer: SMTLayer) -> str:
    return layer.smt_name if isinstance(layer, ParameterLayer) else f"{layer.smt_name}.weight"


def with_deltas(base, model):
    """A copy of the base with the adapter's dense delta added in fp32, every expert trained in full."""
    truth = copy.deepcopy(base)
    parameters = dict(truth.named_parameters())
    with torch.no_grad():
        for name, layer in layers(model).items():
            parameters[name].copy_(parameters[name].double() + layer.get_delta_weight("default").double())
    return truth, parameters


def in_double(model):
    """PyTorch's grouped product knows no fp64."""
    if not isinstance(model, Llama4ForCausalLM):
        model.set_experts_implementation("eager")
    return model.double()


def blocks_of(dense, layer):
    layout = layer.smt_blocks["default"].layout()
    return ops.block_gather(dense.reshape(layout.grid.shape), layout)
