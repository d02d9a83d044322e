"""What fields of `SMTConfig` may be, and what they are when nothing is said."""

from __future__ import annotations

SCORES = (
    "grad_abs",
    "grad_sum_abs",
    "mean_abs",
    "grad_sq",
    "taylor",
    "activation",
    "magnitude",
    "small_magnitude",
    "low_rank_magnitude",
    "random",
    "diagonal",
)
DATA_FREE_SCORES = ("magnitude", "small_magnitude", "low_rank_magnitude", "random", "diagonal")
BUDGETS = ("global", "per_module", "per_layer")
# Fields that PEFT or a saved adapter records, and no choice of a user.
RECORDED = frozenset(
    {
        "auto_mapping",
        "base_fingerprint",
        "base_model_name_or_path",
        "base_quantization",
        "block_pattern",
        "inference_mode",
        "peft_type",
        "peft_version",
        "revision",
        "task_type",
    }
)
SPREADS = ("free", "capped", "assignment")
COUPLED = ("both", "consumers")
FORWARDS = ("auto", "additive", "swap", "overlay")
SAVED_ACTIVATIONS = ("full", "int8")
MIN_AUTO_SIDE, MAX_AUTO_SIDE = 4, 256
DEFAULT_DENSITY = 0.01
CALLABLE_PREFIX = "callable:"
