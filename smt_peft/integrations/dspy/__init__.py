"""DSPy: programs whose language model is tuned by SMT, or by any method of PEFT, and answers in this process.

See docs/dspy.md. Needs DSPy 3.4 or newer, which has engines.
"""

from .bootstrap import BootstrapFinetune
from .engine import AsyncTransformersEngine, TransformersEngine
from .job import SMTTrainingJob
from .lm import LocalLM
from .provider import SMTProvider

__all__ = [
    "AsyncTransformersEngine",
    "BootstrapFinetune",
    "LocalLM",
    "SMTProvider",
    "SMTTrainingJob",
    "TransformersEngine",
]
