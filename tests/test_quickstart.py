"""The quickstart does what the README says: the frozen model fails the task, the tuned one passes it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (ROOT / "quickstart" / "data" / name).read_text().splitlines()]


def test_the_held_out_identifiers_are_held_out():
    def letters(row):
        return "".join(c for c in row["completion"].lower() if c.isalnum())

    train, test = rows("train.jsonl"), rows("test.jsonl")
    assert not {letters(row) for row in train} & {letters(row) for row in test}
    assert len(test) >= 200


def test_it_fits_in_the_repository():
    size = sum(file.stat().st_size for file in (ROOT / "quickstart").rglob("*") if file.is_file())
    assert size <= 12e6


@pytest.mark.timeout(600)
def test_frozen_fails_and_tuned_passes(tmp_path):
    command = [sys.executable, "-m", "smt_peft.cli", "train", "configs/quickstart.yaml", f"output_dir={tmp_path}/run"]
    command += ["compare_lora=false", "disable_tqdm=true", "save_strategy=no"]
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    # It runs last and long: on all cores, also where the tests themselves share them.
    environment.pop("OMP_NUM_THREADS", None)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["before"]["exact_match"] < 0.10
    assert metrics["after"]["exact_match"] > 0.80
    assert done.stdout.count("verified:") == 4
    # The compiled kernels did the work; nothing else had a hand in training.
    for operation in ("swap_linear", "swap_matmul", "block_grad"):
        assert metrics["backends"][operation] == ["native"]
    assert (tmp_path / "run" / "blocks.png").stat().st_size > 10_000
