"""DSPy's BootstrapFinetune, which says what it leaves out and stops where nothing is left."""

from __future__ import annotations

from typing import Any

import dspy
from dspy.teleprompt.bootstrap_trace import FailedPrediction

from ...say import say


class BootstrapFinetune(dspy.BootstrapFinetune):
    """`dspy.BootstrapFinetune` that leaves out answers which cannot be read, and counts what it keeps.

    An answer that the adapter cannot parse gets the score -1 from DSPy (3.4.1), which its filter takes for a pass, and
    the compilation stops with `'FailedPrediction' object has no attribute 'get'`. A small model as its own teacher
    gives such answers often.

    Raises:
        ValueError: by `compile`, no trace is left to train on.
    """

    def _prepare_finetune_data(
        self, trace_data: list[dict[str, Any]], lm: dspy.LM, pred_ind: int | None = None
    ) -> tuple[list[dict[str, Any]], Any]:
        readable = [item for item in trace_data if not isinstance(item["prediction"], FailedPrediction)]
        passed = [item for item in readable if item["score"]] if self.metric else readable
        counts = f"{len(trace_data) - len(readable)} unreadable, {len(readable) - len(passed)} failed by the metric"
        if not passed:
            raise ValueError(
                f"none of the {len(trace_data)} traces is left to train on ({counts}); look at what the teacher says "
                "(dspy.inspect_history), take a stronger teacher or an easier metric, or more examples"
            )
        rows, form = super()._prepare_finetune_data(passed, lm, pred_ind)
        whose = "" if pred_ind is None else f", predictor {pred_ind}"
        say(f"{len(passed)} of {len(trace_data)} traces are trained on ({counts}){whose}: {len(rows)} rows")
        return rows, form
