"""Blocks: which sub-matrices of a weight are trained. Pure PyTorch; everything else in the package speaks this noun.

A weight of shape `(rows, cols)` = `(out_features, in_features)` is tiled by blocks of one shape. A horizontal band of
blocks is a *row stripe*, a vertical one a *column stripe*; a block is named by its `(row stripe, column stripe)`.
Blocks at the right and lower edge may be ragged: they are stored padded with zeros to the full shape, and the padding
is never counted.

Shape suffixes used below: B blocks, R row stripes, C column stripes.
"""

from .grid import BlockGrid
from .layout import BlockLayout
from .selection import BlockSelection

__all__ = ["BlockGrid", "BlockLayout", "BlockSelection"]
