"""`SMTConfig` and what its fields may be."""

from .choices import BUDGETS, DATA_FREE_SCORES, DEFAULT_DENSITY, MIN_AUTO_SIDE, RECORDED, SCORES, SPREADS
from .config import SMTConfig

__all__ = [
    "BUDGETS",
    "DATA_FREE_SCORES",
    "DEFAULT_DENSITY",
    "MIN_AUTO_SIDE",
    "RECORDED",
    "SCORES",
    "SPREADS",
    "SMTConfig",
]
