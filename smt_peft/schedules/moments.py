"""What an optimizer keeps for parameters that do not train for a while: dropped, or moved to the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

Keeping = Literal["drop", "move"]


def check_keeping(keeping: str) -> None:
    """Raise `ValueError` unless this is one of `Keeping`."""
    if keeping not in get_args(Keeping):
        raise ValueError(f"moments must be {' or '.join(get_args(Keeping))}, got {keeping!r}")


def check_held(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> None:
    """Raise `ValueError` unless the optimizer, one wrapped by Accelerate too, holds the blocks of all these modules."""
    optimizer = getattr(optimizer, "optimizer", optimizer)
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    missing = [name for name, parameter in parameters.items() if id(parameter) not in held]
    if missing:
        raise ValueError(
            f"{type(optimizer).__name__} does not hold the blocks of {missing[0]} ({len(missing)} of "
            f"{len(parameters)} modules are missing), so they would never train; make the optimizer while all blocks "
            "require a gradient, and take one that updates in step(), not in backward"
        )


class Moments:
    """The optimizer's state of parameters that rest.

    Any optimizer will do that keeps what it knows of a parameter in `state[parameter]`, as PyTorch's own do, and passes
    over parameters without a gradient.

    Args:
        optimizer: whose state it is; one wrapped by Accelerate is unwrapped.
        keeping: `"drop"`: parameters that train again start with fresh moments and a step count of their own;
            `"move"`: the state waits in the memory of the CPU, and they go on from it, bit for bit.
        parameters: all that may rest, by name, for the optimizer to hold; None: whatever it holds.

    Raises:
        ValueError: the optimizer does not hold one of these parameters, or keeps what it has dropped (bitsandbytes'
            paged ones, which list their pages for good).
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        keeping: Keeping,
        parameters: Mapping[str, nn.Parameter] | None = None,
    ):
        self.optimizer = getattr(optimizer, "optimizer", optimizer)
        self.keeping = keeping
        self._resting: dict[str, dict[str, Any]] = {}
        self._check(parameters or {})

    def rest(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        """Take the state of these parameters, given with their names, out of the optimizer."""
        streams = set()
        for name, parameter in parameters:
            state = self.optimizer.state.pop(parameter, None)
            if state and self.keeping == "move":
                self._resting[name] = _taken(state, parameter.device)
                if parameter.is_cuda:
                    streams.add(torch.cuda.current_stream(parameter.device))
        for stream in streams:
            # What is copied to pinned memory may be read by the host from here on, as by a checkpoint.
            stream.synchronize()

    def wake(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        """Put back what was moved away of these."""
        for name, parameter in parameters:
            if state := self._resting.pop(name, None):
                self.optimizer.state[parameter] = _given(state, parameter.device)

    def release(self) -> None:
        """Let go of the optimizer, and of what was moved away."""
        self.optimizer = None
        self._resting = {}

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """What was moved away, by name."""
        return dict(self._resting)

    def load_state_dict(self, state: dict[str, dict[str, Any]]) -> None:
        self._resting = dict(state)

    def _check(self, parameters: Mapping[str, nn.Parameter]) -> None:
        check_held(self.optimizer, parameters)
        if getattr(self.optimizer, "is_paged", False):
            raise ValueError(
                f"optim: the pages of a paged optimizer ({type(self.optimizer).__name__}) are never given back, so "
                "resting layers would keep theirs; take the same one without paging"
            )


# Of a state, what lies on the device of its parameter ("moved"), and what does not ("left"): numbers, and the step
# counts that PyTorch keeps on the CPU, where reading one does not make the host wait.
def _taken(state: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    moved = {key for key, value in state.items() if any(tensor.device == device for tensor in _tensors(value))}
    return {
        "moved": {key: _mapped(_to_cpu, value) for key, value in state.items() if key in moved},
        "left": {key: value for key, value in state.items() if key not in moved},
    }


def _given(state: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    def to_device(tensor: Tensor) -> Tensor:
        # From pinned memory without waiting: PyTorch does not reuse that before the copy is done.
        return tensor.to(device, non_blocking=True)

    return {key: _mapped(to_device, value) for key, value in state["moved"].items()} | state["left"]


def _to_cpu(tensor: Tensor) -> Tensor:
    # A subclass, as of packed moments, knows best how it is copied.
    if not tensor.is_cuda or type(tensor) is not Tensor:
        return tensor.to("cpu")
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)


def _mapped(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """`value` with its tensors changed, those in lists, tuples and dicts too."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _mapped(change, each) for key, each in value.items()}
    return type(value)(_mapped(change, each) for each in value) if type(value) in (list, tuple) else value


def _tensors(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _mapped(lambda tensor: found.append(tensor) or tensor, value)
    return found
