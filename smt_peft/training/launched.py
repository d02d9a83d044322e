"""A run in several processes, as `accelerate launch` and `torchrun` start them: what they do together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import TrainingArguments

from ..bases.sharded import is_sharded
from .errors import VerificationError


def wait_for_everyone(args: TrainingArguments) -> None:
    """Until every process has come here, none goes on."""
    if args.world_size > 1:  # asking for it joins the processes
        PartialState().wait_for_everyone()


@contextmanager
def all_or_none(first: bool) -> Iterator[None]:
    """What the first process raises inside, the others, which wait for it at the end, raise, too."""
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    told = [None if failure is None else f"{type(failure).__name__} in the first process: {failure}"]
    if PartialState._shared_state and PartialState().num_processes > 1 and (first or failure is None):
        broadcast_object_list(told)
    if failure is not None:
        raise failure
    if told[0] is not None:
        raise VerificationError(told[0])


def unprepare(model: nn.Module) -> None:
    """Let a training prepare a model that an evaluation has prepared.

    Accelerate 1.15 would hand it back as it is, without DDP, and each process would train by itself, silently.
    """
    model.__dict__.pop("_is_accelerate_prepared", None)


def forget_engine(args: TrainingArguments) -> None:
    """Let another trainer be made after one that was made for DeepSpeed: Accelerate takes its plugin but once."""
    if args.deepspeed_plugin is not None:
        AcceleratorState._reset_state()


@contextmanager
def whole_or_gathering(model: nn.Module) -> Iterator[nn.Module]:
    """The model, or where ZeRO-3 has partitioned its weights, an engine without optimizer that gathers them."""
    if not is_sharded(model):
        yield model
        return
    import deepspeed

    engine, *_ = deepspeed.initialize(
        model=model, config={"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    )
    try:
        yield engine
    finally:
        engine.destroy()
