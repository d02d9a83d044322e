"""What freezing and inputs in 8 bits save on a GPU, by its allocator."""

from __future__ import annotations

import pytest

from benchmarks.cost.freezing import Models, memory

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("kind", Models().kinds)
def test_the_allocator_gives_out_less_the_more_is_frozen(kind, record_property):
    models = Models(hidden=512, layers=6, tokens=2048, density=0.01, device="cuda")
    cases = [(0.0, "full"), (0.0, "int8"), (0.5, "full"), (0.9, "full"), (0.9, "int8")]
    held = {case: memory(models, kind, *case) for case in cases}
    for case, bytes_held in held.items():
        record_property(f"{case[0]:.0%} frozen, inputs {case[1]}", bytes_held)
    for figure in ("peak_bytes", "saved_bytes"):
        whole, eight, half, most, _ = (held[case][figure] for case in cases)
        assert eight < whole and most < half < whole
    assert held[0.9, "int8"]["saved_bytes"] < held[0.9, "full"]["saved_bytes"]
    gradients = [held[case]["gradient_bytes"] for case in cases]
    assert gradients[0] > gradients[2] > gradients[3]
