"""What the meta device does not do as the planned device would: attention kernels, autocast, and questions of values.

A model on the meta device runs every operation for its shapes alone. Three things would go another way there: attention
is not fused, autocast does not exist, and a model cannot ask what its batch holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

_HALVES = (torch.float16, torch.bfloat16)
# Of autocast's lists, what transformers are made of.
_NARROWED = {
    *(F.linear, F.conv1d, F.conv2d, torch.matmul, torch.mm, torch.bmm, torch.addmm),
    *(torch.baddbmm, torch.einsum, Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm),
}
_WIDENED = {
    *(F.layer_norm, F.rms_norm, F.softmax, F.log_softmax, F.cross_entropy, F.nll_loss, torch.softmax, Tensor.softmax),
    *(torch.log_softmax, torch.pow, Tensor.pow, torch.rsqrt, Tensor.rsqrt, torch.norm, torch.cumsum, F.mse_loss),
}
_plain_attention = F.scaled_dot_product_attention
# What `torch._fused_sdp_choice` answers.
_MATH, _FLASH, _EFFICIENT, _CUDNN = 0, 1, 2, 3


@dataclass(frozen=True)
class Device:
    """Where a step is to run.

    Args:
        type: `"cpu"` or `"cuda"`; there need be none of it here.
        autocast: the dtype of autocast; None: it is off.
    """

    type: str = "cpu"
    autocast: torch.dtype | None = None

    @contextmanager
    def pretended(self) -> Iterator[None]:
        """Within, what is on the meta device takes the routes that it would take on this device."""
        with ExitStack() as stack:
            mode = _Autocast(self)
            if self.autocast is not None:
                stack.enter_context(mode)
            for owner, name, replacement in _replacements(self, mode):
                stack.callback(setattr, owner, name, getattr(owner, name))
                setattr(owner, name, replacement)
            yield


class _Autocast(TorchFunctionMode):
    """Casts as autocast would; `autocast` is None where it is switched off for a while."""

    def __init__(self, device: Device):
        super().__init__()
        self.device, self.autocast = device, device.autocast
        # As autocast does: the copy of a trained fp32 weight is kept until the end.
        self._copies: dict[Tensor, Tensor] = {}

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in _NARROWED and "out" not in kwargs:
            args, kwargs = self.narrowed(args, kwargs)
        elif self.autocast is not None and func in _WIDENED and self.device.type == "cuda":
            args, kwargs = tree_map_only(Tensor, _widen, (args, kwargs))
        return func(*args, **kwargs)

    def narrowed(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return (args, kwargs) if self.autocast is None else tree_map_only(Tensor, self._narrow, (args, kwargs))

    def _narrow(self, tensor: Tensor) -> Tensor:
        if not tensor.is_meta or not tensor.is_floating_point() or tensor.dtype in (self.autocast, torch.float64):
            return tensor
        if not (isinstance(tensor, nn.Parameter) and tensor.requires_grad and tensor.dtype == torch.float32):
            return tensor.to(self.autocast)
        if tensor not in self._copies:
            self._copies[tensor] = tensor.to(self.autocast)
        return self._copies[tensor]

    def __exit__(self, *error: object) -> None:
        self._copies.clear()
        return super().__exit__(*error)


def _widen(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_meta and tensor.dtype in _HALVES else tensor


def _replacements(device: Device, mode: _Autocast) -> Iterator[tuple[Any, str, Any]]:
    """What asks for the type of a tensor's device, and must not be told that it is the meta device."""
    is_enabled, dtype_of, autocast = torch.is_autocast_enabled, torch.get_autocast_dtype, torch.autocast

    @contextmanager
    def switched(enabled: bool) -> Iterator[None]:
        before, mode.autocast = mode.autocast, device.autocast if enabled else None
        try:
            yield
        finally:
            mode.autocast = before

    def pretended_autocast(device_type: str, *args: Any, enabled: bool = True, **kwargs: Any) -> Any:
        if device_type == "meta":
            return switched(enabled)
        return autocast(device_type, *args, enabled=enabled, **kwargs)

    yield torch, "is_autocast_enabled", lambda *of: mode.autocast is not None if of == ("meta",) else is_enabled(*of)
    yield torch, "get_autocast_dtype", lambda of: mode.autocast if of == "meta" else dtype_of(of)
    yield torch, "autocast", pretended_autocast

    def attention(*args: Any, **kwargs: Any) -> Tensor:
        args, kwargs = mode.narrowed(args, kwargs)
        return _attention(device.type, *args, **kwargs)

    # Not by the mode: what that sees inside of another function of PyTorch passes it by.
    yield F, "scaled_dot_product_attention", attention


def _attention(
    device: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`F.scaled_dot_product_attention` by the kernel that it would pick on the device."""
    kernel = _kernel(device, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if attn_mask is not None and attn_mask.dtype == torch.bool and kernel != _MATH:
        attn_mask = torch.empty_like(attn_mask, dtype=query.dtype)
    if kernel == _FLASH and device == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
        )[0]
    if kernel in (_FLASH, _CUDNN):
        return torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, return_debug_mask=False, scale=scale
        )[0]
    if kernel == _EFFICIENT:
        bias = None if attn_mask is None else attn_mask.expand(*query.shape[:3], key.shape[2])
        recording = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
        return torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, recording, dropout_p, is_causal, scale=scale
        )[0]
    return _plain_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


_choices: dict[tuple, int] = {}


def _kernel(
    device: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> int:
    """The kernel for these shapes: asked of PyTorch where there is such a device, else by its rule for recent GPUs."""
    if device == "cuda" and not torch.cuda.is_available():
        if enable_gqa and query.dtype not in _HALVES:
            return _MATH
        return _FLASH if mask is None and query.dtype in _HALVES else _EFFICIENT
    operands = (query, key, value, mask)
    shapes = tuple(None if x is None else (x.shape, x.stride(), x.dtype, x.requires_grad) for x in operands)
    asked = (device, shapes, dropout_p, is_causal, scale, enable_gqa)
    if asked not in _choices:
        # Never read or written, so on a CPU no page of them is ever taken.
        q, k, v, m = (
            None
            if x is None
            else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device, requires_grad=x.requires_grad)
            for x in operands
        )
        _choices[asked] = torch._fused_sdp_choice(q, k, v, m, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    return _choices[asked]
