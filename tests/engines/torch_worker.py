"""Trains the lesson under DDP, FSDP1 and FSDP2; started by `torchrun`, see test_torch_engines.py."""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from cases import run_cases
from helpers import assert_no_worse_than_torch, batch
from lesson import (
    ROWS,
    adamw,
    adapter_keys,
    base,
    config,
    forwards,
    logits,
    part,
    rank,
    smt_adamw,
    student,
    train,
    trainable,
)
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from wrap import fsdp1, fsdp2

from smt_peft.tuner.layer import SMTLayer


def whole_state(model: nn.Module) -> dict[str, torch.Tensor]:
    state = model.state_dict()
    return {key: value.full_tensor() if hasattr(value, "full_tensor") else value for key, value in state.items()}


def learn(wrap, out: Path, optimizer=adamw) -> dict:
    """Train, save by every road that PEFT and Accelerate take, and compare the base with what it was."""
    inner = student()
    keys = adapter_keys(inner)
    model = wrap(inner)
    losses = train(model, optimizer(trainable(model)))
    taken = forwards(inner)
    # Every process takes part, the first writes.
    inner.save_pretrained(out / "adapter", is_main_process=rank() == 0)
    whole = whole_state(model)
    dist.barrier()
    saved = load_file(out / "adapter" / "adapter_model.safetensors")
    own = get_peft_model_state_dict(inner)
    given = get_peft_model_state_dict(inner, state_dict={key.removeprefix("module."): t for key, t in whole.items()})
    for road in (own, given):
        assert road.keys() == saved.keys()
        assert all(torch.equal(saved[key], road[key]) for key in saved)
    before = base().state_dict()
    after = {key.removeprefix("module.").removeprefix("base_model.model."): value for key, value in whole.items()}
    after = {key.replace(".base_layer.", "."): value for key, value in after.items() if ".smt_blocks." not in key}
    assert after.keys() == before.keys()
    return {
        "losses": losses,
        "forwards": taken,
        "keys_missing": sorted(set(keys) - set(saved)),
        "keys_extra": sorted(set(saved) - set(keys)),
        "base_changed": [key for key in before if not torch.equal(before[key], after[key])],
    }


def refused(call: Callable, error: type[Exception]) -> str:
    try:
        call()
    except error as caught:
        return str(caught)
    raise AssertionError("nothing was raised")


def merging(wrap, out: Path) -> dict:
    """A sharded weight is not merged into, and nothing has been written; unloading gives the base's outputs."""
    inner = student(init_weights=False)
    model = wrap(inner)
    before = logits(model)
    messages = [
        refused(inner.merge_adapter, ValueError),
        refused(inner.merge_and_unload, ValueError),
        refused(lambda: inner.merge_and_unload(safe_merge=True), ValueError),
    ]
    assert torch.equal(logits(model), before)
    unloaded = inner.base_model.unload()
    assert not any(isinstance(module, SMTLayer) for module in unloaded.modules())
    assert torch.equal(logits(model), logits(base()))
    return {"messages": messages}


def injecting(out: Path) -> dict:
    """An adapter put into a model that is sharded already would be trained by every process for itself."""
    sharded = fsdp2(base())
    return {"message": refused(lambda: get_peft_model(sharded, config()), ValueError)}


def loading(out: Path) -> dict:
    """An adapter loaded into a sharded base for inference gives what it gives on a plain one."""
    if rank() == 0:
        student(init_weights=False).save_pretrained(out / "adapter")
    dist.barrier()
    expected = logits(PeftModel.from_pretrained(base(), out / "adapter"))
    model = PeftModel.from_pretrained(fsdp2(base()), out / "adapter")
    assert torch.equal(logits(model), expected)
    return {"forwards": forwards(model)}


def set_into_sharded(out: Path) -> dict:
    """`set_peft_model_state_dict` on a model that FSDP2 has sharded."""
    source = student(init_weights=False)
    target = fsdp2(student())
    set_peft_model_state_dict(target, get_peft_model_state_dict(source))
    assert torch.equal(logits(target), logits(source))
    return {}


def tensor_parallel(plan: dict, out: Path) -> dict:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    model = parallelize_module(base(), mesh, plan)
    return {"message": refused(lambda: get_peft_model(model, config()), NotImplementedError)}


def parallel_afterwards(style, out: Path) -> dict:
    """A plan applied to the base layers under the adapter."""
    model = student(init_weights=False)
    expected = logits(model)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    name = "base_model.model.model.layers.0.mlp.up_proj.base_layer"
    parallelize_module(model, mesh, {name: style})
    try:
        found = logits(model)
    except NotImplementedError as error:
        return {"message": str(error)}
    return {"difference": (found - expected).abs().max().item(), "forwards": forwards(model)}


def parts(out: Path) -> dict:
    """State dicts of which something is missing, or that hold parts, go to no file."""
    model = student()
    whole = model.state_dict()
    cut = {
        key: value[:0] if key.endswith("q_proj.smt_blocks.default.weight") else value for key, value in whole.items()
    }
    without = {key: value for key, value in whole.items() if ".smt_blocks." not in key}
    states = {"cut": cut} | ({"without": without, "empty": {}} if rank() == 0 else {})
    messages = []
    for name, state in states.items():
        directory = out / f"{name}_{rank()}"
        messages.append(refused(lambda d=directory, s=state: model.save_pretrained(d, state_dict=s), ValueError))
        assert not (directory / "adapter_model.safetensors").exists()
    # The process that does not save is handed nothing by Accelerate.
    assert rank() == 0 or get_peft_model_state_dict(model, state_dict={}) == {}
    return {"messages": messages}


def smt_adamw_on_parts(out: Path) -> dict:
    return {"message": refused(lambda: smt_adamw(trainable(fsdp2(student()))), ValueError)}


def whole_grad(parameter: torch.Tensor) -> torch.Tensor:
    grad = parameter.grad
    return (grad.full_tensor() if hasattr(grad, "full_tensor") else grad).flatten()


def block_grads(model: nn.Module, rows: dict, autocast: bool) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(**rows).loss
    loss.backward()
    return torch.cat([whole_grad(parameter) for parameter in trainable(model)])


def checkpointing(out: Path) -> dict:
    """Every kind of checkpointing, in both precisions and under both engines, gives one process's gradients."""
    rows = batch(rows=ROWS, seed=0)
    truth = block_grads(student(torch.float64, init_weights=False).train(), rows, autocast=False)
    done = []
    for autocast in (False, True):
        one = block_grads(student(init_weights=False).train(), rows, autocast)
        for engine, wrap in (("ddp", DistributedDataParallel), ("fsdp2", fsdp2)):
            for kind in (None, True, False):
                inner = student(init_weights=False).train()
                if kind is not None:
                    inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": kind})
                    inner.enable_input_require_grads()
                two = block_grads(wrap(inner), part(0), autocast)
                assert_no_worse_than_torch(two, one, truth)
                done.append([engine, {None: "none", True: "reentrant", False: "non-reentrant"}[kind], autocast])
    return {"done": done, "forwards": forwards(inner)}


CASES = {
    "ddp": partial(learn, DistributedDataParallel),
    "ddp_smt_adamw": partial(learn, DistributedDataParallel, optimizer=smt_adamw),
    "fsdp1_flat": partial(learn, partial(fsdp1, use_orig_params=False)),
    "fsdp1_orig": partial(learn, partial(fsdp1, use_orig_params=True)),
    "fsdp1_flat_smt_adamw": partial(learn, partial(fsdp1, use_orig_params=False), optimizer=smt_adamw),
    "fsdp1_orig_smt_adamw": partial(learn, partial(fsdp1, use_orig_params=True), optimizer=smt_adamw),
    "fsdp2": partial(learn, partial(fsdp2, reshard_after_forward=True)),
    "fsdp2_kept": partial(learn, partial(fsdp2, reshard_after_forward=False)),
    "fsdp2_bf16": partial(
        learn, partial(fsdp2, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    ),
    "fsdp2_smt_adamw": smt_adamw_on_parts,
    "parts": parts,
    "checkpointing": checkpointing,
    "merging_fsdp1": partial(merging, partial(fsdp1, use_orig_params=True)),
    "merging_fsdp2": partial(merging, fsdp2),
    "injecting": injecting,
    "loading": loading,
    "set_into_sharded": set_into_sharded,
    "tensor_parallel": partial(tensor_parallel, {"model.layers.0.mlp.up_proj": ColwiseParallel()}),
    "parallel_split": partial(parallel_afterwards, ColwiseParallel()),
    "parallel_joined": partial(parallel_afterwards, ColwiseParallel(output_layouts=Replicate())),
}


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    chosen = sys.argv[2:] or CASES
    run_cases({name: CASES[name] for name in chosen}, Path(sys.argv[1]))
    dist.destroy_process_group()
