"""One module a config names: its weight, how it is laid out, and what its values are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..blocks import BlockGrid
from ..config import SMTConfig
from .fingerprint import Weight
from .packed import format_of, is_packed, stored
from .sharded import is_dtensor

if TYPE_CHECKING:
    from .couplings import Coupling


@dataclass(frozen=True)
class Target:
    """One module a config names. The weight of an embedding is a `(num_embeddings, embedding_dim)` matrix.

    Args:
        name: as in `model.named_modules()`.
        module: the base layer itself, also where an SMT layer already wraps it.
        transposed: whether the layer stores its weight as `(in_features, out_features)`, as GPT-2's `Conv1D` does.
        is_merged: whether an adapter is merged into the weight, which then is not the base's.
        coupling: the channels it shares with other targets, where these are chosen together.
    """

    name: str
    module: nn.Module
    transposed: bool
    is_merged: bool = False
    coupling: Coupling | None = None

    @property
    def stored(self) -> Tensor:
        """The weight as the layer stores it."""
        return stored(self.module)

    @property
    def weight(self) -> Tensor:
        """The weight as an `(out_features, in_features)` view; a packed one as it is stored."""
        weight = self.stored
        return weight.t() if self.transposed else weight

    @property
    def shape(self) -> tuple[int, int]:
        """`(out_features, in_features)`, as the layer states them: a packed weight may have another shape."""
        module = self.module
        if self.is_table:
            return module.num_embeddings, module.embedding_dim
        return (module.nf, module.nx) if self.transposed else (module.out_features, module.in_features)

    def grid(self, config: SMTConfig) -> BlockGrid:
        """The tiling of the weight under the config's `block_size`, or in channels."""
        if self.coupling is not None:
            return self.coupling.of(self.name)[0].grid(self.shape)
        return config.grid(self.shape, self.name)

    def matrices(self) -> list[Target]:
        """The matrices among which blocks are chosen; see `ParameterTarget.matrices`."""
        return [self]

    @property
    def is_table(self) -> bool:
        """Whether the weight is looked up by row, not multiplied."""
        return isinstance(self.module, nn.Embedding)

    @property
    def has_plain_weight(self) -> bool:
        """Whether the weight is stored element by element in 16 bits or more, so that its values can be read."""
        weight = self.weight
        plain = weight.is_floating_point() and weight.dtype.itemsize >= 2 and weight.ndim == 2
        return plain and tuple(weight.shape) == self.shape and not is_packed(self.module)

    @property
    def is_readable(self) -> bool:
        """Whether `read` can give the weight's values."""
        packed = format_of(self.module)
        return self.has_plain_weight if packed is None else packed.why_not_read(self.module) is None

    def read(self) -> Tensor:
        """The weight in floats, `(out_features, in_features)`: the one above, or a quantised one dequantised.

        Raises:
            ValueError: a quantised weight cannot be dequantised.
        """
        packed = format_of(self.module)
        if packed is not None:
            return packed.read(self.module)
        return self.weight.full_tensor() if is_dtensor(self.weight) else self.weight

    @property
    def evidence(self) -> Weight:
        """What a fingerprint is taken of."""
        return evidence_of(self.module, self.weight)


def is_supported(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D, nn.Embedding)) or is_packed(module)


def evidence_of(module: nn.Module, weight: Tensor) -> Weight:
    """What a fingerprint is taken of: `weight` as it is, or what dequantises it where it is packed."""
    packed = format_of(module)
    if packed is None or packed.why_not_read(module):
        return weight

    def dequantised() -> tuple[Tensor, Tensor]:
        values = packed.read(module)
        return values, packed.half_step(module, values)

    return dequantised
