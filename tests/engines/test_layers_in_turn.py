"""Layers in turn under DDP, in two processes, learn what one process learns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cases import told
from helpers import assert_no_worse_than_torch
from launch import run_worker
from turns_worker import CASES, learn


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("turns")
    run_worker("turns_worker.py", directory)
    return directory


@pytest.mark.parametrize("case", CASES)
def test_losses_and_blocks_are_those_of_one_process(out, case):
    (losses, deltas), (true_losses, true_deltas) = learn(lambda model: model), learn(lambda model: model, torch.float64)
    found = told(out, case)
    assert_no_worse_than_torch(torch.tensor(found["losses"]), torch.tensor(losses), torch.tensor(true_losses))
    assert_no_worse_than_torch(torch.tensor(found["deltas"]), deltas, true_deltas)
