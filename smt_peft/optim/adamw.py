"""`SMTAdamW`: AdamW that updates all the blocks of a model in one call, and can keep its moments in fewer bytes.

The numbers are those of `torch.optim.AdamW`, and so are the names in its state, so that with fp32 moments either loads
the other's `state_dict`. It works on any trainable tensors. On a GPU neither clipping nor a `GradScaler` makes the host
wait: the clip factor and the inverse of the loss scale reach the update as one scalar on the device.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..bases.sharded import is_dtensor
from ..ops import block_adamw_
from ..ops.adamw import PARAM_DTYPES, QUANT_BLOCK, check_hyper_parameters, fmix32, move_blocks_

STATE_DTYPES = ("float32", "bfloat16", "8bit")
_MOMENTS = ("exp_avg", "exp_avg_sq")


class SMTAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101) over fp32, bf16 or fp64 tensors.

    bf16 parameters and moments are rounded stochastically, so that updates below the spacing of bf16 are not lost.

    Args:
        params: tensors or parameter groups; a group may have its own `lr`, `betas`, `eps` and `weight_decay`.
        lr: learning rate.
        betas: decay of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled: each step multiplies the parameters by `1 - lr * weight_decay`. A block of SMT is a
            difference from the base weight, so it decays towards the base.
        state_dtype: of the moments: `"float32"` (8 bytes a parameter; fp64 for fp64 parameters), `"bfloat16"` (4), or
            `"8bit"` (2, and 8 more per 256 parameters; Dettmers et al., arXiv 2110.02861).
        max_grad_norm: scale the gradients down to this global norm over all groups; None: never.
        seed: of the stochastic rounding.

    Raises:
        ValueError: a number out of range, an unknown `state_dtype`, or a parameter of another dtype or not contiguous.
    """

    # Tells `torch.amp.GradScaler` to leave unscaling, and skipping, to `step`.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        state_dtype: str = "float32",
        max_grad_norm: float | None = None,
        seed: int = 0,
    ):
        if state_dtype not in STATE_DTYPES:
            raise ValueError(f"state_dtype must be one of {', '.join(STATE_DTYPES)}, got {state_dtype!r}")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be above 0, or None for no clipping, got {max_grad_norm}")
        self.state_dtype, self.max_grad_norm, self.seed = state_dtype, max_grad_norm, seed
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "num_updates": 0})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            _hyper_parameters(self.param_groups[-1])
            for i, param in enumerate(self.param_groups[-1]["params"]):
                _check_param(param, f"parameter {i} of group {len(self.param_groups) - 1}")
        except ValueError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: evaluates the model again and returns the loss.

        Returns:
            What `closure` returned, or None.

        Raises:
            ValueError: a sparse gradient, a number out of range in a group, or, on a CPU, gradients without a finite
                norm while `max_grad_norm` is set. Nothing has been updated then. On a GPU such a step is left out.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        updates = [self._gather(number, group) for number, group in enumerate(self.param_groups)]
        grads = [grad for by_device in updates for update in by_device.values() for grad in update["grads"]]
        if not grads:
            return loss
        coefficient, skip = self._coefficient_and_skip(grads)
        if skip is not None and skip.device.type == "cpu":
            if skip:
                return loss
            skip = None
        for number, (group, by_device) in enumerate(zip(self.param_groups, updates, strict=True)):
            # Other random bits for every step and every group; the host's count, since steps live on the device.
            seed = fmix32(fmix32(self.seed & 0xFFFFFFFF) ^ group["num_updates"] & 0xFFFFFFFF) + number
            for device, update in by_device.items():
                _advance(update, _hyper_parameters(group), _to(coefficient, device), _to(skip, device), seed)
            group["num_updates"] += 1
        return loss

    def _gather(self, number: int, group: dict[str, Any]) -> dict[torch.device, dict[str, list[Tensor]]]:
        """The lists that `block_adamw_` takes, of a group's parameters with a gradient, per device."""
        _hyper_parameters(group)
        updates = defaultdict(lambda: defaultdict(list))
        for i, param in enumerate(group["params"]):
            if param.grad is None:
                continue
            where = f"parameter {i} of group {number}"
            if param.grad.layout != torch.strided:
                raise ValueError(f"the gradient of {where} is {param.grad.layout}; SMTAdamW needs dense gradients")
            _check_param(param, where)
            if not self.state[param]:
                self.state[param] = self._new_state(param)
            state, update = self.state[param], updates[param.device]
            if state["exp_avg"].device != param.device:
                raise ValueError(
                    f"{where} moved to {param.device} after its first step, its state is on {state['exp_avg'].device}; "
                    "load the optimizer's own state_dict() into it"
                )
            update["params"].append(param)
            update["grads"].append(param.grad.contiguous())
            for name in _MOMENTS:
                update[f"{name}s"].append(state[name])
            none = state["step"].new_empty(0)
            update["avg_scales"].append(state.get("exp_avg_scale", none))
            update["sq_scales"].append(state.get("exp_avg_sq_scale", none))
            update["steps"].append(state["step"])
        return updates

    def _new_state(self, param: Tensor) -> dict[str, Tensor]:
        state = {"step": torch.zeros((), dtype=torch.float32, device=param.device)}
        for name in _MOMENTS:
            state[name] = torch.zeros(param.shape, dtype=self._moment_dtype(param), device=param.device)
        if self.state_dtype == "8bit":
            for name in _MOMENTS:
                state[f"{name}_scale"] = torch.zeros(-(-param.numel() // QUANT_BLOCK), device=param.device)
        return state

    def _moment_dtype(self, param: Tensor) -> torch.dtype:
        wide = torch.promote_types(param.dtype, torch.float32)
        return {"float32": wide, "bfloat16": torch.bfloat16, "8bit": torch.uint8}[self.state_dtype]

    def count_by_block(self, param: Tensor) -> None:
        """From now on count the steps of every block of a parameter `(num_blocks, ...)` on its own."""
        state = self.state[param] = self.state[param] or self._new_state(param)
        state["step"] = state["step"].expand(len(param)).contiguous()

    @torch.no_grad()
    def move_blocks(self, param: Tensor, sources: Tensor) -> None:
        """Rearrange the state of a parameter `(num_blocks, ...)` whose blocks change places, after `count_by_block`.

        Exact but for 8-bit moments of blocks that share a scale with others, which are rounded again.

        Args:
            sources: int64 `(num_blocks,)`, whose state each block takes; -1: none, its moments and its count of steps
                begin anew.
        """
        state = self.state[param]
        state["step"].copy_(torch.where(sources < 0, 0, state["step"][sources.clamp(min=0)]))
        for name in _MOMENTS:
            move_blocks_(state[name], state.get(f"{name}_scale"), sources, signed=name == "exp_avg")

    def _coefficient_and_skip(self, grads: list[Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """Inverse loss scale times clip factor, and whether to leave the step out: fp32 scalars, no sync on a GPU."""
        # Set by `torch.amp.GradScaler.step` for the time of the step.
        scale, skip = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        coefficient = None if scale is None else scale.double().reciprocal().float()
        if self.max_grad_norm is not None:
            norm = _global_norm(grads)
            unscaled = 1 if coefficient is None else _to(coefficient, norm.device)
            norm = norm * unscaled
            if norm.device.type == "cpu" and skip is None and not norm.isfinite():
                raise ValueError(
                    f"the global norm of the gradients is {norm.item()}, so they cannot be scaled to max_grad_norm="
                    f"{self.max_grad_norm}; nothing was updated: zero the gradients to go on without this batch"
                )
            # The factor of an infinite norm is 0, and infinity times that is NaN.
            clip = torch.where(norm.isfinite(), self.max_grad_norm / (norm + 1e-6), math.nan).clamp(max=1)
            coefficient = clip * unscaled
        if coefficient is not None:
            unsound = (~coefficient.isfinite()).float()
            skip = unsound if skip is None else _to(skip, unsound.device) + unsound
        return coefficient, skip

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned, of this class or, with float32 moments, of `torch.optim.AdamW`.

        Raises:
            ValueError: other groups or shapes, moments of another kind than `state_dtype`, or a variant of AdamW
                (amsgrad, maximize) that this is not. Nothing has been loaded then.
        """
        for group in state_dict["param_groups"]:
            if variant := [name for name in ("amsgrad", "maximize") if group.get(name)]:
                raise ValueError(f"the state is of AdamW with {variant[0]}=True, which SMTAdamW has not")
        params = [param for group in self.param_groups for param in group["params"]]
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        saved = state_dict["state"]
        state = {
            param: self._load(param, saved[i], i)
            for i, param in zip(ids, params, strict=False)
            if len(ids) == len(params) and i in saved
        }
        # PyTorch's loader casts every moment to the dtype of its parameter, which codes and scales do not survive.
        super().load_state_dict({**state_dict, "state": {}})
        self.state.update(state)

    def _load(self, param: Tensor, saved: dict[str, Any], i: int) -> dict[str, Tensor]:
        """Copies of one parameter's saved tensors, on its device and in the dtypes of a fresh state."""
        state = self._new_state(param)
        if state.keys() != saved.keys():
            raise ValueError(
                f"the state of parameter {i} holds {sorted(saved)}, but state_dtype={self.state_dtype!r} needs "
                f"{sorted(state)}; make the optimizer with the state_dtype it was saved with"
            )
        for name, fresh in state.items():
            value = torch.as_tensor(saved[name])
            if name == "step" and value.ndim == 1 and value.shape == param.shape[:1]:
                # Counted by block, see `count_by_block`.
                fresh = state[name] = fresh.expand(len(param)).contiguous()
            if value.shape != fresh.shape:
                raise ValueError(
                    f"{name} of parameter {i} must have the shape {tuple(fresh.shape)}, got {tuple(value.shape)}"
                )
            fresh.copy_(value)
        return state

    def __getstate__(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("state_dtype", "max_grad_norm", "seed")}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("num_updates", 0)


def _hyper_parameters(group: dict[str, Any]) -> dict[str, float]:
    beta1, beta2 = map(float, group["betas"])
    numbers = {"lr": float(group["lr"]), "beta1": beta1, "beta2": beta2}
    numbers |= {"eps": float(group["eps"]), "weight_decay": float(group["weight_decay"])}
    check_hyper_parameters(**numbers)
    return numbers


def _check_param(param: Tensor, where: str) -> None:
    if is_dtensor(param):
        raise ValueError(
            f"{where} is sharded over processes (a DTensor, as under FSDP2), which SMTAdamW does not update; use "
            "torch.optim.AdamW"
        )
    if param.dtype not in PARAM_DTYPES:
        raise ValueError(
            f"{where} is {param.dtype}; SMTAdamW trains float32, bfloat16 and float64 tensors (for mixed precision in "
            "float16 keep the trainable ones in float32 and use autocast)"
        )
    if not param.is_contiguous():
        raise ValueError(f"{where} is not contiguous (strides {param.stride()}); make it from a .contiguous() tensor")


def _advance(
    update: dict[str, list[Tensor]],
    numbers: dict[str, float],
    coefficient: Tensor | None,
    skip: Tensor | None,
    seed: int,
) -> None:
    steps = update["steps"]
    advanced = torch._foreach_add(steps, 1 if skip is None else (skip == 0).float())
    block_adamw_(**{**update, "steps": advanced}, **numbers, coefficient=coefficient, skip=skip, seed=seed)
    torch._foreach_copy_(steps, advanced)


def _global_norm(grads: list[Tensor]) -> Tensor:
    """Euclidean norm over all of them, an fp32 scalar on the device of the first."""
    kinds = defaultdict(list)
    for grad in grads:
        kinds[grad.device, grad.dtype].append(grad)
    norms = []
    for (_, dtype), alike in kinds.items():
        norms += torch._foreach_norm(alike, 2, dtype=torch.promote_types(dtype, torch.float32))
    return torch.linalg.vector_norm(torch.stack([norm.to(grads[0].device).float() for norm in norms]))


def _to(scalar: Tensor | None, device: torch.device) -> Tensor | None:
    return None if scalar is None else scalar.to(device, non_blocking=True)
