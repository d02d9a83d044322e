"""The delta of one adapter in one layer: its blocks, and where they lie."""

from __future__ import annotations

import math

import torch
import torch._dynamo
from torch import Tensor, nn

from .. import ops
from ..bases.sharded import is_dtensor
from ..blocks import BlockGrid, BlockLayout
from ..ops.linear import wants_columns
from .gate import is_traced


class SMTBlocks(nn.Module):
    """The blocks of one adapter in one layer.

    Attributes:
        weight: trainable delta from the base weight, `(num_blocks, rows, cols)`, fp32, zero at the start.
        index: `(row, col)` block coordinates, int32 `(num_blocks, 2)`, sorted and unique; saved with the weight.
        retired: blocks of the same grid, at other places, that train no longer and still act; None: there are none.
        resting: whether a schedule lets them rest, so that enabling the adapter does not let them train again.

    Args:
        name: of the module, for messages.
        grid: the tiling.
        num_blocks: how many.
        looked_up: whether rows of the matrix are looked up, as those of an embedding table.
        int8: whether the inputs that the gradient needs are kept in 8 bits, see `ops.saved`.
    """

    kind, starts_at_zero = "smt_blocks", "weight"
    retired: SMTBlocks | None = None
    resting = False

    def __init__(self, name: str, grid: BlockGrid, num_blocks: int, looked_up: bool = False, int8: bool = False):
        super().__init__()
        self.name = name
        self.grid = grid
        self.looked_up = looked_up
        self.int8 = int8
        self.weight = nn.Parameter(torch.zeros(num_blocks, *grid.block_shape))
        self.register_buffer("index", torch.zeros(num_blocks, 2, dtype=torch.int32))
        self._layout: tuple[tuple, BlockLayout] | None = None
        # Stands for the layout on the meta device, see `BlockLayout.sketch`: layers take the forward there that they
        # take with values, so that what a model is going to hold can be counted before its weights are there.
        self.sketch: BlockLayout | None = None
        self._padding = 0

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(num_blocks, rows, cols)`, also where the weight is sharded: engines leave buffers whole."""
        return (len(self.index), *self.grid.block_shape)

    @property
    def parts(self) -> dict[str, tuple[int, ...]]:
        """What is saved, and its shape."""
        return {"weight": self.shape, "index": tuple(self.index.shape)}

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """`y + X delta^T`, where `y` `(..., rows)` is what the base layer made of `x` `(..., cols)`.

        A call, not a read of `weight`, so that engines which keep the weight sharded bring it in for the time it takes.

        Raises:
            NotImplementedError: tensor parallelism hands the layer a part of its input or output.
        """
        if self.retired is not None:
            y = self.retired(y, x)
        if is_dtensor(x) or is_dtensor(y) or (y.shape[-1], x.shape[-1]) != self.grid.shape:
            raise NotImplementedError(
                f"{self.name}: this process has {x.shape[-1]} inputs and {y.shape[-1]} outputs of a {self.grid.rows} x "
                f"{self.grid.cols} weight, as under tensor parallelism, which SMT does not support; shard the model "
                "with FSDP2 or ZeRO-3, or leave this module out of the parallel plan"
            )
        shapes_only = self.index.is_meta and self.sketch is None
        if is_traced() or shapes_only:
            return ops.block_add_traceable(y, x, self.weight, self.layout())
        return ops.block_add(y, x, self.weight, self.layout(), self.int8)

    def layout(self) -> BlockLayout:
        """The layout of the current index, checked whenever it has changed, so that no operation meets a bad one.

        Raises:
            ValueError: the index is out of range, duplicated or unsorted; names the module.
        """
        if self._layout is not None and torch.compiler.is_compiling():
            # The index is a symbol there, whose values cannot be checked; loading another drops this layout.
            return self._layout[1]
        if self.index.is_meta:
            # For shapes alone.
            return self.sketch or BlockLayout(self.grid, self.index)
        version = 0 if self.index.is_inference() else self.index._version
        key = (id(self.index), version, self.index.device)
        if self._layout is None or self._layout[0] != key:
            self.grid.check_blocks(self.index, self.name)
            # Not every road into a model passes `check_loaded`; here they all meet, once per index.
            if type(self.weight) is nn.Parameter:
                self._check_finite(self.weight)
            with torch.inference_mode(False):
                # A copy: what has been checked must not change under a backward pass that is still to come, and a CUDA
                # graph must find other positions at another address.
                index = self.index.detach().clone()
            self._layout = (key, _prepared(BlockLayout(self.grid, index), self.looked_up))
            # Outlives the positions, which a move to the meta device takes.
            self._padding = self._padding_at(index)
        return self._layout[1]

    def place(self, index: Tensor) -> None:
        """Take these positions, int32 `(num_blocks, 2)`; on the meta device, only what they count."""
        self._padding = self._padding_at(index)
        if not self.index.is_meta:
            self.index.copy_(index)

    @torch.no_grad()
    def rearrange(self, index: Tensor, sources: Tensor) -> None:
        """Move to other places, in place.

        Args:
            index: int32 `(num_blocks, 2)`, sorted and unique.
            sources: int64 `(num_blocks,)`, whose values each block takes; -1: zeros.
        """
        values = self.weight[sources.clamp(min=0)]
        values[sources < 0] = 0
        self.weight.copy_(values)
        self.place(index)

    @torch.no_grad()
    def retire(self, index: Tensor, weight: Tensor) -> None:
        """Let these be the retired blocks, and no others.

        Args:
            index: int32 `(num_retired, 2)`, sorted, unique, and disjoint from `index`.
            weight: `(num_retired, rows, cols)`.
        """
        # Not a submodule: what is saved and counted is what trains, until `take_in_retired`.
        self.__dict__["retired"] = _frozen(self, index, weight) if len(index) else None

    @torch.no_grad()
    def take_in_retired(self) -> None:
        """Make the retired blocks ones like the others; the weight is another Parameter then."""
        if (retired := self.retired) is None:
            return
        numbers, order = self.grid.flatten(torch.cat((self.index, retired.index))).sort()
        weight = torch.cat((self.weight, retired.weight))[order]
        self.weight = nn.Parameter(weight, self.weight.requires_grad)
        self.index = self.grid.unflatten(numbers)
        self._padding = self._padding_at(self.index)
        self.__dict__["retired"] = None
        self._remake_layout()

    def padding(self) -> int:
        """Entries of `weight` that lie outside the matrix: stored as zero, never trained, never counted."""
        return self._padding_at(self.index) if self._has_values() else self._padding

    def _has_values(self) -> bool:
        """Not so on the meta device, or in a stand-in for tracing."""
        return type(self.index) is Tensor and not self.index.is_meta

    def _padding_at(self, index: Tensor) -> int:
        return math.prod(self.shape) - self.grid.effective_numel(index) if self.grid.is_ragged else 0

    def check_loaded(self, weight: Tensor | None, index: Tensor | None) -> None:
        """Check tensors read from a file before they are copied in.

        Raises:
            ValueError: a tensor is missing, of the wrong shape or dtype, the index is impossible, or a value is not
                finite; names the module.
        """
        repair = "the adapter file is damaged or belongs to another model; restore it or save the adapter again"
        for part, tensor, expected in (("weight", weight, self.shape), ("index", index, tuple(self.index.shape))):
            if tensor is None:
                raise ValueError(f"{self.name}: the adapter file has no smt_blocks.{part} for this module; {repair}")
            if tuple(tensor.shape) != expected:
                raise ValueError(
                    f"{self.name}: smt_blocks.{part} has shape {tuple(tensor.shape)} in the file, but "
                    f"block_pattern says {expected}; {repair}"
                )
        self.check_values(weight, index)

    def check_values(self, weight: Tensor, index: Tensor) -> None:
        """Raise `ValueError`, naming the module, unless these can be blocks of this grid, however many."""
        self.grid.check_blocks(index, self.name)
        if not weight.is_floating_point():
            raise ValueError(
                f"{self.name}: smt_blocks.weight is {weight.dtype}, not a float type; the adapter file is damaged, "
                "restore it or save the adapter again"
            )
        self._check_finite(weight)

    def _check_finite(self, weight: Tensor) -> None:
        if not weight.is_meta and not bool(torch.isfinite(weight.detach()).all()):
            raise ValueError(
                f"{self.name}: smt_blocks.weight holds NaN or infinity; restore the adapter, or train it "
                "anew with a lower learning rate"
            )

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if prefix + "index" in state_dict:
            self._remake_layout()

    def _apply(self, *args, **kwargs):
        super()._apply(*args, **kwargs)
        if self.retired is not None:
            self.retired._apply(*args, **kwargs)
        self._remake_layout()
        return self

    def _remake_layout(self) -> None:
        """Make the layout of a new index now, so that a compiler finds it made; a bad one is told at its first use."""
        try:
            if self._has_values():
                self.layout()
        except ValueError:
            self._layout = None

    def __getstate__(self):
        # Derived from the index; dropped so that copies and pickles stay as small as the adapter.
        return {**self.__dict__, "_layout": None}

    def extra_repr(self) -> str:
        return f"{len(self.index)} blocks, {self.grid}"


def _frozen(blocks: SMTBlocks, index: Tensor, weight: Tensor) -> SMTBlocks:
    frozen = SMTBlocks(blocks.name, blocks.grid, len(index), blocks.looked_up).to(blocks.weight)
    frozen.weight.requires_grad_(False).copy_(weight)
    frozen.place(index)
    return frozen


def _prepared(layout: BlockLayout, looked_up: bool) -> BlockLayout:
    """Makes what a compiled or traced call would have to make from the values of the index.

    Compilers are told that index tensors stay where they are: a CUDA graph then reads them in place, and finds the very
    tensors that were checked, instead of copies that would have to be checked while it is captured.
    """
    layout.prepare()
    parts = [layout.blocks]
    if looked_up:
        layout.row_starts, layout.max_blocks_in_row  # noqa: B018
    elif wants_columns(layout):
        parts += [layout.columns, layout.packed.blocks]
    for index in parts:
        torch._dynamo.mark_static_address(index)
    return layout
