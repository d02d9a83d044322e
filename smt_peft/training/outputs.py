"""The output directory of a run: what lies in it, whether a run may use it, and files that are never half written."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from peft import get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from ..export.aside import sync
from ..export.head import LABELS
from ..report.files import METRICS, RUN, SELECTION, UNFINISHED
from .errors import ConfigError
from .stopping.checkpoints import is_whole, last_checkpoint, read_state
from .tell import tell
from .yaml.keys import BLOCKS, RunConfig
from .yaml.schema import Run

REPORT, PICTURE = "report.md", "blocks.png"
# The checkpoints of the LoRA that a run is compared with, until it is.
LORA = "lora"
_FOREIGN = re.compile(r"checkpoint-\d+|adapter_.*|config\.json|.*\.(safetensors|bin|pt)")
_RESUME = "resume_from_checkpoint"


class Earlier(NamedTuple):
    """What is there of a run that was stopped: the checkpoint to go on from, and the blocks it has chosen."""

    checkpoint: str | None = None
    selection: Path | None = None


def check_output_dir(run: Run) -> Earlier:
    """Refuse an output directory that holds another run, before anything is written.

    Returns:
        What a run with the same settings has left there; the checkpoint of one that was trained to its end, and saved,
        is the directory itself.

    Raises:
        ConfigError: names the key and the repair.
    """
    directory = Path(run.trainer.output_dir)
    wanted = run.resolved.get(_RESUME)
    if directory.exists() and not directory.is_dir():
        raise ConfigError(f"output_dir: {directory} is a file; name a directory")
    earlier = _read_run(directory / RUN)
    if wanted:
        return Earlier(_checkpoint(directory, wanted, earlier, run), directory / SELECTION)
    if earlier is None:
        foreign = sorted(
            path.name for path in directory.glob("*") if _FOREIGN.fullmatch(path.name) and path.name != SELECTION
        )
        if foreign:
            raise ConfigError(
                f"output_dir: {directory} holds {foreign[0]} but no {RUN}, so it belongs to something "
                "else; choose another output_dir"
            )
        return Earlier()
    changed = _differences(earlier, run.resolved)
    if changed:
        raise ConfigError(
            f"output_dir: {directory} holds another run ({'; '.join(changed[:3])}); choose another "
            "output_dir, or delete that run"
        )
    if (directory / METRICS).exists():
        raise ConfigError(
            f"output_dir: {directory} holds this very run, finished; choose another output_dir, or "
            "delete that run to repeat it"
        )
    # The selection is saved before the settings are.
    selection = directory / SELECTION if (directory / SELECTION).is_file() else None
    checkpoint = _end_or_last(run, directory) if selection else None
    if checkpoint and wanted is False:
        raise ConfigError(
            f"{_RESUME}: {directory} holds this run, stopped half way; leave the key out to go on, or delete "
            "the directory to start anew"
        )
    if checkpoint:
        tell(f"going on from {checkpoint}")
    return Earlier(checkpoint, selection)


def _end_or_last(run: Run, directory: Path) -> str | None:
    """The directory itself, if the adapter in it is the trained one, or else its last whole checkpoint."""
    if is_saved(run, directory):
        return str(directory)
    found = last_checkpoint(directory)
    return None if found is None else str(found)


def is_saved(run: Run, directory: Path) -> bool:
    """Whether the adapter that lies in the directory is the trained one."""
    return (directory / SAFETENSORS_WEIGHTS_NAME).is_file() and is_trained(run, read_state(directory))


def is_trained(run: Run, state: Mapping[str, Any]) -> bool:
    """Whether a trainer's state is one that has come to the end of the run."""
    if run.trainer.max_steps > 0:
        return state.get("global_step", 0) >= run.trainer.max_steps
    return (state.get("epoch") or 0) >= run.trainer.num_train_epochs


def _checkpoint(directory: Path, wanted: bool | str, earlier: dict | None, run: Run) -> str:
    found = wanted
    if wanted is True:
        same = earlier is not None and not _differences(earlier, run.resolved)
        found = _end_or_last(run, directory) if same else last_checkpoint(directory)
    if found is None:
        raise ConfigError(
            f"{_RESUME}: there is no checkpoint in {directory}; leave the key out to start anew (and set "
            "save_steps to have checkpoints)"
        )
    if not Path(found).is_dir():
        raise ConfigError(f"{_RESUME}: there is no checkpoint at {found}; say true for the last one in output_dir")
    if Path(found) != directory and not is_whole(Path(found)):
        raise ConfigError(f"{_RESUME}: {found} is not whole, a save or a copy was stopped half way; name another one")
    if not (directory / SELECTION).is_file():
        raise ConfigError(
            f"{_RESUME}: {directory} has no {SELECTION}, which says what the checkpoint's weights are; "
            "restore it, or start anew"
        )
    changed = _differences(earlier or {}, run.resolved)
    ours = {*RunConfig.__annotations__, *BLOCKS}
    fixed = [change for change in changed if change.split(":")[0].split(".")[0] in ours]
    if earlier is not None and fixed:
        raise ConfigError(
            f"{_RESUME}: the run in {directory} differs ({'; '.join(fixed[:3])}); set these keys back, "
            "or choose another output_dir to start anew"
        )
    for change in changed if earlier is not None else ():
        tell(f"resuming with {change}")
    return str(found)


def _read_run(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"output_dir: {path} is damaged ({error}); choose another output_dir") from error


def _differences(earlier: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    changed = []
    for key in sorted(earlier.keys() | now.keys()):
        before, after = earlier.get(key), now.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            changed += _differences(before, after, f"{prefix}{key}.")
        elif before != after and key != _RESUME:
            changed.append(f"{prefix}{key}: {before!r} there, {after!r} now")
    return changed


def write_text(path: Path, text: str) -> None:
    """Write aside and rename, so that a run killed here leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    aside.write_text(text, encoding="utf-8")
    sync(aside)
    aside.replace(path)


def write_run(run: Run) -> None:
    """Save the resolved keys as a YAML that `smt train` reads; a run resumed after its end is finished no longer."""
    directory = Path(run.trainer.output_dir)
    if (directory / METRICS).exists():
        (directory / METRICS).replace(directory / UNFINISHED)
    settings = {key: value for key, value in run.resolved.items() if key != _RESUME}
    if _read_run(directory / RUN) not in (None, settings):
        # A comparison begun with other settings is none with this run.
        shutil.rmtree(directory / LORA, ignore_errors=True)
    write_text(directory / RUN, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))


def write_metrics(directory: Path, metrics: Mapping[str, Any], finished: bool) -> None:
    """Save the numbers; it is `metrics.json`, written last of all files, that makes a run a finished one."""
    write_text(directory / (METRICS if finished else UNFINISHED), json.dumps(metrics, indent=2) + "\n")
    if finished:
        (directory / UNFINISHED).unlink(missing_ok=True)


def write_labels(directory: Path, labels: Mapping[int, str]) -> None:
    write_text(directory / LABELS, json.dumps(labels, indent=2, ensure_ascii=False) + "\n")


def save_adapter(model, tokenizer, state: TrainerState, directory: Path, first: bool) -> None:
    """Save adapter, tokenizer and the trainer's state aside, then move each file into `directory`, the state last.

    Of a sharded model every process must call this; the `first` writes, and the others take part in the gathering.
    """
    if not first:
        for name in model.peft_config:
            get_peft_model_state_dict(model, adapter_name=name)
        return
    aside = directory / "adapter.part"
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    state.save_to_json(str(aside / TRAINER_STATE_NAME))
    for file in sorted(aside.iterdir(), key=lambda file: (file.name == TRAINER_STATE_NAME, file.name)):
        sync(file)
        os.replace(file, directory / file.name)
    aside.rmdir()
