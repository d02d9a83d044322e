"""Choosing blocks: scores, budgets, how the chosen blocks are spread, and the warm-up pass."""

from .datafree import select_without_data
from .warmup import select_blocks

__all__ = ["select_blocks", "select_without_data"]
