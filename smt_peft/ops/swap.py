"""The blocks of a weight overwritten by `base + delta` for the length of one GEMM, and the base put back.

Outside the call the weight is the base, bit for bit, also when the GEMM raises. A thread that reads the weight by
another road during the call sees the blocks written; that is why the tuner swaps in training only.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ..blocks import BlockLayout
from .reference import add_rounded, block_gather, block_scatter_


def swap_linear(
    x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, delta_Brc: Tensor, layout: BlockLayout
) -> Tensor:
    """`X round(W + delta)^T + bias`; see `operations.swap_linear`."""
    return run_with_blocks(lambda: F.linear(x_TK, weight_NK, bias_N), weight_NK, delta_Brc, layout)


def swap_matmul(dy_TN: Tensor, weight_NK: Tensor, delta_Brc: Tensor, layout: BlockLayout) -> Tensor:
    """`dY round(W + delta)`; see `operations.swap_matmul`."""
    return run_with_blocks(lambda: dy_TN @ weight_NK, weight_NK, delta_Brc, layout)


# One lock per weight, so that two threads in one layer cannot restore each other's blocks.
_locks: WeakIdKeyDictionary = WeakIdKeyDictionary()
_new_lock = threading.Lock()
# Originals of a swap under way. An entry outlives its call only when an interrupt hit the restoring itself.
_unrestored: WeakIdKeyDictionary = WeakIdKeyDictionary()


def run_with_blocks(gemm: Callable[[], Tensor], weight_NK: Tensor, delta_Brc: Tensor, layout: BlockLayout) -> Tensor:
    """Run `gemm` while the chosen blocks of `weight_NK` hold `round(base + delta)`.

    Args:
        gemm: reads the weight; must not write it or call this function on it.
        weight_NK: the parameter itself or its transpose; written through `.data`, so that its version stays and a tied
            module's backward does not object to a write that is undone.
    """
    owner = weight_NK._base if weight_NK._base is not None else weight_NK
    data = weight_NK.data
    with _lock_of(owner):
        _restore(owner)
        original = block_gather(data, layout)
        written = add_rounded(original, delta_Brc)
        _unrestored[owner] = (data, original, layout)
        try:
            block_scatter_(data, written, layout)
            return gemm()
        finally:
            try:
                _restore(owner)
            except KeyboardInterrupt:
                # A second Ctrl-C can still cut this off; what is left then, `heal` puts right.
                _restore(owner)
                raise


def heal(weight: Tensor) -> None:
    """Put the base back if an interrupt (Ctrl-C) cut off the end of a swap on this weight; else do nothing."""
    if torch.compiler.is_compiling():
        return
    if weight in _unrestored:
        with _lock_of(weight):
            _restore(weight)


def _restore(owner: Tensor) -> None:
    if owner not in _unrestored:
        return
    data, original, layout = _unrestored[owner]
    # Weights put in the place of these since then are not ours to write to.
    if data.untyped_storage().data_ptr() == owner.untyped_storage().data_ptr():
        block_scatter_(data, original, layout)
    del _unrestored[owner]


def _lock_of(owner: torch.Tensor) -> threading.Lock:
    lock = _locks.get(owner)
    if lock is None:
        with _new_lock:
            lock = _locks.setdefault(owner, threading.Lock())
    return lock
