"""Trains the lesson with low-rank pairs under DDP, FSDP1 and FSDP2; started by `torchrun`, see test_low_rank.py."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from cases import run_cases
from lesson import adamw, rank, student, train, trainable
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from wrap import fsdp1, fsdp2

from smt_peft.tuner.effective import effective_update

PAIR = {"lora_rank": 3, "lora_alpha": 6}


def learn(wrap: Callable[[nn.Module], nn.Module], count: bool, out: Path) -> dict:
    inner = student(**PAIR)
    model = wrap(inner)
    losses = train(model, adamw(trainable(model)))
    inner.save_pretrained(out / "adapter", is_main_process=rank() == 0)
    dist.barrier()
    state, saved = get_peft_model_state_dict(inner), load_file(out / "adapter" / "adapter_model.safetensors")
    assert state.keys() == saved.keys() and all(torch.equal(state[key], saved[key]) for key in saved)
    found = {name: asdict(each) for name, each in effective_update(inner).items()} if count else {}
    return {"losses": losses, "effective": found}


def main(out: Path) -> None:
    dist.init_process_group("gloo")
    run_cases(
        {
            "ddp": partial(learn, DistributedDataParallel, True),
            "fsdp2": partial(learn, fsdp2, True),
            "fsdp1": partial(learn, partial(fsdp1, use_orig_params=True), False),
            "fsdp1_flat": partial(learn, partial(fsdp1, use_orig_params=False), False),
        },
        out,
    )
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
