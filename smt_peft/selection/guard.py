"""Borrowing a model: frozen, still, without dropout; handed back exactly as it was found."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from ..bases.repacking import REPACKS, unpack_for_cpu
from ..bases.sharded import is_dtensor

_MISSING = object()


def base_of(model: nn.Module) -> nn.Module:
    """The model inside data-parallel wrappers and a `PeftModel`: the one whose module names a selection uses."""
    model = unwrapped(model)
    return model.get_base_model() if _has_adapters(model) else model


def unwrapped(model: nn.Module) -> nn.Module:
    while isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)) or _is_deepspeed(model):
        model = model.module
    return model


def _is_deepspeed(model: nn.Module) -> bool:
    return any(cls.__name__ == "DeepSpeedEngine" for cls in type(model).__mro__)


def _reshard(model: nn.Module) -> None:
    """Put back the parts that FSDP2 has replaced by whole weights: it is they whose flags are to be restored."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()


def _called(model: nn.Module, base: nn.Module) -> nn.Module:
    """What to call for a pass through `base`: FSDP2 gathers the outermost weights when its root is called."""
    return model if any(is_dtensor(parameter) for parameter in base.parameters()) else base


@contextmanager
def borrowed(model: nn.Module, seed: int, checkpointing: bool) -> Iterator[nn.Module]:
    """The base model to call, with every parameter frozen, in evaluation mode and with seeded random generators.

    Adapters are off and no key-value cache is kept. When `checkpointing` is asked for, modules for which it is switched
    on go on with it: they say that they train, since Transformers checkpoints only then, but compute as in evaluation.
    They use the non-reentrant kind meanwhile: the reentrant one drops gradients where a segment's inputs need none.

    Raises:
        ValueError: an adapter is merged into the weights, so they are not the base's.
    """
    base = base_of(model)
    merged = next((name for name, module in base.named_modules() if getattr(module, "merged", False) is True), None)
    if merged is not None:
        raise ValueError(
            f"{merged}: an adapter is merged into the weight, so it is not the base model's; call "
            "unmerge_adapter() first"
        )
    with ExitStack() as stack:
        stack.enter_context(seeded((parameter.device for parameter in base.parameters()), seed))
        # Put back last: switching adapters off and on changes requires_grad by itself.
        for parameter in model.parameters():
            stack.callback(parameter.requires_grad_, parameter.requires_grad)
        if _has_adapters(model := unwrapped(model)):
            stack.enter_context(model.disable_adapter())
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for module in base.modules():
            if hasattr(module, "_disable_adapters"):
                # Also where the adapters were put into the model itself, which has no switch of a `PeftModel`.
                _set(stack, module, "_disable_adapters", True)
            _set(stack, module, "training", False)
            if hasattr(module, REPACKS):
                unpack_for_cpu(module)
                _set(stack, module, REPACKS, False)
            config = getattr(module, "config", None)
            if getattr(config, "use_cache", None) is True:
                _set(stack, config, "use_cache", False)
        for module in _checkpointed(base) if checkpointing else ():
            _keep_checkpointing(stack, module)
        stack.callback(_reshard, model)
        yield _called(model, base)


@contextmanager
def seeded(devices: Iterable[torch.device], seed: int) -> Iterator[None]:
    """Seed the CPU generator and those of the CUDA devices among `devices`; afterwards all are where they were."""
    indices = sorted({device.index for device in devices if device.type == "cuda"})
    with torch.random.fork_rng(devices=indices):
        torch.default_generator.manual_seed(seed)
        for index in indices:
            torch.cuda.default_generators[index].manual_seed(seed)
        yield


def _has_adapters(model: nn.Module) -> bool:
    return hasattr(model, "get_base_model") and hasattr(model, "disable_adapter")


def _set(stack: ExitStack, owner: Any, name: str, value: Any) -> None:
    found = vars(owner).get(name, _MISSING)
    setattr(owner, name, value)
    if found is _MISSING:
        stack.callback(delattr, owner, name)
    else:
        stack.callback(setattr, owner, name, found)


def _checkpointed(base: nn.Module) -> list[nn.Module]:
    """The modules that checkpoint when they train.

    Layers of current models do so by themselves; the stack around them then has the flag, too, without a use for it.
    """
    flagged = [module for module in base.modules() if getattr(module, "gradient_checkpointing", False) is True]
    layers = {module for module in flagged if isinstance(module, GradientCheckpointingLayer)}
    return [module for module in flagged if module in layers or layers.isdisjoint(module.modules())]


def _keep_checkpointing(stack: ExitStack, module: nn.Module) -> None:
    _set(stack, module, "training", True)
    if isinstance(module, GradientCheckpointingLayer):
        run = _non_reentrant(module._gradient_checkpointing_func)
        _set(
            stack,
            module,
            "_gradient_checkpointing_func",
            lambda layer, *args: run(partial(_still, module, layer), *args),
        )
        return
    # An older stack: its layers are in evaluation mode, what it drops itself it does at rates of its own.
    for name, rate in list(vars(module).items()):
        if "drop" in name and isinstance(rate, float):
            _set(stack, module, name, 0.0)
    if hasattr(module, "_gradient_checkpointing_func"):
        run = _non_reentrant(module._gradient_checkpointing_func)
        _set(stack, module, "_gradient_checkpointing_func", run)


def _still(module: nn.Module, layer: Callable, *args: Any) -> Any:
    """A layer in evaluation mode, also when backward runs it again: some drop outputs by their own `self.training`."""
    module.training = False
    try:
        return layer(*args)
    finally:
        module.training = True


def _non_reentrant(function: Callable) -> Callable:
    if isinstance(function, partial) and function.func is checkpoint:
        return partial(checkpoint, *function.args, **function.keywords | {"use_reentrant": False})
    return function
