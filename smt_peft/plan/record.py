"""The figures of a plan, to be kept beside what is measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .plan import plan

if TYPE_CHECKING:
    from ..training.yaml.schema import Run


def record(run: Run) -> dict[str, Any]:
    """The plan of a run in JSON values: bytes on one device, without what the device's own runtime takes.

    Returns:
        `weights`, `trained`, `moments`, `gradients`, `saved` (for backward) and `peak` of a step; `warm_up`, its peak,
        0 without one; `device`, its type; `assumed`, in words. A plan that cannot be made breaks nothing: `error` says
        why.
    """
    try:
        planned = plan(run)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    smt, outside = planned.smt, planned.setting.runtime
    return {
        "weights": sum(smt.state.weights.values()),
        "trained": smt.state.trained,
        "moments": smt.state.moments,
        "gradients": smt.gradients,
        "saved": smt.step.saved,
        "peak": smt.peak() - outside,
        "warm_up": max(0, planned.warm_up - outside),
        "device": planned.setting.device.type,
        "assumed": list(planned.assumed),
    }
