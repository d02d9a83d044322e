"""Where the CUDA sources and their headers lie, and how a compiler is called."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
CUDA_HOME = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))


def call(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr
