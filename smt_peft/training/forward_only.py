"""A trainer without a backward pass: its optimizer measures the gradient by losses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..tuner.padding import padding_masks
from .errors import ConfigError

if TYPE_CHECKING:
    from ..optim import MeZO


class ForwardOnly:
    """Mixed into a trainer whose `optimizer_cls_and_kwargs` are of `MeZO`.

    A step of the trainer's own is taken several times, without autograd and with the backward pass left out, so that
    its losses, their scale in gradient accumulation and its metrics stay its own. All batches of a step see the same
    directions, and all processes under DDP do. What is logged as `grad_norm` is `MeZO.gradient_norm`; it is not
    clipped.

    Raises:
        ConfigError: from `train`: DeepSpeed or FSDP hold the weights.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            engine = "DeepSpeed" if self.is_deepspeed_enabled else "FSDP"
            raise ConfigError(
                f"optim: mezo trains weights that each process has whole, and {engine} is set to share or step them; "
                "start the run without it, or under DDP, or take another optim"
            )
        self.accelerator.backward = _no_backward
        self._gradient_norm: Tensor | None = None

    @property
    def mezo(self) -> MeZO:
        # Inside of Accelerate's wrapper.
        return self.optimizer.optimizer

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        optimizer = super().create_optimizer(model)
        optimizer.masks = padding_masks(self.model)
        return optimizer

    def training_step(self, model: nn.Module, inputs: Mapping[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        step, seen = super().training_step, getattr(self, "_total_train_tokens", None)

        def loss() -> Tensor:
            if seen is not None:
                # TRL counts the tokens of every pass.
                self._total_train_tokens = seen
            # Trainers add to what they are handed.
            return step(model, dict(inputs), *args, **kwargs)

        mean = self.mezo.estimate(loss)
        if self.accelerator.sync_gradients:
            # As DDP averages gradients.
            self.mezo.projected = self.accelerator.reduce(self.mezo.projected, "mean")
            self._gradient_norm = self.mezo.gradient_norm()
        return mean.float()

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Tensor | None:
        return self._gradient_norm


def _no_backward(loss: Tensor, **kwargs: Any) -> None:
    """In place of `Accelerator.backward`."""
