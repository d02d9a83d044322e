"""`MeZO`: training by forward passes alone (Malladi et al., NeurIPS 2023, arXiv 2305.17333, Algorithm 1).

With z ~ N(0, 1) and L the loss, simultaneous perturbation (SPSA) measures the gradient along one random direction:

    g = (L(theta + eps z) - L(theta - eps z)) / (2 eps)        theta <- theta (1 - lr weight_decay) - lr g z

The mean of g z over z is the gradient, up to eps^2. z is drawn anew from a seed wherever it is needed, so that a step
keeps one number. There are no gradients, no moments, and nothing is saved for a backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..bases.sharded import is_dtensor
from ..ops.adamw import PARAM_DTYPES, fmix32, round_stochastically

Closure = Callable[[], Any]
Masks = Callable[[Tensor], "Tensor | None"]


class MeZO(torch.optim.Optimizer):
    """Zeroth-order SGD over fp32, bf16 or fp64 tensors: two forward passes a step, and no backward pass.

        optimizer = MeZO(parameters, lr=1e-4, masks=padding_masks(model))
        for batch in loader:
            loss = optimizer.step(lambda: model(**batch).loss)

    Between the passes parameters are displaced; afterwards they are again what they were, bit for bit: for the length
    of `estimate` there is a copy of what is trained, as large as its gradient would be. Adding and taking away the
    noise in place needs none, but leaves a rounding at every step, which in bf16 is larger than most updates. What does
    not require a gradient when a step begins rests: it is neither displaced nor updated.

    Args:
        params: tensors or parameter groups; a group may have its own `lr` and `weight_decay`.
        lr: learning rate. The noise of the estimate grows with the number of parameters, so it is far below Adam's: the
            paper takes 1e-7 to 1e-6 for whole models, 5e-5 to 1e-4 for LoRA.
        eps: how far parameters are displaced.
        weight_decay: decoupled; a block of SMT decays towards the base.
        samples: random directions of a step (n-SPSA); each takes two passes.
        seed: of all noise.
        masks: of a parameter, where it is trained: a bool tensor of its shape, or None for everywhere. What is masked
            out is never touched. SMT's blocks need `smt_peft.tuner.padding.padding_masks(model)`.

    Attributes:
        projected: g of each sample so far, fp64 `(samples,)`, on the device of the first parameter; summed over the
            calls of `estimate` since the last step.

    Raises:
        ValueError: a number out of range, or a parameter of another dtype or sharded over processes.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-6,
        eps: float = 1e-3,
        weight_decay: float = 0.0,
        *,
        samples: int = 1,
        seed: int = 0,
        masks: Masks | None = None,
    ):
        if not (_is_finite(eps) and eps > 0):
            raise ValueError(f"eps must be a finite number above 0, got {eps!r}")
        if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
            raise ValueError(f"samples must be a whole number of at least 1, got {samples!r}")
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise ValueError(f"seed must be a whole number, got {seed!r}")
        self.eps, self.samples, self.masks, self._estimated = eps, samples, masks, False
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "seed": seed, "num_updates": 0})
        self.projected = torch.zeros(samples, dtype=torch.float64, device=self.param_groups[0]["params"][0].device)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        number = len(self.param_groups) - 1
        group = self.param_groups[number]
        try:
            for name in ("lr", "weight_decay"):
                if not (_is_finite(group[name]) and group[name] >= 0):
                    raise ValueError(f"{name} must be a finite number of at least 0, got {group[name]!r}")
            for i, param in enumerate(group["params"]):
                _check_param(param, f"parameter {i} of group {number}")
        except ValueError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def estimate(self, closure: Closure) -> Tensor:
        """Add to the projected gradients; nothing is updated.

        May be called several times before a step, once for each part of a batch: all see the same directions. Passes
        of one call draw the same dropout.

        Args:
            closure: computes a loss, a scalar, from the parameters as they are then. It is called `2 * samples` times,
                without autograd.

        Returns:
            The mean of the losses, which is the loss at the parameters up to eps^2; fp64.

        Raises:
            ValueError: the closure returns something else; the parameters are as they were.
        """
        params = [param for _, _, param in self._trained()]
        originals = [param.clone() for param in params]
        rewind, losses = _random_state({param.device for param in params}), []
        try:
            for sample in range(self.samples):
                for side in (self.eps, -self.eps):
                    self._displace(originals, sample, side)
                    rewind()
                    losses.append(_loss(closure()).to(self.projected))
        finally:
            for param, original in zip(params, originals, strict=True):
                param.copy_(original)
        pairs = torch.stack(losses).view(self.samples, 2)
        self.projected += (pairs[:, 0] - pairs[:, 1]) / (2 * self.eps)
        self._estimated = True
        return pairs.mean()

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Tensor | None:
        """Update every parameter along the directions that have been measured. The host waits for the losses.

        A step whose losses are not finite is left out, and the next one takes other directions.

        Args:
            closure: as `estimate` takes it, which it is handed to; None: that has been called before.

        Returns:
            What `estimate` returned, or None.

        Raises:
            ValueError: no closure, and no call of `estimate` since the last step.
        """
        loss = None if closure is None else self.estimate(closure)
        if not self._estimated:
            raise ValueError(
                "MeZO.step() has nothing to update by: hand it a closure that computes the loss, or call estimate() "
                "first; it does not read the gradients of loss.backward()"
            )
        projected = self.projected.tolist()
        if all(map(math.isfinite, projected)):
            for index, group, param in self._trained():
                self._update(index, group, param, projected)
        for group in self.param_groups:
            group["num_updates"] += 1
        self.projected.zero_()
        self._estimated = False
        return loss

    def gradient_norm(self) -> Tensor:
        """The root of the mean square of `projected`, fp64 scalar: its square estimates that of the gradient's norm."""
        return self.projected.square().mean().sqrt()

    def noise(self, index: int, sample: int = 0) -> Tensor:
        """z of the coming step, of the parameter of that number over all groups.

        Always the same, whatever was drawn before: fp32, of the parameter's shape, on its device, zero where a mask is.
        """
        group, param = next((group, param) for number, group, param in self._trained() if number == index)
        return self._noise(index, sample, group, param)

    def _noise(self, index: int, sample: int, group: dict[str, Any], param: Tensor) -> Tensor:
        seed = 0
        for number in (group["seed"], group["num_updates"], sample, index):
            seed = fmix32(seed ^ fmix32((number + 0x9E3779B9) & 0xFFFFFFFF))
        generator = torch.Generator(param.device).manual_seed(seed)
        # In fp32, whatever the parameter's dtype is, so that the directions are those of a run in another one.
        noise = torch.randn(param.shape, generator=generator, device=param.device)
        mask = None if self.masks is None else self.masks(param)
        return noise if mask is None else noise.mul_(mask)

    def _displace(self, originals: list[Tensor], sample: int, by: float) -> None:
        for original, (index, group, param) in zip(originals, self._trained(), strict=True):
            param.copy_(torch.add(original, self._noise(index, sample, group, param), alpha=by))

    def _update(self, index: int, group: dict[str, Any], param: Tensor, projected: list[float]) -> None:
        wide = torch.promote_types(param.dtype, torch.float32)
        value = param.to(wide) * (1 - group["lr"] * group["weight_decay"])
        for sample, gradient in enumerate(projected):
            noise = self._noise(index, sample, group, param)
            value.add_(noise, alpha=-group["lr"] * gradient / self.samples)
        if param.dtype == torch.bfloat16:
            # To the nearest, most updates would be lost: they are smaller than the spacing of bf16.
            seed = fmix32(fmix32(group["seed"] & 0xFFFFFFFF) ^ group["num_updates"] & 0xFFFFFFFF)
            value = round_stochastically(value, seed, index, salt=0)
        param.copy_(value)

    def _trained(self) -> Iterator[tuple[int, dict[str, Any], Tensor]]:
        """Each parameter that does not rest, with its number over all groups, and its group."""
        every = ((group, param) for group in self.param_groups for param in group["params"])
        return ((index, group, param) for index, (group, param) in enumerate(every) if param.requires_grad)

    def __getstate__(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("eps", "samples", "masks", "projected", "_estimated")}
        return {**super().__getstate__(), **own}


def _loss(value: Any) -> Tensor:
    """What a closure has returned, as a scalar."""
    if not isinstance(value, (Real, Tensor)) or (isinstance(value, Tensor) and value.numel() != 1):
        what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"the closure of MeZO must return the loss, one number, got {what}; return model(...).loss")
    return torch.as_tensor(value).detach().reshape(())


def _is_finite(value: Any) -> bool:
    # A learning rate may be a tensor.
    return isinstance(value, (Real, Tensor)) and not isinstance(value, bool) and math.isfinite(value)


def _check_param(param: Tensor, where: str) -> None:
    if is_dtensor(param):
        raise ValueError(
            f"{where} is sharded over processes (a DTensor, as under FSDP2), which MeZO does not train; keep it whole, "
            "as under DDP"
        )
    if param.dtype not in PARAM_DTYPES:
        raise ValueError(
            f"{where} is {param.dtype}; MeZO trains float32, bfloat16 and float64 tensors (keep what is trained of a "
            "float16 model in float32)"
        )


def _random_state(devices: Iterable[torch.device]) -> Callable[[], None]:
    """Puts the CPU's generator, and those of the CUDA devices among these, back to where they are now."""
    cpu = torch.get_rng_state()
    cuda = [(device, torch.cuda.get_rng_state(device)) for device in devices if device.type == "cuda"]

    def rewind() -> None:
        torch.set_rng_state(cpu)
        for device, state in cuda:
            torch.cuda.set_rng_state(state, device)

    return rewind
