"""Optimizers for the blocks of a model: AdamW in one call, and MeZO, which needs no backward pass."""

from .adamw import SMTAdamW
from .mezo import MeZO

__all__ = ["MeZO", "SMTAdamW"]
