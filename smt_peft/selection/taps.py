"""Taps on the targets: they see each module's inputs and output gradients and never a parameter's `.grad`.

The gradient of a weight is `dY^T X`. Taking it from a tap works where the weight is frozen or packed, and lets one
dense gradient be reduced to block scores and freed before the next module's exists.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from ..bases.parameters import ParameterTarget
from ..bases.target import Target
from .experts import parameters_tapped
from .scores import ActivationScore, GradientScore
from .tables import look_ups_tapped

# The number of no backward pass.
_NONE = -1


def _backward_pass() -> int:
    """The number of the backward pass that this thread takes part in, `_NONE` outside of one."""
    return torch._C._current_graph_task_id()


class _Tap(torch.autograd.Function):
    """The identity on an output; backward hands `(x, dY)` to `receive`.

    The input goes through `save_for_backward`, so that activation checkpointing drops and recomputes it like any
    other. `anchor` is a scalar that requires grad: with it the graph begins at the lowest tapped module even though
    every parameter is frozen, and modules below take no part in backward.
    """

    @staticmethod
    def forward(ctx, output, x, anchor, receive):
        ctx.receive = receive
        ctx.save_for_backward(x)
        # An alias that is no differentiable view, so that the model may go on in place.
        return output.detach()

    @staticmethod
    def backward(ctx, grad_output):
        (x,) = ctx.saved_tensors
        ctx.receive(x, grad_output)
        return grad_output if ctx.needs_input_grad[0] else None, None, None, None


class GradientTaps:
    """Feeds each target's gradient of a batch to its score as soon as backward has finished with the module."""

    def __init__(self, targets: Mapping[str, Target], scores: Mapping[str, GradientScore]):
        self.targets, self.scores = targets, scores
        self.reached: set[str] = set()
        self._anchor = torch.zeros((), requires_grad=True)
        self._uses: Counter[str] = Counter()
        self._pairs: defaultdict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)

    @contextmanager
    def installed(self):
        with ExitStack() as stack:
            stack.callback(self._pairs.clear)
            for name, target in self.targets.items():
                if isinstance(target, ParameterTarget):
                    continue
                if target.is_table:
                    stack.enter_context(look_ups_tapped(target.module, self._look_up(name)))
                    continue
                # Before other hooks: dY belongs to what the linear itself returned.
                hook = target.module.register_forward_hook(self._hook(name), prepend=True, with_kwargs=True)
                stack.callback(hook.remove)
            stack.enter_context(parameters_tapped(self.targets, self._tapped))
            yield self

    def backward(self, loss: Tensor) -> None:
        """Run backward and take in the gradients of one batch."""
        try:
            loss.backward()
            self._close()
        finally:
            self._uses.clear()
            self._pairs.clear()

    def _close(self) -> None:
        # Uses whose output never met the loss: what did arrive is all there is.
        for name in list(self._pairs):
            self._finish(name)
        self._uses.clear()

    def _hook(self, name: str) -> Callable:
        def hook(module, args, kwargs, output):
            return self._tapped(name, _input(args, kwargs), output)

        return hook

    def _look_up(self, name: str) -> Callable:
        return lambda rows, ids: self._tapped(name, ids, rows)

    def _tapped(self, name: str, x: Tensor, output: Tensor, flipped: bool = False) -> Tensor:
        """The output of `x W^T`, or of `x W` when `flipped`: there x^T dY is the gradient."""
        # A use is counted in the forward pass proper; checkpointing calls the module again during backward.
        if _backward_pass() == _NONE:
            self._uses[name] += 1
        if not torch.is_grad_enabled():
            return output
        return _Tap.apply(
            output, x, self._anchor, lambda x, dy: self._receive(name, *((dy, x) if flipped else (x, dy)))
        )

    def _receive(self, name: str, x: Tensor, grad_output: Tensor) -> None:
        self._pairs[name].append((x, grad_output))
        if len(self._pairs[name]) == self._uses[name]:
            self._finish(name)

    def _finish(self, name: str) -> None:
        pairs = self._pairs.pop(name)
        self.reached.add(name)
        self.scores[name].add(pairs)


class TrainingTaps(GradientTaps):
    """Feeds scores while another loop trains the model: it sees for itself where a backward pass ends.

    A batch whose gradient is not finite is left out, as `torch.amp.GradScaler` leaves its update out.

    Args:
        layers: the modules to watch, which call what they wrap as they like.
        scores: of each of them, by the same names.
    """

    def __init__(self, layers: Mapping[str, nn.Module], scores: Mapping[str, GradientScore]):
        super().__init__({}, scores)
        self.layers = layers
        self._closing = _NONE

    @contextmanager
    def installed(self):
        with ExitStack() as stack:
            stack.callback(self._pairs.clear)
            for name, layer in self.layers.items():
                hook = layer.register_forward_hook(self._hook(name), prepend=True, with_kwargs=True)
                stack.callback(hook.remove)
            yield self

    def _hook(self, name: str) -> Callable:
        tapped = super()._hook(name)

        def hook(module, args, kwargs, output):
            # An evaluation is no use: the next backward pass would wait for its gradients, and hold all others till its
            # end. Reentrant checkpoints record nothing either, but in training.
            if module.training or torch.is_grad_enabled():
                return tapped(module, args, kwargs, output)
            return output

        return hook

    def _receive(self, name: str, x: Tensor, grad_output: Tensor) -> None:
        super()._receive(name, x, grad_output)
        if self._closing != (number := _backward_pass()):
            self._closing = number
            torch.autograd.Variable._execution_engine.queue_callback(self._close)

    def _finish(self, name: str) -> None:
        score = self.scores[name]
        before = score.sums.clone()
        super()._finish(name)
        score.sums = torch.where(score.sums.isfinite().all(), score.sums, before)


class ActivationTaps:
    """Feeds each target's inputs to its score; needs a forward pass only."""

    def __init__(self, targets: Mapping[str, Target], scores: Mapping[str, ActivationScore]):
        self.targets, self.scores = targets, scores
        self.reached: set[str] = set()

    @contextmanager
    def installed(self):
        handles = [
            target.module.register_forward_pre_hook(self._hook(name), with_kwargs=True)
            for name, target in self.targets.items()
            if isinstance(target, Target)
        ]
        try:
            with parameters_tapped(self.targets, self._tapped):
                yield self
        finally:
            for handle in handles:
                handle.remove()

    def close_batch(self) -> None:
        for score in self.scores.values():
            score.close_batch()

    def _hook(self, name: str) -> Callable:
        def hook(module, args, kwargs):
            self.reached.add(name)
            self.scores[name].see(_input(args, kwargs))

        return hook

    def _tapped(self, name: str, x: Tensor, output: Tensor, flipped: bool) -> Tensor:
        self.reached.add(name)
        self.scores[name].see(x, flipped)
        return output


def _input(args: tuple, kwargs: dict) -> Tensor:
    return args[0] if args else next(iter(kwargs.values()))
