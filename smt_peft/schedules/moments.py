"""What an optimizer keeps for parameters that do not train for a while: dropped, or moved to the CPU."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

Keeping = Literal["drop", "move"]


def check_keeping(keeping: str) -> None:
    """Raise `ValueError` unless this is one of `Keeping`."""
    if keeping not in get_args(Keeping):
        raise ValueError(f"moments must be {' or '.join(get_args(Keeping))}, got {keeping!r}")


class Moments:
    """The optimizer's state of parameters that rest.

    Args:
        optimizer: whose state it is; one wrapped by Accelerate is unwrapped.
        keeping: `"drop"`: parameters that train again start with fresh moments and a step count of their own;
            `"move"`: the state waits in the memory of the CPU, and they go on from it.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, keeping: Keeping):
        self.optimizer = getattr(optimizer, "optimizer", optimizer)
        self.keeping = keeping
        self._resting: dict[str, dict[str, Any]] = {}

    def rest(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        """Take the state of these parameters, given with their names, out of the optimizer."""
        for name, parameter in parameters:
            state = self.optimizer.state.pop(parameter, None)
            if state and self.keeping == "move":
                self._resting[name] = _moved(state, torch.device("cpu"))

    def wake(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        """Put back what was moved away of these."""
        for name, parameter in parameters:
            if state := self._resting.pop(name, None):
                self.optimizer.state[parameter] = _moved(state, parameter.device)

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """What was moved away, by name."""
        return dict(self._resting)

    def load_state_dict(self, state: dict[str, dict[str, Any]]) -> None:
        self._resting = dict(state)


def _moved(state: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in state.items()}
