"""What the meta device does not do as the planned device would.

A model on the meta device runs every operation for its shapes alone. Three things would go another way there: attention
is not fused, autocast does not exist, and what Triton does in place on a GPU is done by PyTorch, with temporaries.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

_HALVES = (torch.float16, torch.bfloat16)
# Of autocast's lists, what transformers are made of.
_NARROWED = (
    *((F, name) for name in ("linear", "conv1d", "conv2d")),
    *((torch, name) for name in ("matmul", "mm", "bmm", "addmm", "baddbmm", "einsum")),
    *((Tensor, name) for name in ("matmul", "__matmul__", "mm", "bmm")),
)
_WIDENED = (
    *(
        (F, name)
        for name in ("layer_norm", "rms_norm", "softmax", "log_softmax", "cross_entropy", "nll_loss", "mse_loss")
    ),
    *((torch, name) for name in ("softmax", "log_softmax", "pow", "rsqrt", "norm", "cumsum")),
    *((Tensor, name) for name in ("softmax", "pow", "rsqrt")),
)
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
        casts = _Casts(self.autocast)
        with ExitStack() as stack:
            for owner, name, replacement in _replacements(self, casts):
                own = name in vars(owner)
                stack.callback(setattr, owner, name, getattr(owner, name)) if own else stack.callback(
                    delattr, owner, name
                )
                setattr(owner, name, replacement)
            yield


class _Casts:
    """What autocast does to operands; `dtype` is None where it is off."""

    def __init__(self, dtype: torch.dtype | None):
        self.dtype = dtype
        # As autocast does: the copy of a trained fp32 weight is kept until the end.
        self._copies: dict[Tensor, Tensor] = {}

    def narrowing(self, func: Callable) -> Callable:
        def narrowed(*args: Any, **kwargs: Any) -> Any:
            # What writes into a given tensor is left alone by autocast.
            if "out" not in kwargs:
                args, kwargs = self.narrowed(args), self.narrowed(kwargs)
            return func(*args, **kwargs)

        return narrowed

    def widening(self, func: Callable) -> Callable:
        def widened(*args: Any, **kwargs: Any) -> Any:
            if self.dtype is not None:
                args, kwargs = tree_map_only(Tensor, _widen, (args, kwargs))
            return func(*args, **kwargs)

        return widened

    def narrowed(self, operands: Any) -> Any:
        return operands if self.dtype is None else tree_map_only(Tensor, self._narrow, operands)

    def _narrow(self, tensor: Tensor) -> Tensor:
        if not tensor.is_meta or not tensor.is_floating_point() or tensor.dtype in (self.dtype, torch.float64):
            return tensor
        if not (isinstance(tensor, nn.Parameter) and tensor.requires_grad and tensor.dtype == torch.float32):
            return tensor.to(self.dtype)
        if tensor not in self._copies:
            self._copies[tensor] = tensor.to(self.dtype)
        return self._copies[tensor]

    @contextmanager
    def switched(self, dtype: torch.dtype | None) -> Iterator[None]:
        before, self.dtype = self.dtype, dtype
        try:
            yield
        finally:
            self.dtype = before


def _widen(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_meta and tensor.dtype in _HALVES else tensor


def _replacements(device: Device, casts: _Casts) -> Iterator[tuple[Any, str, Any]]:
    """Functions that are to do something else for the time being: owner, name, stand-in.

    They are replaced by name, as a `TorchFunctionMode` is switched off by PyTorch itself in the course of backward.
    """
    is_enabled, dtype_of, autocast = torch.is_autocast_enabled, torch.get_autocast_dtype, torch.autocast

    def pretended_autocast(device_type: str, *args: Any, enabled: bool = True, **kwargs: Any) -> Any:
        if device_type == "meta":
            return casts.switched(device.autocast if enabled else None)
        return autocast(device_type, *args, enabled=enabled, **kwargs)

    yield torch, "is_autocast_enabled", lambda *of: casts.dtype is not None if of == ("meta",) else is_enabled(*of)
    yield torch, "get_autocast_dtype", lambda of: casts.dtype if of == "meta" else dtype_of(of)
    yield torch, "autocast", pretended_autocast
    if device.autocast is not None:
        for owner, name in _NARROWED:
            yield owner, name, casts.narrowing(getattr(owner, name))
        for owner, name in _WIDENED if device.type == "cuda" else ():
            yield owner, name, casts.widening(getattr(owner, name))
    head = sys.modules.get("trl.kernels.chunked_logprob")
    for fold in ("_forward_tile", "_backward_tile", "_addmm_fp32") if device.type == "cuda" else ():
        if hasattr(head, fold):
            yield head, fold, lambda *operands, **numbers: None

    yield (
        F,
        "scaled_dot_product_attention",
        lambda *args, **kwargs: _attention(device.type, *casts.narrowed(args), **casts.narrowed(kwargs)),
    )


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
