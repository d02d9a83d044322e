"""What changes while blocks train, under DDP in two processes: they agree, and learn what one process learns."""

from __future__ import annotations

from pathlib import Path

import pytest
from cases import told
from launch import run_worker
from schedules_worker import CASES, Learned, learn


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("schedules")
    run_worker("schedules_worker.py", directory)
    return directory


@pytest.mark.parametrize("case", CASES)
def test_two_processes_learn_what_one_learns_bit_for_bit(out, case):
    make, _ = CASES[case]
    assert Learned(**told(out, case)) == learn(make())


@pytest.mark.parametrize("case", ["regrowth", "regrowth, kept"])
def test_blocks_gave_way(case):
    make, _ = CASES[case]
    schedule = make()
    learn(schedule)
    assert schedule.replaced > 0
