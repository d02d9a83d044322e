"""The input that a block gradient is computed with, between forward and backward: as it is, or in 8 bits.

In 8 bits (`int8`), `GROUP` consecutive tokens of a column share a scale, `max |x| / 127`, and are codes from -127 to
127. Of a column, as activations of transformers have outlier channels, a few columns that are large for all tokens: in
groups along a row they would take the resolution from their neighbours. On Gaussian inputs of which one column in a
hundred is 50 times as large, the gradient of the other columns is off by 0.6 %, and by 13 % with groups of 128 columns
of a token; where one token in a hundred is large instead, by 2.4 % and 0.6 %; without outliers the two are alike
(2026-11, `tests/ops/test_saved.py`).

Every value is off by half a step at most, so with steps `s` `(T, C)` and u the unit roundoff of the input's dtype

    |dW_8bit - dW| <= |dY|^T (s / 2 + u |x|)

up to the rounding of the product itself. The result of forward, and the gradient of the input, are not touched.

Shape suffixes: T tokens, C columns that are kept, K all columns, G groups of g tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import TensorWeakRef

from .reference import accumulate_dtype

#: Tokens that share a scale, at most. Scales are 3 % of the codes; with half as many tokens they would be 6 %, for an
#: error that is 9 % smaller on Gaussian inputs (2026-11).
GROUP = 128
LARGEST = 127
#: Fewer tokens stay as they are: a scale takes the room of four codes.
FEW = 8


def compressed(kept: Tensor | None, int8: bool, shared: bool) -> tuple[Tensor | None, ...]:
    """What is saved for backward: the `(T, C)` itself, or its codes and scales, of which `restored` makes it again.

    Args:
        kept: what the block gradient needs of the input; None where nobody wants that gradient.
        shared: whether other layers may be about to keep the very same tensor; they get the same codes then.
    """
    if not int8 or kept is None or len(kept) < FEW or kept.shape[1] == 0:
        return (kept,)
    return _shared(kept) if shared else quantised(kept)


def restored(kept: Tensor, scales: Sequence[Tensor], tokens: int, dtype: torch.dtype) -> Tensor:
    """The `(T, C)` that was kept, in the dtype that it had."""
    if not scales:
        return kept
    # In place: a product of integers and floats would hold both in floats on a CPU.
    return kept.to(scales[0].dtype).mul_(scales[0]).view(-1, kept.shape[-1])[:tokens].to(dtype)


def quantised(x_TC: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of an input that is not empty, int8 `(G, g, C)`, and scales, `(G, 1, C)`, fp32 (fp64 for an fp64 input).

    The groups of a column are alike, `g <= GROUP`, the last one filled up with zeros. A group that holds a NaN or an
    infinity comes back as NaN, so that it is noticed in the gradient.
    """
    tokens, columns = x_TC.shape
    groups = -(-tokens // GROUP)
    size = -(-tokens // groups)
    if rest := groups * size - tokens:
        x_TC = F.pad(x_TC, (0, 0, 0, rest))
    x_GgC = x_TC.reshape(groups, size, columns)
    # Two passes over the input, and no copy of it. Scales have the range of bf16, which fp16 has not.
    largest = torch.maximum(x_GgC.amax(1, keepdim=True), -x_GgC.amin(1, keepdim=True))
    scales = largest.to(accumulate_dtype(x_TC)) / LARGEST
    # A group of zeros is divided by one. The steps of the smallest numbers that there are can round down, hence clamp.
    codes = (x_GgC / torch.where(scales == 0, 1, scales)).round_().clamp_(-LARGEST, LARGEST).to(torch.int8)
    return codes, scales


# The codes of the last input that was kept whole, for as long as something else holds them: projections that have one
# input, as of queries, keys and values, follow one another, and without 8 bits all keep a reference to the same tensor.
# A tuple, so that threads exchange it in one piece.
_last: tuple[tuple, StorageWeakRef, TensorWeakRef, TensorWeakRef] | None = None


def _shared(x_TK: Tensor) -> tuple[Tensor, Tensor]:
    """`quantised`, or what it has made already of the very same values for another layer."""
    global _last
    if torch.compiler.is_compiling() or x_TK.is_inference():
        # A compiler sees by itself that the same is computed twice; an inference tensor does not say if it was written.
        return quantised(x_TK)
    storage = StorageWeakRef(x_TK.untyped_storage())
    what = (storage.cdata, x_TK._version, x_TK.storage_offset(), x_TK.shape, x_TK.stride(), x_TK.dtype)
    if _last is not None and _last[0] == what and not _last[1].expired():
        codes, scales = _last[2](), _last[3]()
        if codes is not None and scales is not None:
            return codes, scales
    codes, scales = quantised(x_TK)
    # The reference keeps the storage's address from being given to another one.
    _last = what, storage, TensorWeakRef(codes), TensorWeakRef(scales)
    return codes, scales
