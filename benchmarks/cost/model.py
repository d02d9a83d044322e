"""The model that is trained: a Llama with random weights, as cost depends on the shape alone, and a random batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

LLAMA_3_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}


@dataclass(frozen=True)
class Case:
    """What is trained, and on how much.

    Args:
        hidden: width of the model; a multiple of 64, so that blocks of 16 tile every weight.
        layers: decoder layers.
        tokens: of the one sequence in a batch.
        density: trained share of the targeted weights, for SMT and for whatever is given as many parameters.
        targets: `target_modules` of every adapter.
        checkpointing: whether the decoder layers are recomputed in backward.
    """

    hidden: int = 1024
    layers: int = 4
    tokens: int = 512
    density: float = 0.0084
    targets: str | tuple[str, ...] = "all-linear"
    checkpointing: bool = False

    @property
    def batch(self) -> tuple[int, int]:
        return (1, self.tokens)

    def build(self) -> LlamaForCausalLM:
        """The frozen model, fp32 on the CPU."""
        heads = max(1, min(16, self.hidden // 16))
        shape = {
            "vocab_size": 2048,
            "hidden_size": self.hidden,
            "intermediate_size": self.hidden * 11 // 4,
            "num_hidden_layers": self.layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "max_position_embeddings": self.tokens,
        }
        return checkpointed(llama(shape, "cpu", torch.float32), self.checkpointing)


def llama(shape: dict[str, Any], device: str, dtype: torch.dtype) -> LlamaForCausalLM:
    """A frozen model in training mode, its weights drawn from one seed."""
    torch.manual_seed(0)
    with torch.device(device), default_dtype(dtype):
        model = LlamaForCausalLM(LlamaConfig(**shape))
    return model.requires_grad_(False).train()


def checkpointed(model: nn.Module, wanted: bool = True) -> nn.Module:
    """The same model, with activation checkpointing of the non-reentrant kind switched on if that is wanted."""
    if wanted:
        # Transformers 5.23 has renamed it.
        old = getattr(model, "gradient_checkpointing_enable", None)
        getattr(model, "activation_checkpointing_enable", old)({"use_reentrant": False})
    return model


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def random_batch(model: nn.Module, size: tuple[int, int], frozen: bool) -> dict[str, Tensor]:
    """Embedded tokens `(sequences, tokens, hidden)` and labels `(sequences, tokens)`.

    Embeddings require a gradient where no weight does: forward and the gradient of the input are the frozen pass. Where
    the table of embeddings is trained, token ids take their place, as its gradient is part of the cost.
    """
    some = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    labels = torch.randint(0, model.config.vocab_size, size, device=some.device)
    if any(p.requires_grad and name.endswith("embed_tokens.weight") for name, p in model.named_parameters()):
        return {"input_ids": labels.clone(), "labels": labels}
    embeds = torch.randn(*size, model.config.hidden_size, dtype=some.dtype, device=some.device)
    return {"inputs_embeds": embeds.requires_grad_(frozen), "labels": labels}
