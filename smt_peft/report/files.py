"""The files of an output directory, as far as a report is made of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..blocks import BlockSelection

RUN, METRICS, SELECTION = "run.yaml", "metrics.json", "selection.safetensors"
# The blocks at the end of a training that has replaced some.
FINAL_SELECTION = "selection_final.safetensors"
# The numbers of a run that is trained and saved, until verification and comparison are through as well.
UNFINISHED = "metrics_unfinished.json"
_STATE, _ADAPTER = "trainer_state.json", "adapter_config.json"
# Newest first: what is known of a run in each of its states.
FINISHED, TRAINED, STOPPED, SELECTED = "finished", "trained", "stopped", "selected"


@dataclass(frozen=True)
class RunFiles:
    """What lies in an output directory.

    Args:
        directory: as the run's own `output_dir` says, where that is this directory; else as given.
        stage: `"finished"`; `"trained"`: saved, but not verified and compared; `"stopped"`: with checkpoints only;
            `"selected"`: no more than a selection.
        selection: the chosen blocks; of a training that has replaced some, those at its end.
        settings: of `run.yaml`; empty without one.
        metrics: of `metrics.json`, or what there is in its place.
        adapter: of `adapter_config.json`; empty without one.
    """

    directory: str
    stage: str
    selection: BlockSelection
    settings: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    adapter: Mapping[str, Any] = field(default_factory=dict)


def read_run(directory: str | Path) -> RunFiles:
    """Read what a run has left.

    Raises:
        FileNotFoundError: there is no selection file, so no run of this package.
        ValueError: a file is damaged; names it.
    """
    place = Path(directory)
    if not (place / SELECTION).is_file():
        raise FileNotFoundError(
            f"{directory} holds no {SELECTION}, so it is not the output_dir of smt train or smt select; name that one"
        )
    final = place / FINAL_SELECTION
    selection = BlockSelection.load(final if final.is_file() else place / SELECTION)
    settings = _read(place / RUN)
    stage, metrics = _numbers(place)
    own = settings.get("output_dir")
    same = own is not None and Path(own).resolve() == place.resolve()
    return RunFiles(str(own if same else directory), stage, selection, settings, metrics, _read(place / _ADAPTER))


def _numbers(place: Path) -> tuple[str, Mapping[str, Any]]:
    for name, stage in ((METRICS, FINISHED), (UNFINISHED, TRAINED)):
        if metrics := _read(place / name):
            return stage, metrics
    checkpoints = [path for path in place.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    for checkpoint in sorted(checkpoints, key=lambda path: -int(path.name.removeprefix("checkpoint-"))):
        if state := _read(checkpoint / _STATE):
            return STOPPED, {"log_history": state.get("log_history", [])}
    return SELECTED, {}


def _read(file: Path) -> Mapping[str, Any]:
    """A mapping from a JSON or YAML file; empty where there is no file."""
    if not file.is_file():
        return {}
    try:
        text = file.read_text(encoding="utf-8")
        found = yaml.safe_load(text) if file.suffix == ".yaml" else json.loads(text)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{file} is damaged ({error}); restore it, or delete it to report without it") from error
    if not isinstance(found, Mapping):
        raise ValueError(f"{file} is damaged (no mapping); restore it, or delete it to report without it")
    return found
