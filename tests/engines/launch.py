"""Starting processes: `torchrun` with two of them, and a fresh one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def environment(**more: str) -> dict[str, str]:
    paths = [str(ROOT), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        **more,
    }


def run(*arguments: object, **more: str) -> subprocess.CompletedProcess:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment(**more), check=False)


def python(*arguments: object, **more: str) -> subprocess.CompletedProcess:
    """A fresh process; its output is the message when it fails."""
    done = run(*arguments, **more)
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
    return done


def torchrun(*arguments: object, **more: str) -> subprocess.CompletedProcess:
    """Two processes on the CPU, however they end."""
    return run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *arguments, **more)


def run_worker(name: str, out: Path, *arguments: object, **more: str) -> None:
    """Run the cases of a worker in two processes; `cases.told` tells what became of each."""
    done = torchrun(HERE / name, out, *arguments, **more)
    (out / "log.txt").write_text(done.stdout + done.stderr)
