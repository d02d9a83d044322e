"""Trains half a run and saves it, or takes it up again; started by `torchrun` once for each, see test_resume.py."""

from __future__ import annotations

import sys
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from cases import run_cases
from lesson import adamw, rank, smt_adamw, student, train, trainable
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel
from wrap import fsdp2

HALF = 4
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


def save_plain(model, inner: PeftModel, optimizer, out: Path) -> None:
    if rank() == 0:
        torch.save([get_peft_model_state_dict(inner), optimizer.state_dict()], out / "half.pt")


def load_plain(model, inner: PeftModel, optimizer, out: Path) -> None:
    adapter, state = torch.load(out / "half.pt", weights_only=True)
    set_peft_model_state_dict(inner, adapter)
    optimizer.load_state_dict(state)


def save_sharded(model, inner: PeftModel, optimizer, out: Path) -> None:
    """Each process its own part, by `torch.distributed.checkpoint`."""
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=out / "half")


def load_sharded(model, inner: PeftModel, optimizer, out: Path) -> None:
    weights, state = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=out / "half")
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)


def save_whole(model, inner: PeftModel, optimizer, out: Path) -> None:
    """One file, gathered by the first process."""
    states = get_state_dict(model, optimizer, options=FULL)
    if rank() == 0:
        torch.save(states, out / "half.pt")


def load_whole(model, inner: PeftModel, optimizer, out: Path) -> None:
    weights, state = torch.load(out / "half.pt", weights_only=True)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state, options=FULL)


def save_half(wrap, make_optimizer, save, out: Path) -> dict:
    inner = student()
    model = wrap(inner)
    optimizer = make_optimizer(trainable(model))
    losses = train(model, optimizer, range(HALF))
    save(model, inner, optimizer, out)
    return {"losses": losses}


def finish(wrap, make_optimizer, load, out: Path) -> dict:
    """A whole run without a stop, and the second half of the one that was saved."""
    whole = student()
    model = wrap(whole)
    optimizer = make_optimizer(trainable(model))
    losses = train(model, optimizer, range(2 * HALF))
    inner = student()
    model_again = wrap(inner)
    again = make_optimizer(trainable(model_again))
    load(model_again, inner, again, out)
    resumed = train(model_again, again, range(HALF, 2 * HALF))
    states = [tensors_of(optimizer), tensors_of(again)]
    weights = [get_peft_model_state_dict(one) for one in (whole, inner)]
    return {
        "losses": losses,
        "resumed": resumed,
        "states": len(states[0]),
        "same_state": len(states[0]) == len(states[1]) and all(map(torch.equal, *states)),
        "same_weights": all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0]),
    }


def tensors_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """The state of every parameter, in the order of the parameters; of a sharded one this process's part."""
    found = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            found += [state[name] for name in sorted(state)]
    return [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in found]


SETTINGS = {
    "ddp": (DistributedDataParallel, adamw, save_plain, load_plain),
    "ddp_smt_adamw": (DistributedDataParallel, smt_adamw, save_plain, load_plain),
    "fsdp2_dcp": (fsdp2, adamw, save_sharded, load_sharded),
    "fsdp2_full": (fsdp2, adamw, save_whole, load_whole),
}


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    out, part = Path(sys.argv[1]), sys.argv[2]
    if part == "first":
        cases = {name: partial(save_half, wrap, make, save) for name, (wrap, make, save, _) in SETTINGS.items()}
    else:
        cases = {name: partial(finish, wrap, make, load) for name, (wrap, make, _, load) in SETTINGS.items()}
    run_cases(cases, out)
    dist.destroy_process_group()
