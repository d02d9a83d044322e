"""Tiny mixtures of experts, as Transformers stores them, and a module that owns its weights bare."""

from __future__ import annotations

import torch
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
