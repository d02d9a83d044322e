"""Chooses blocks with two processes, on plain and on sharded models; started by `torchrun`, see test_selection.py."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from cases import run_cases
from helpers import batch
from lesson import adamw, base, config, rank, student, train, trainable
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.nn.parallel import DistributedDataParallel
from wrap import fsdp2

from smt_peft import select_blocks

SCORES = ("grad_abs", "grad_sum_abs", "mean_abs", "activation")


def batches(count: int = 2) -> list[dict]:
    """This process's batches: of the four of `test_selection.py`, every second one."""
    return [batch(rows=2, seed=10 + 2 * i + rank()) for i in range(count)]


def choose(make, out: Path) -> dict:
    """Choose by every score; the model goes on as if nothing had been."""
    model = make()
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    for score in SCORES:
        selection = select_blocks(model, config(score=score), batches(), num_batches=8, progress=False)
        selection.save(out / f"{score}_{rank()}.safetensors")
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    return {}


def raised(model: nn.Module, error: type[Exception], loader, score: str = "grad_abs") -> str:
    try:
        select_blocks(model, config(score=score), loader, num_batches=8, progress=False)
    except error as caught:
        return str(caught)
    raise AssertionError("nothing was raised")


def breaking() -> Iterator[dict]:
    yield batch(seed=1)
    if rank() == 1:
        raise ValueError("a broken row")
    yield batch(seed=2)


def everyone_raises(make, out: Path) -> dict:
    message = raised(make(), ValueError if rank() else RuntimeError, breaking())
    gathered = [None, None]
    dist.all_gather_object(gathered, message)
    return {"messages": gathered}


def uneven(out: Path) -> dict:
    """One process has a batch more: a sharded model is called as often as all have one."""
    loader = batches(2 if rank() else 3)
    found = select_blocks(fsdp2(base()), config(score="grad_abs"), loader, num_batches=8, progress=False)
    return {"batches": found.provenance["num_batches"]}


def trains_after(out: Path) -> dict:
    """A selection on a sharded model that is in training changes none of its losses."""
    losses = []
    for selecting in (False, True):
        model = fsdp2(student())
        if selecting:
            select_blocks(model, config(score="grad_abs"), batches(), num_batches=8, progress=False)
        optimizer = adamw(trainable(model))
        losses.append(train(model, optimizer, range(2)))
        if selecting:
            select_blocks(model, config(score="grad_abs"), batches(), num_batches=8, progress=False)
        losses[-1] += train(model, optimizer, range(2, 4))
    return {"losses": losses}


def magnitude(out: Path) -> dict:
    """A score by weights gathers them, a matrix at a time."""
    found = select_blocks(fsdp2(base()), config(score="magnitude"))
    found.save(out / f"magnitude_{rank()}.safetensors")
    return {}


CASES = {
    "plain": partial(choose, base),
    "ddp": partial(choose, lambda: DistributedDataParallel(student())),
    "fsdp2_base": partial(choose, lambda: fsdp2(base())),
    "fsdp2_peft": partial(choose, lambda: fsdp2(student())),
    "magnitude": magnitude,
    "plain_raises": partial(everyone_raises, base),
    "fsdp2_raises": partial(everyone_raises, lambda: fsdp2(base())),
    "uneven": uneven,
    "trains_after": trains_after,
    "taylor": lambda out: {"message": raised(fsdp2(base()), ValueError, batches(), score="taylor")},
    "fsdp1": lambda out: {"message": raised(FSDP(base(), device_id=torch.device("cpu")), ValueError, batches())},
}


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    chosen = sys.argv[2:] or CASES
    run_cases({name: CASES[name] for name in chosen}, Path(sys.argv[1]))
    dist.destroy_process_group()
