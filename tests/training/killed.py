"""The quickstart, killed at random moments and started again by the same command, beside one that is left alone.

    python tests/training/killed.py --out out/killed              # 20 kills of a quickstart of 40 small steps
    python tests/training/killed.py --out out/killed --full       # of the whole of it

SIGKILL goes to the process and to those it has started. Both runs must end with the same numbers, to the last bit, and
every file in the output directory must be readable. A run that comes to its end before it was killed often enough
is compared, and another one begun. Exit status 0 when all that holds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from killing import numbers, read_everything

ROOT = Path(__file__).resolve().parents[2]
# What differs from configs/quickstart.yaml. A checkpoint comes sooner than the next kill, most of the time.
FULL = ["save_steps=10"]
SMALL = [
    "max_steps=40",
    "save_steps=5",
    "logging_steps=7",
    "per_device_train_batch_size=8",
    "warmup_steps=4",
    "eval_exact_match=false",
    "smt.warmup_batches=4",
    "optim=smt_adamw_bf16",
]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Kill the quickstart at random moments and compare how it ends.")
    parser.add_argument("--out", type=Path, required=True, help="directory for both runs; emptied")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--full", action="store_true", help="the quickstart as it is, LoRA's 150 steps too")
    parser.add_argument("--unbroken", type=Path, help="a run of the same settings left alone before, to save another")
    args = parser.parse_args(argv)
    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True)
    changed = FULL if args.full else SMALL
    begun = time.perf_counter()
    unbroken = Run(args.unbroken or args.out / "unbroken", changed)
    if args.unbroken is None:
        unbroken.start(None)
    # By the clock of the run itself, so that a busy machine gets as far between two kills as an idle one. The imports
    # take 3 seconds and more, and there is nothing to lose in them.
    seconds = json.loads((unbroken.directory / "metrics.json").read_text())["seconds"]["total"]
    moments, shortest, longest = random.Random(args.seed), 3.0, seconds / (4 if args.full else 2)
    print(
        f"unbroken: {seconds:.0f} s; kills {shortest:.0f} to {longest:.0f} s after a start, seed {args.seed}",
        flush=True,
    )
    kills, runs, same = 0, 0, True
    while kills < args.kills:
        runs += 1
        run = Run(args.out / f"killed-{runs}", changed)
        while kills < args.kills and run.start(moments.uniform(shortest, longest)):
            kills += 1
            print(f"kill {kills} after {run.seconds:.1f} s: {run.state()}", flush=True)
        if not run.is_finished():
            run.start(None)
        same = run.is_like(unbroken) and same
    print(f"{kills} kills of {runs} runs in {time.perf_counter() - begun:.0f} s: {'the same' if same else 'DIFFERENT'}")
    return 0 if same else 1


class Run:
    """A quickstart in a directory of its own.

    Args:
        directory: its output directory.
        changed: keys that replace those of the YAML.
    """

    def __init__(self, directory: Path, changed: list[str]):
        self.directory, self.log = directory, directory.with_suffix(".log")
        self.command = [sys.executable, "-m", "smt_peft.cli", "train", "configs/quickstart.yaml", *changed]
        self.command.append(f"output_dir={directory.resolve()}")
        self.seconds = 0.0

    def start(self, limit: float | None) -> bool:
        """Run the command for `limit` seconds; whether it was killed then.

        Raises:
            SystemExit: it ended by itself, with an error.
        """
        begun = time.perf_counter()
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                self.command, cwd=ROOT, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            self.seconds = time.perf_counter() - begun
            return True
        if status != 0:
            raise SystemExit(f"the run ended with status {status}; see {self.log}")
        return False

    def state(self) -> str:
        """What lies in the directory, which must all be readable but for what is still being written."""
        whole = [path for path in self.directory.glob("*") if not path.name.endswith(".part") and path.name != "lora"]
        for path in whole:
            if path.is_dir():
                read_everything(path)
        names = sorted(path.name for path in self.directory.rglob("*") if path.suffix == ".part")
        found = sorted(path.name for path in whole if path.name.startswith("checkpoint-") or path.suffix == ".json")
        return ", ".join([*found, *names]) or "nothing yet"

    def is_finished(self) -> bool:
        return (self.directory / "metrics.json").exists()

    def numbers(self) -> dict:
        return numbers(json.loads((self.directory / "metrics.json").read_text()))

    def is_like(self, other: Run) -> bool:
        """Whether both have ended with the same numbers; says which differ."""
        ours, theirs = self.numbers(), other.numbers()
        different = [name for name in theirs if ours.get(name) != theirs[name]]
        files = read_everything(self.directory)
        left = sorted(path.name for path in self.directory.rglob("*.part"))
        last = theirs["log"][-2]["loss"], ours["log"][-2]["loss"]
        print(
            f"{self.directory.name}: last loss {last[1]!r}, unbroken {last[0]!r}; "
            f"evaluation {ours['after']}, unbroken {theirs['after']}; {len(ours['log'])} log entries, "
            f"{files} files read; different: {different or 'nothing'}; left over: {left or 'nothing'}"
        )
        return not different and not left


if __name__ == "__main__":
    sys.exit(main())
