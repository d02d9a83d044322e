"""What changes while blocks train, under DDP in two processes: they agree, and learn what one process learns."""

from __future__ import annotations

from pathlib import Path

import pytest
from cases import told
from launch import run_worker
from schedules_worker import CASES, STOPS, Learned, learn, told_as


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("schedules")
    run_worker("schedules_worker.py", directory)
    return directory


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("case", CASES)
def test_two_processes_learn_what_one_learns_bit_for_bit(out, case, stop):
    """Also where they go on from what the first of them has saved."""
    make, _ = CASES[case]
    assert Learned(**told(out, told_as(case, stop))) == learn(make)
