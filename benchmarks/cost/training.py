"""A training step in its phases: forward, backward, update."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .model import random_batch

# Of Llama, whatever wraps its layers.
_LINEAR = re.compile(r"\d+\.(self_attn|mlp)\.\w+_proj")
Note = Callable[[str], None]


@dataclass
class Training:
    """A model, and the optimizer of its trainable parameters; without one, a step is the frozen pass.

    Args:
        autocast: whether the pass runs under bf16 autocast.
        backward: whether there is a backward pass; else the optimizer, if there is one, is `MeZO`.
        inputs: makes a batch, `use_cache` included where the model knows it; None: a random one for a decoder.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer | None = None
    autocast: bool = False
    backward: bool = True
    inputs: Callable[[], dict[str, Any]] | None = None

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
        batch = self.inputs() if self.inputs else self._random(size)
        autocast = torch.autocast(self.device.type, torch.bfloat16) if self.autocast else contextlib.nullcontext()
        self._wait()
        start = time.perf_counter()
        note("forward")
        with autocast:
            loss = self._loss(batch)
        note("backward")
        if self.backward:
            loss.backward()
        note("update")
        if self.optimizer is not None:
            self._update()
        self._wait()
        return time.perf_counter() - start

    def _loss(self, batch: dict[str, Any]) -> Tensor:
        def loss() -> Tensor:
            return self.model(**batch).loss

        if self.backward:
            return loss()
        with torch.no_grad():
            return loss() if self.optimizer is None else self.optimizer.estimate(loss)

    def _random(self, size: tuple[int, int]) -> dict[str, Any]:
        frozen = self.optimizer is None and self.backward
        return random_batch(self.model, size, frozen=frozen) | {"use_cache": False}

    def _update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
