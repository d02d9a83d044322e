"""The YAML of a run: TRL's `SFTConfig` names and a few of our own, flat, one `smt:` block of `SMTConfig` names, and
a block for each schedule.

Every key is checked before anything is loaded, and all errors are reported at once, each with its line.
"""

from __future__ import annotations

import difflib
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from ...config import SMTConfig
from ...schedules import SCHEDULES, Schedule
from ..tell import tell
from .aliases import ALIASES, REFUSED, translate
from .checks import (
    check_files,
    check_mezo,
    check_optim,
    check_presence,
    check_quantisation,
    check_schedules,
    check_task,
)
from .keys import (
    AUTO,
    BLOCKS,
    MEZO,
    SMT_OPTIMIZERS,
    TASK_TYPES,
    TRAINER_OPTIMIZERS,
    TRAINERS,
    WITHOUT_GRADIENTS,
    RunConfig,
    Warmup,
    is_ineffective,
    known_keys,
    tasks_with,
)
from .read import read_yaml
from .source import Errors, Source
from .values import faults


@dataclass
class Run:
    """A checked run.

    Args:
        config: our own keys.
        trainer: the settings of the task's trainer, built.
        smt: the tuner's settings, its `selection` still None.
        selection: `"auto"`, or the path of a selection file, or those of several.
        warmup_batches: batches of the warm-up pass, with `selection="auto"`.
        resolved: every key that was given, interpolations and overrides applied, and every default of ours.
        source: where each key stands.
        state_dtype: of `SMTAdamW`; None: the optimizer is another.
        schedules: what changes while the blocks train.
        forward_only: whether the optimizer is `MeZO`, so that there is no backward pass.
    """

    config: RunConfig
    trainer: TrainingArguments
    smt: SMTConfig
    selection: str | list[str]
    warmup_batches: int
    resolved: dict[str, Any]
    source: Source
    state_dtype: str | None = None
    schedules: tuple[Schedule, ...] = ()
    forward_only: bool = False


def load_run(path: str | Path, overrides: Sequence[str] = ()) -> Run:
    """Read a YAML, apply `key=value` overrides (`smt.density=0.02` reaches into the block), and check all of it.

    Raises:
        ConfigError: lists every error with its line and the repair.
    """
    settings, source = read_yaml(Path(path), overrides)
    errors = Errors(source)
    flat, notices = translate(_flatten(settings, errors), errors)
    task = flat.get("task")
    task = task if isinstance(task, str) and task in TRAINERS else "sft"
    known = known_keys(task)
    good = {key: value for key, value in flat.items() if _check(key, value, known, errors, task)}
    check_task(task, good, errors)
    check_presence(flat, errors)
    check_quantisation(good, errors)
    check_files(task, good, errors)
    ours = {key for key in good if key in RunConfig.__dataclass_fields__}
    blocks = {name: _inside(name, good) for name in BLOCKS}
    block = blocks.pop("smt")
    warmup = Warmup(**{key: block.pop(key) for key in ("selection", "warmup_batches") if key in block})
    trainer = {key: value for key, value in good.items() if key not in ours and key.partition(".")[0] not in BLOCKS}
    smt = _build(lambda given: SMTConfig(task_type=TASK_TYPES[task], **given), block, "smt", errors)
    given = [name for name in SCHEDULES if settings.get(name) is not None]
    schedules = [
        _build(lambda given, kind=SCHEDULES[name]: kind(**given), blocks[name], name, errors) for name in given
    ]
    check_optim(trainer, errors)
    check_schedules([schedule for schedule in schedules if schedule is not None], smt, trainer, errors)
    check_mezo(good, smt is not None and smt.needs_data and warmup.selection == AUTO, given, errors)
    forward_only = trainer.get("optim") == MEZO
    theirs = {key: value for key, value in trainer.items() if key != "optim" or value in TRAINER_OPTIMIZERS}
    arguments = _build(lambda given: TRAINERS[task](**_with_defaults(given, forward_only)), theirs, "", errors)
    errors.raise_any()
    for notice in notices:
        tell(notice)
    config = RunConfig(**{key: good[key] for key in ours})
    resolved = {
        **{field.name: getattr(config, field.name) for field in fields(config)},
        **trainer,
        "smt": {**vars(warmup), **block},
        **{schedule.name: asdict(schedule) for schedule in schedules},
    }
    state_dtype = SMT_OPTIMIZERS.get(trainer.get("optim"))
    given = config, arguments, smt, warmup.selection, warmup.warmup_batches, resolved, source
    return Run(*given, state_dtype, tuple(schedules), forward_only)


def _flatten(settings: dict[str, Any], errors: Errors) -> dict[str, Any]:
    flat = {str(key): value for key, value in settings.items() if key not in BLOCKS}
    for name in BLOCKS:
        block = settings.get(name)
        if isinstance(block, Mapping):
            flat |= {f"{name}.{key}": value for key, value in block.items()}
        elif block is not None:
            example = "density: 0.01, ..." if name == "smt" else "{} takes the defaults"
            errors.add(name, f"{name} is a block of settings ({example}), got {block!r}")
    # YAML 1.1 reads a bare `no` as false.
    return {key: "no" if value is False and key.endswith("_strategy") else value for key, value in flat.items()}


def _inside(block: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a block by their names in it."""
    return {key.removeprefix(f"{block}."): value for key, value in values.items() if key.startswith(f"{block}.")}


def _check(key: str, value: Any, known: Mapping[str, Any], errors: Errors, task: str) -> bool:
    if key not in known:
        errors.add(key, f"unknown key {key!r}" + (_elsewhere(key, task) or _hint(key, known, task)))
        return False
    found = faults(key, value, known[key])
    for place, message in found:
        errors.add(place, message)
    return not found


def _elsewhere(key: str, task: str) -> str:
    """For which tasks a key is, if it is for another than that of the run."""
    others = tasks_with(key)
    if not others or is_ineffective(key, task):
        return ""
    return f" for task: {task}; it is a key of task: {' and task: '.join(others)}, leave it out or set that task"


def _hint(key: str, known: Mapping[str, Any], task: str) -> str:
    if is_ineffective(key, task):
        return "; it has no effect here, leave it out"
    for name in (f"smt.{key}", key.removeprefix("smt.")):
        if name in known:
            return f"; did you mean {name!r}? {'It belongs in' if '.' in name else 'It stays out of'} the smt: block"
    near = next(iter(difflib.get_close_matches(key.removeprefix("smt."), [*ALIASES, *REFUSED], n=1, cutoff=0.85)), None)
    near = near or next(iter(difflib.get_close_matches(key, known, n=1)), None)
    if near in REFUSED:
        return f"; {REFUSED[near].replace('<value>', 'N')}"
    near = ALIASES[near].key if near in ALIASES else near
    return f"; did you mean {near!r}?" if near else f"; neither {_owner(task)}, nor this run, nor smt: has it"


def _owner(task: str) -> str:
    """Whose the keys of a task's trainer are."""
    owner = TRAINERS[task]
    return f"TRL's {owner.__name__}" if owner.__module__.startswith("trl.") else "Transformers' TrainingArguments"


def _with_defaults(given: Mapping[str, Any], forward_only: bool) -> dict[str, Any]:
    """TRL trains in bf16 by default, which a CPU refuses unless told `use_cpu`, and checkpoints activations."""
    cuda = torch.cuda.is_available() and not given.get("use_cpu")
    # Without the filter a loss that is not finite stops the run; with it the host waits for the device at every loss.
    # A bar that is drawn again and again is for a terminal; a file gets a line per log.
    quiet = {"logging_nan_inf_filter": False} | ({} if sys.stderr.isatty() else {"disable_tqdm": True})
    values = {"dataloader_pin_memory": cuda, **quiet, **(WITHOUT_GRADIENTS if forward_only else {}), **given}
    if given.get("bf16") is None and not given.get("fp16"):
        values["bf16"] = cuda
    if (values.get("bf16") or values.get("fp16")) and not cuda:
        values["use_cpu"] = True
    # What to resume from is looked up when the run starts.
    values.pop("resume_from_checkpoint", None)
    return values


def _build(build, given: Mapping[str, Any], prefix: str, errors: Errors) -> Any:
    """Construct a config, and lay what it refuses to the key it speaks of."""
    try:
        with warnings.catch_warnings():
            # TRL sets `gradient_checkpointing` itself, so transformers' notice of its new name is not the user's.
            warnings.filterwarnings("ignore", ".*gradient_checkpointing.* is deprecated", FutureWarning)
            return build(dict(given))
    except (ValueError, TypeError, ImportError, NotImplementedError) as error:
        message = str(error)
        key = ".".join(filter(None, (prefix, *_guilty(given, message))))
        errors.add(key, f"{key}: {message}" if key else message)
        return None


def _guilty(given: Mapping[str, Any], message: str) -> list[str]:
    """The key that a message speaks of, and the entry inside its map, if it speaks of one."""
    key = next((key for key in given if _mentions(message, key)), None)
    key = key or next((key for key, value in given.items() if _mentions(message, value)), None)
    entries = given.get(key) if isinstance(given.get(key), Mapping) else ()
    return [part for part in (key, next((str(name) for name in entries if _mentions(message, name)), None)) if part]


def _mentions(message: str, word: Any) -> bool:
    return re.search(rf"(?<!\w){re.escape(str(word))}(?!\w)", message) is not None
