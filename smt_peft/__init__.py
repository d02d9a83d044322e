"""Sparse Matrix Tuning as a PEFT tuner: train chosen blocks of frozen linear weights.

Importing this package registers the tuner type `SMT` with PEFT; it loads neither Triton nor TRL and touches no CUDA.
"""

from . import _register
from .blocks import BlockSelection
from .config import SMTConfig
from .selection import select_blocks

__version__ = "0.1.0"
__all__ = ["BlockSelection", "SMTConfig", "__version__", "select_blocks"]

_register.register()
