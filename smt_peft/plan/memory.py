"""The memory of one method: of a step, of what lives from step to step, and of the choice before both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from ..config import SMTConfig
from .activations import Batch, Loss, Step, model_loss, step
from .layers import Layers, stack_of
from .packed import stored_bytes
from .setting import Setting
from .state import State, optimizer, state_of
from .warmup import warm_up


@dataclass(frozen=True)
class Memory:
    """Bytes on one device while a method trains.

    Args:
        method: its name.
        trainable: parameters, padding counted.
        state: what lives from step to step.
        step: a step as the setting has it.
        other: one with checkpointing of activations where the setting has none, or without; None: not counted.
        setting: what both hold for.
        gathered: weights of other processes that are there for a time, and buffers to exchange gradients.
    """

    method: str
    trainable: int
    state: State
    step: Step
    other: Step | None
    setting: Setting
    gathered: int = 0

    @property
    def gradients(self) -> int:
        return self.step.gradients

    def peak(self, step: Step | None = None) -> int:
        """The most that is alive at once in a step, the one of the setting when none is given."""
        step = step or self.step
        kept = step.gradients if self.setting.accumulation > 1 else 0
        return self.state.total + self.gathered + kept + step.peak + self.setting.runtime


def memory(
    method: str,
    model: nn.Module,
    setting: Setting,
    prepare: Callable[[nn.Module], Loss] | None = None,
    both: bool = False,
    layers: Layers | None = None,
    settle: Callable[[nn.Module], None] = lambda model: None,
) -> Memory:
    """Count one method.

    Args:
        method: its name.
        model: on the meta device, with something to train in it; see `methods`.
        setting: what decides besides.
        prepare: makes the loss of a model; None: the one that it computes itself.
        both: whether to count a step with checkpointing and one without.
        layers: those of the model that stand for others; None: there are none.
        settle: does to the model what is done to it last, before the training begins.
    """
    layers = layers or Layers()
    settle(model)
    trained = layers.trained(model)
    own = optimizer(setting.optimizer, setting.device.type)
    count = partial(
        step,
        model,
        token_batch(setting),
        setting.device,
        loss=model_loss if prepare is None else prepare(model),
        temporaries=own.temporaries(trained),
        accumulated=setting.accumulation > 1,
        layers=layers,
    )
    can_checkpoint = _checkpointing(model, setting.checkpointing)
    settle(model)
    as_set, other = count(), None
    if both and can_checkpoint:
        _checkpointing(model, not setting.checkpointing)
        settle(model)
        other = count()
    state = state_of(model, own, layers)
    trainable = sum(p.numel() for p in (*trained, *layers.resting(model)))
    found = Memory(method, trainable, state, as_set, other, setting)
    return _among(found, model) if setting.processes > 1 else found


def choosing(model: nn.Module, config: SMTConfig, setting: Setting, layers: Layers) -> int:
    """The most that is alive while blocks are chosen, weights included.

    Args:
        model: frozen, on the meta device, without an adapter.
        config: says how they are chosen.
        setting: what decides besides.
        layers: those of the model that stand for others.
    """
    weights = state_of(model, optimizer(setting.optimizer), layers).total
    # Before the training: without autocast, and with the loss of the model itself.
    _checkpointing(model, setting.checkpointing)
    device = replace(setting.device, autocast=None)
    above = warm_up(model, config, token_batch(setting), device, layers=layers)
    if setting.shares and setting.loaded_sharded:
        weights = -(-weights // setting.processes) + _gathered(model)
    return weights + above + setting.runtime


def token_batch(setting: Setting) -> Batch:
    """A full batch of token ids, without padding, and a label for each; of preferences, two answers to a sequence."""

    def make() -> dict[str, Tensor]:
        rows = setting.sequences * (2 if setting.task == "dpo" else 1)
        ids = torch.zeros(rows, setting.tokens, dtype=torch.int64, device="meta")
        return {"input_ids": ids, "labels": ids[:, 0].clone() if setting.task == "classification" else ids.clone()}

    return make


def _checkpointing(model: nn.Module, wanted: bool) -> bool:
    """Switch it; False when the model knows no such thing."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not getattr(base, "supports_gradient_checkpointing", False):
        return False
    word = "enable" if wanted else "disable"
    switch = getattr(base, f"activation_checkpointing_{word}", None) or getattr(base, f"gradient_checkpointing_{word}")
    switch({"use_reentrant": False}) if wanted else switch()
    return True


def _among(memory: Memory, model: nn.Module) -> Memory:
    """One of several processes: with its part of everything and the layer that is gathered, or with a copy of all."""
    setting, state = memory.setting, memory.state
    if not setting.sharded:
        # DDP keeps gradients in buckets of its own besides.
        return replace(memory, gathered=memory.gradients)

    def part(size: int) -> int:
        return -(-size // setting.processes)

    def with_part(step: Step | None) -> Step | None:
        if step is None:
            return None
        # Reduced as they come: what is whole is one layer's, as much as its weights, which are counted as gathered.
        there = 0 if step.phase == "forward" or setting.accumulation > 1 else step.gradients - part(step.gradients)
        return replace(step, peak=max(step.saved, step.peak - there), gradients=part(step.gradients))

    shared = {name: part(size) for name, size in state.weights.items()}
    state = replace(state, weights=shared, trained=part(state.trained), moments=part(state.moments))
    return replace(
        memory,
        state=state,
        step=with_part(memory.step),
        other=with_part(memory.other),
        gathered=_gathered(model),
    )


def _gathered(model: nn.Module) -> int:
    """Whole weights that an engine keeps of a shared model: all outside of the layers, one layer and the next."""
    found = stack_of(model)
    if found is None:
        return stored_bytes(model)
    _, stack = found
    return stored_bytes(model) - stored_bytes(stack) + 2 * max(map(stored_bytes, stack))
