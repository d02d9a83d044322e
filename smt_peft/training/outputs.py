"""The output directory of a run: what lies in it, whether a run may use it, and files that are never half written."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from peft import get_peft_model_state_dict
from transformers.trainer_utils import get_last_checkpoint

from ..report.files import METRICS, RUN, SELECTION, UNFINISHED
from .errors import ConfigError
from .keys import RunConfig
from .schema import Run
from .tell import tell

REPORT, PICTURE = "report.md", "blocks.png"
_FOREIGN = re.compile(r"checkpoint-\d+|adapter_.*|config\.json|.*\.(safetensors|bin|pt)")
_RESUME = "resume_from_checkpoint"


def check_output_dir(run: Run) -> str | None:
    """Refuse an output directory that holds another run, before anything is written.

    Returns:
        The checkpoint to resume from, or None to start anew.

    Raises:
        ConfigError: names the key and the repair.
    """
    directory = Path(run.trainer.output_dir)
    wanted = run.resolved.get(_RESUME) or None
    if directory.exists() and not directory.is_dir():
        raise ConfigError(f"output_dir: {directory} is a file; name a directory")
    earlier = _read_run(directory / RUN)
    if wanted:
        return _checkpoint(directory, wanted, earlier, run)
    if earlier is None:
        foreign = sorted(
            path.name for path in directory.glob("*") if _FOREIGN.fullmatch(path.name) and path.name != SELECTION
        )
        if foreign:
            raise ConfigError(
                f"output_dir: {directory} holds {foreign[0]} but no {RUN}, so it belongs to something "
                "else; choose another output_dir"
            )
        return None
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
    checkpoint = get_last_checkpoint(directory)
    if (directory / UNFINISHED).exists():
        again = f"; repeat them with {_RESUME}=true, or" if checkpoint else "; choose another output_dir, or"
        raise ConfigError(
            f"output_dir: {directory} holds this run, trained and saved, but its verification or comparison failed or "
            f"was stopped ({UNFINISHED} has the numbers so far){again} delete that run to start anew"
        )
    if checkpoint:
        raise ConfigError(
            f"output_dir: {directory} holds this run, stopped half way; go on with "
            f"{_RESUME}=true, or delete it to start anew"
        )
    return None


def _checkpoint(directory: Path, wanted: bool | str, earlier: dict | None, run: Run) -> str:
    found = wanted
    if wanted is True:
        found = get_last_checkpoint(directory) if directory.is_dir() else None
    if found is None:
        raise ConfigError(
            f"{_RESUME}: there is no checkpoint in {directory}; leave the key out to start anew (and set "
            "save_steps to have checkpoints)"
        )
    if not Path(found).is_dir():
        raise ConfigError(f"{_RESUME}: there is no checkpoint at {found}; say true for the last one in output_dir")
    if not (directory / SELECTION).is_file():
        raise ConfigError(
            f"{_RESUME}: {directory} has no {SELECTION}, which says what the checkpoint's weights are; "
            "restore it, or start anew"
        )
    changed = _differences(earlier or {}, run.resolved)
    ours = {*RunConfig.__annotations__, "smt"}
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
    aside.replace(path)


def write_run(run: Run) -> None:
    """Save the resolved keys as a YAML that `smt train` reads; a run resumed after its end is finished no longer."""
    directory = Path(run.trainer.output_dir)
    if (directory / METRICS).exists():
        (directory / METRICS).replace(directory / UNFINISHED)
    settings = {key: value for key, value in run.resolved.items() if key != _RESUME}
    write_text(directory / RUN, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))


def write_metrics(directory: Path, metrics: Mapping[str, Any], finished: bool) -> None:
    """Save the numbers; it is `metrics.json`, written last of all files, that makes a run a finished one."""
    write_text(directory / (METRICS if finished else UNFINISHED), json.dumps(metrics, indent=2) + "\n")
    if finished:
        (directory / UNFINISHED).unlink(missing_ok=True)


def trained_seconds(directory: Path) -> float:
    """How long the training of an unfinished run took; 0 where that is not known."""
    try:
        return float(json.loads((directory / UNFINISHED).read_text(encoding="utf-8"))["after"]["seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0.0


def save_adapter(model, tokenizer, directory: Path, first: bool) -> None:
    """Save adapter and tokenizer aside, then move each file into `directory`.

    Of a sharded model every process must call this; the `first` writes, and the others take part in the gathering.
    """
    if not first:
        for name in model.peft_config:
            get_peft_model_state_dict(model, adapter_name=name)
        return
    aside = directory / "adapter.part"
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    for file in sorted(aside.iterdir()):
        os.replace(file, directory / file.name)
    aside.rmdir()
