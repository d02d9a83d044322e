"""Everything that only a GPU can show, in one command and under nine minutes: `make gpu`.

Builds the compiled backends in place, prints which backend serves what, runs the tests marked `gpu`, and measures the
operations, one layer and, with Llama-3-8B's shape, whole training steps and their memory. Every stage is a process of
its own with its own time limit, and the later ones run whatever became of the earlier; the exit status is 0 when all
went well. What they find lies in one directory, written as it comes: summary.json, log.txt, tests.xml, ops.json,
layer.json, large_cuda.json.

    python benchmarks/gpu.py --out benchmarks/results/gpu
    python benchmarks/gpu.py --dry-run --out build/gpu     # all stages on a CPU, in sizes that say nothing of speed
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Stage:
    """A command, the seconds it may take, and one to run if it fails, which does not undo the failure."""

    name: str
    command: list[str]
    limit: int
    environment: tuple[tuple[str, str], ...] = ()
    on_failure: tuple[tuple[str, str], ...] = ()


def stages(out: Path, dry: bool) -> list[Stage]:
    """In their order; the limits add up to less than nine minutes."""
    python = sys.executable
    build = [python, "setup.py", "build_ext", "--inplace"]
    tests = [
        python,
        "-m",
        "pytest",
        "-m",
        "gpu",
        "tests/ops",
        "tests/optim",
        "tests/gpu",
        "-rs",
        f"--junitxml={out / 'tests.xml'}",
    ]
    if dry:
        tests += ["--collect-only", "-qq"]
    # Kernels compile on the CPU, so several processes share the GPU well.
    elif importlib.util.find_spec("xdist"):
        tests += ["-n", "8"]
    ops = [python, "benchmarks/ops.py", "--out", str(out / "ops.json")]
    layer = [python, "benchmarks/layer.py", "--out", str(out / "layer.json")]
    cost = [python, "-m", "benchmarks.cost", "large", "--out", str(out)]
    if dry:
        ops += ["--device", "cpu", "--quick"]
        layer += shlex.split("--device cpu --dtype float32 --shape 128 96 --tokens 64 --rounds 3")
        cost += shlex.split("--device cpu --dtype float32 --layers 1 --shrink 32 --batches 2x16 --rounds 2 --warmup 1")
    else:
        ops += ["--device", "cuda"]
        layer += ["--device", "cuda"]
        # Done before its limit: what is left out is told in a row then.
        cost += ["--device", "cuda", "--rounds", "4", "--seconds", "140"]
    kind = "cpu" if dry else "all"
    chosen = [
        # Where not all can be built, what can be is still worth measuring.
        Stage("build", build, 75, (("SMT_EXT", kind),), on_failure=(("SMT_EXT", "auto"),)),
        Stage("env", [python, "-m", "smt_peft.cli", "env"], 20),
        Stage("tests", tests, 110),
        Stage("ops", ops, 125),
        Stage("layer", layer, 35),
        Stage("cost", cost, 170),
    ]
    # A dry run may be on a machine that is slow, or busy with other things.
    return [replace(stage, limit=3 * stage.limit) for stage in chosen] if dry else chosen


def run(stage: Stage, environment: tuple[tuple[str, str], ...], limit: float, log: TextIO) -> str:
    """`"ok"`, `"failed (status n)"` or `"stopped after n s"`; what the command prints goes to the log as it comes."""
    process = subprocess.Popen(
        stage.command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"} | dict(environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    stopped = threading.Event()

    def stop() -> None:
        stopped.set()
        os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(max(1.0, limit), stop)
    timer.start()
    try:
        for line in process.stdout:
            tell(line.rstrip("\n"), log)
        status = process.wait()
    finally:
        timer.cancel()
    if stopped.is_set():
        return f"stopped after {limit:.0f} s"
    return "ok" if status == 0 else f"failed (status {status})"


def tell(text: str, log: TextIO) -> None:
    print(text, flush=True)
    log.write(text + "\n")
    log.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu")
    parser.add_argument("--dry-run", action="store_true", help="all stages on the CPU, in tiny sizes")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="build, env, tests, ops, layer, cost")
    args = parser.parse_args()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    chosen = [stage for stage in stages(out, args.dry_run) if not args.only or stage.name in args.only]
    summary: dict[str, dict] = {}
    with open(out / "log.txt", "w") as log:
        for stage in chosen:
            tell(f"\n=== {stage.name}: {' '.join(stage.command)}", log)
            start = time.perf_counter()
            status = run(stage, stage.environment, stage.limit, log)
            left = stage.limit - (time.perf_counter() - start)
            if status.startswith("failed") and stage.on_failure:
                tell(f"=== {stage.name}: {status}; again with {dict(stage.on_failure)}", log)
                run(stage, stage.on_failure, left, log)
            seconds = round(time.perf_counter() - start, 1)
            summary[stage.name] = {"status": status, "seconds": seconds, "command": stage.command}
            tell(f"=== {stage.name}: {status}, {seconds} s", log)
            (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        tell("", log)
        for name, facts in summary.items():
            tell(f"{name:6s} {facts['seconds']:6.1f} s  {facts['status']}", log)
    return int(any(facts["status"] != "ok" for facts in summary.values()))


if __name__ == "__main__":
    sys.exit(main())
