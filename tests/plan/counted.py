"""Small models, each counted on the meta device and measured with values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from peft import LoraConfig
from torch import nn
from transformers import BertConfig, BertForMaskedLM

from benchmarks.cost.methods import smt_config
from benchmarks.cost.model import checkpointed, llama, random_batch
from smt_peft import SMTConfig
from smt_peft.plan import methods
from smt_peft.plan.activations import Step, step
from smt_peft.plan.device import Device
from smt_peft.plan.layers import Layers
from smt_peft.plan.state import State, optimizer, state_of

SIZE = (2, 48)
DENSITY, RANK = 0.03, 4
LLAMA = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
BERT = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


@dataclass(frozen=True)
class Model:
    """How to build a frozen model in training mode.

    Args:
        name: `"llama"`, with fewer keys than queries, or `"bert"`.
        checkpointing: whether its layers are recomputed in backward.
    """

    name: str = "llama"
    checkpointing: bool = False
    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    def build(self) -> nn.Module:
        if self.name == "llama":
            return checkpointed(llama(LLAMA, self.device, self.dtype), self.checkpointing)
        model = BertForMaskedLM(BertConfig(**BERT, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
        return checkpointed(model.requires_grad_(False).train(), self.checkpointing)


def lora_config(dora: bool) -> LoraConfig:
    return LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", use_dora=dora)


def rosa_config() -> SMTConfig:
    return smt_config(DENSITY, lora_rank=RANK)


def without_values(model: Model, method: str) -> nn.Module:
    base = methods.empty(model.build)
    eight = smt_config(DENSITY, saved_activations="int8")
    put_on: dict[str, Callable[[], nn.Module]] = {
        "smt": lambda: methods.smt(base, smt_config(DENSITY), methods.assumed_selection(base, smt_config(DENSITY))),
        "rosa": lambda: methods.smt(base, rosa_config(), methods.assumed_selection(base, rosa_config())),
        "smt, int8": lambda: methods.smt(base, eight, methods.assumed_selection(base, eight)),
        "lora": lambda: methods.lora(base, lora_config(False)),
        "dora": lambda: methods.lora(base, lora_config(True)),
        "full": lambda: methods.full(base),
    }
    return put_on[method]()


def counted(model: Model, method: str, name: str = "") -> tuple[State, Step]:
    """With the optimizer of that name, or with `torch.optim.AdamW`, as the benchmark trains."""
    sized = without_values(model, method)
    own = optimizer(name or ("adamw_torch_fused" if model.device == "cuda" else "adamw_torch"), model.device)
    taken = own.temporaries(Layers().trained(sized))
    state = state_of(sized, own)
    batch, device = partial(random_batch, sized, SIZE, False), Device(model.device)
    found = step(sized, batch, device, temporaries=taken, backward=own.backward)
    return state, found
