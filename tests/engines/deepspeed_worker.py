"""Trains the lesson under DeepSpeed ZeRO on the CPU; started by `torchrun`, see test_deepspeed.py."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from functools import partial
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
from cases import run_cases
from helpers import batch
from lesson import (
    ROWS,
    STEPS,
    adamw,
    adapter_keys,
    base,
    config,
    forwards,
    mean,
    part,
    rank,
    smt_adamw,
    student,
    trainable,
)
from peft import get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

from smt_peft import select_blocks

ENGINE = {
    "train_micro_batch_size_per_gpu": ROWS // 2,
    "gradient_accumulation_steps": 1,
    "zero_allow_untested_optimizer": True,
}


def settings(stage: int) -> dict:
    # Of 0, so that even these small weights are partitioned.
    return {**ENGINE, "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}}


def student_at_init(inject_inside: bool) -> nn.Module:
    """Weights partitioned as they are made; the adapter put in inside that context, too, or after it."""
    with deepspeed.zero.Init(config_dict_or_path=settings(3)):
        model = base()
        if inject_inside:
            model = get_peft_model(model, config())
    # Each process has drawn its parts by itself; what the others have drawn in one piece is put in.
    expected = base().state_dict()
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
            if ".smt_blocks." not in name:
                parameter.copy_(expected[plain(name)])
    return model if inject_inside else get_peft_model(model, config())


def plain(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def start(model: nn.Module, stage: int, make_optimizer=adamw):
    parameters = trainable(model)
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=parameters, optimizer=make_optimizer(parameters), config=settings(stage)
    )
    return engine


def learn(make, stage: int, out: Path, make_optimizer=adamw) -> dict:
    inner = make()
    keys = adapter_keys(inner)
    engine = start(inner, stage, make_optimizer)
    losses = []
    engine.train()
    for step in range(STEPS):
        loss = engine(**part(step)).loss
        engine.backward(loss)
        engine.step()
        losses.append(mean(loss))
    taken = forwards(inner)
    inner.save_pretrained(out / "adapter", is_main_process=rank() == 0)
    dist.barrier()
    saved = load_file(out / "adapter" / "adapter_model.safetensors")
    roads = [get_peft_model_state_dict(inner)]
    if stage == 3:
        # What Accelerate and Trainer gather: whole in the first process, nothing in the other.
        whole = engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=True)
        roads += [get_peft_model_state_dict(inner, state_dict=whole or {})] if rank() == 0 else []
        assert get_peft_model_state_dict(inner, state_dict={}) == {}
    for road in roads:
        assert road.keys() == saved.keys()
        assert all(torch.equal(saved[key], road[key]) for key in saved)
    found = {
        "losses": losses,
        "forwards": taken,
        "keys_missing": sorted(set(keys) - set(saved)),
        "keys_extra": sorted(set(saved) - set(keys)),
        "base_changed": changed(inner),
        "trainable": inner.base_model.get_nb_trainable_parameters(),
    }
    if stage == 3:
        found["merging"] = merging(inner)
    engine.destroy()
    return found


def changed(inner: nn.Module) -> list[str]:
    """Names of base weights that are not what they were."""
    expected = base().state_dict()
    names = []
    for name, parameter in inner.get_base_model().named_parameters():
        if ".smt_blocks." in name:
            continue
        with deepspeed.zero.GatheredParameters([parameter]):
            if not torch.equal(parameter, expected[plain(name)]):
                names.append(name)
    return names


def merging(inner: nn.Module) -> str:
    try:
        inner.merge_and_unload()
    except ValueError as error:
        return str(error)
    raise AssertionError("nothing was raised")


def choose(out: Path) -> dict:
    """Blocks chosen through an engine whose weights are partitioned, and a plain refusal without one."""
    loader = [batch(rows=2, seed=10 + 2 * i + rank()) for i in range(2)]
    engine = start(student(), 3)
    selection = select_blocks(engine, config(score="grad_abs"), loader, num_batches=8, progress=False)
    selection.save(out / f"grad_abs_{rank()}.safetensors")
    engine.destroy()
    with deepspeed.zero.Init(config_dict_or_path=settings(3)):
        model = base()
    try:
        select_blocks(model, config(score="grad_abs"), loader, num_batches=8, progress=False)
    except ValueError as error:
        return {"message": str(error)}
    raise AssertionError("nothing was raised")


CASES = {
    "zero2": partial(learn, student, 2),
    "zero2_smt_adamw": partial(learn, student, 2, make_optimizer=smt_adamw),
    "zero3": partial(learn, student, 3),
    "zero3_smt_adamw": partial(learn, student, 3, make_optimizer=smt_adamw),
    "zero3_init": partial(learn, partial(student_at_init, False), 3),
    "zero3_init_inside": partial(learn, partial(student_at_init, True), 3),
    "choose": choose,
}


if __name__ == "__main__":
    torch.set_num_threads(1)
    # Compiles for minutes a reduction in shared memory, which Gloo does as well.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", timeout=timedelta(seconds=120))
    chosen = sys.argv[2:] or CASES
    run_cases({name: CASES[name] for name in chosen}, Path(sys.argv[1]))
    dist.destroy_process_group()
