"""A training that was stopped half way and taken up by fresh processes ends as one that was not."""

from __future__ import annotations

from pathlib import Path

import pytest
from cases import told
from launch import run_worker

WAYS = ("ddp", "ddp_smt_adamw", "fsdp2_dcp", "fsdp2_full")


@pytest.fixture(scope="module")
def halves(tmp_path_factory) -> tuple[dict, dict]:
    """What was told of each half."""
    out = tmp_path_factory.mktemp("resume")
    found = []
    for part in ("first", "second"):
        run_worker("resume_worker.py", Path(out), part)
        found.append({way: told(out, way) for way in WAYS})
    return tuple(found)


@pytest.mark.parametrize("way", WAYS)
def test_four_steps_and_four_more_are_eight(halves, way):
    first, second = halves[0][way], halves[1][way]
    assert first["losses"] + second["resumed"] == second["losses"]
    assert len(second["losses"]) == 8 and len(set(second["losses"])) == 8
    assert second["states"] > 0 and second["same_state"] and second["same_weights"]
