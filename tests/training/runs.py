"""Data for a tiny model, settings of a run over it, and the command line in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]


@dataclass
class Workshop:
    """A directory with a model, data, and the settings of a run over them."""

    directory: Path
    settings: dict

    def write(self, name: str = "run", **changed) -> Path:
        """A YAML over the settings; None drops a key."""
        settings = {**self.settings, "output_dir": str(self.directory / name), **changed}
        settings = {key: value for key, value in settings.items() if value is not None}
        path = self.directory / f"{name}.yaml"
        path.write_text(yaml.safe_dump(settings, sort_keys=False))
        return path


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def smt(*arguments: str) -> subprocess.CompletedProcess:
    """The real command line, in a process of its own."""
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "smt_peft.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )


@dataclass
class Finished:
    """A whole run: the process that made it, and where it lies."""

    process: subprocess.CompletedProcess
    directory: Path
    yaml: Path
