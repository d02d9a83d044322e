"""A training step in its phases: forward, backward, update."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from .model import random_batch

# Of Llama, whatever wraps its layers.
_LINEAR = re.compile(r"\d+\.(self_attn|mlp)\.\w+_proj")
Note = Callable[[str], None]


@dataclass
class Training:
    """A model, and the optimizer of its trainable parameters; without one, a step is the frozen pass.

    Args:
        autocast: whether the pass runs under bf16 autocast.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer | None = None
    autocast: bool = False

    @property
    def trainable(self) -> int:
        """The number of trainable parameters."""
        return sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)

    @property
    def modules(self) -> int:
        """The number of linear layers, or of those that stand for one, that hold a trainable parameter."""
        names = (name for name, parameter in self.model.named_parameters() if parameter.requires_grad)
        return len({match.group() for name in names if (match := _LINEAR.search(name))})

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def step(self, size: tuple[int, int], note: Note = lambda phase: None) -> float:
        """Seconds of one step on a batch of `size`; `note` is called with each phase's name as it begins."""
        batch = random_batch(self.model, size, frozen=self.optimizer is None)
        autocast = torch.autocast(self.device.type, torch.bfloat16) if self.autocast else contextlib.nullcontext()
        self._wait()
        start = time.perf_counter()
        note("forward")
        with autocast:
            loss = self.model(**batch, use_cache=False).loss
        note("backward")
        loss.backward()
        note("update")
        if self.optimizer is not None:
            self._update()
        self._wait()
        return time.perf_counter() - start

    def _update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
