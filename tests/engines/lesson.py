"""What every engine has to learn: a tiny Llama, its blocks, its batches, and the steps of a training.

One process and two, whatever shards the model, run these same steps over the same global batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from helpers import batch, tiny_llama
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from smt_peft import SMTConfig
from smt_peft.optim import SMTAdamW
from smt_peft.tuner.linear import Linear

STEPS, ROWS = 5, 4
# AdamW divides a gradient by its size: one of the size of rounding would move by a whole learning rate, up or down.
# With eps far above rounding, two runs whose gradients differ by rounding stay that close.
RATE, EPS = 2e-2, 1e-4


def base(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return tiny_llama(layers=2).to(dtype)


def config(**more) -> SMTConfig:
    return SMTConfig(**{"target_modules": "all-linear", "block_size": 8, "density": 0.15, "score": "random", **more})


def student(dtype: torch.dtype = torch.float32, **more) -> PeftModel:
    return get_peft_model(base(dtype), config(**more))


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def part(step: int) -> dict[str, Tensor]:
    """This process's rows of a step's global batch, every second one of two."""
    whole = batch(rows=ROWS, seed=step)
    count = dist.get_world_size() if dist.is_initialized() else 1
    return {name: tensor[rank() :: count] for name, tensor in whole.items()}


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def adamw(parameters: Iterable) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=RATE, eps=EPS, weight_decay=0.1)


def smt_adamw(parameters: Iterable, **more) -> SMTAdamW:
    return SMTAdamW(parameters, lr=RATE, eps=EPS, weight_decay=0.1, **more)


def mean(loss: Tensor) -> float:
    """The mean over processes: each has as many tokens, so it is the loss of the global batch."""
    loss = loss.detach().double().clone()
    if dist.is_initialized():
        dist.all_reduce(loss)
        loss /= dist.get_world_size()
    return loss.item()


def train(
    model: Callable, optimizer: torch.optim.Optimizer, steps: Iterable[int] = range(STEPS), **autocast
) -> list[float]:
    losses = []
    model.train()
    for step in steps:
        with torch.autocast("cpu", torch.bfloat16, **{"enabled": False, **autocast}):
            loss = model(**part(step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(mean(loss))
    return losses


def forwards(model: nn.Module) -> list[str]:
    """The forwards that the layers took last, each once."""
    return sorted({module._told or "none" for module in model.modules() if isinstance(module, Linear)})


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=batch(rows=2, seed=99)["input_ids"]).logits


def adapter_keys(model: PeftModel) -> list[str]:
    """What a complete adapter file holds."""
    names = [name for name, module in model.named_modules() if isinstance(module, Linear)]
    return sorted(f"{name}.smt_blocks.{tensor}" for name in names for tensor in ("weight", "index"))


def chosen_equal(one, other) -> bool:
    """Whether two selections hold the same blocks."""
    return one.blocks.keys() == other.blocks.keys() and all(
        torch.equal(one.blocks[name], other.blocks[name]) for name in one.blocks
    )
