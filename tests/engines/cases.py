"""What workers tell the tests: per case a JSON, written by the first process; a failure is told with its traceback."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

Case = Callable[[Path], dict]


def run_cases(cases: dict[str, Case], out: Path) -> None:
    """Run every case in every process. After a failure the rest is left: another process may wait for this one."""
    for name, case in cases.items():
        (out / name).mkdir(parents=True, exist_ok=True)
        try:
            told = {"result": case(out / name)}
        except BaseException:
            told = {"error": traceback.format_exc()}
        file = out / name / f"told_{dist.get_rank()}.json"
        file.write_text(json.dumps(told))
        if "error" in told:
            sys.exit(f"{name}: {told['error']}")


def told(out: Path, name: str) -> dict:
    """What the first process found in a case; fails with what went wrong in any."""
    files = sorted((out / name).glob("told_*.json"))
    log = (out / "log.txt").read_text()[-4000:]
    assert files, f"{name} was not run, as an earlier case failed, or the worker:\n{log}"
    answers = [json.loads(file.read_text()) for file in files]
    errors = [answer["error"] for answer in answers if "error" in answer]
    assert not errors, "\n".join(errors)
    return answers[0]["result"]
