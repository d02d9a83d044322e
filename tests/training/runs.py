"""Data for a tiny model, settings of a run over it, and the command line in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

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


def losses(metrics: dict) -> dict[int, tuple[float, float]]:
    return {entry["step"]: (entry["loss"], entry["grad_norm"]) for entry in metrics["log_history"] if "loss" in entry}


def assert_resumed_alike(workshop: Workshop, **settings) -> Path:
    """A run of 8 steps, taken back to its checkpoint of step 4, ends again with the same losses and weights. Returns
    where it lies."""
    # Not at the top: the command line alone needs no TRL.
    from smt_peft.training import outputs
    from smt_peft.training.run import train
    from smt_peft.training.yaml.schema import load_run

    # A place of its own, as others resume over the same workshop.
    workshop = replace(workshop, directory=Path(tempfile.mkdtemp(dir=workshop.directory)))
    path = workshop.write("resumed", save_strategy="steps", save_steps=4, **settings)
    directory = workshop.directory / "resumed"
    straight = train(load_run(path))
    weights = load_file(directory / "adapter_model.safetensors")
    shutil.rmtree(directory / "checkpoint-8")
    for name in (outputs.METRICS, outputs.REPORT, outputs.PICTURE, "adapter_model.safetensors", "adapter_config.json"):
        (directory / name).unlink()
    resumed = train(load_run(path, ["resume_from_checkpoint=true"]))
    assert losses(resumed) == losses(straight) and sorted(losses(resumed)) == list(range(1, 9))
    again = load_file(directory / "adapter_model.safetensors")
    assert all(torch.equal(again[key], weights[key]) for key in weights)
    return directory
