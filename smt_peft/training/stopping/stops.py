"""What a run that did not come to its end says: why, what is saved, and how to go on."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .. import outputs
from ..errors import DiskFullError, DivergedError, Interrupted, StoppedError
from ..yaml.schema import Run
from .checkpoints import is_full, last_checkpoint
from .lock import locked
from .signals import interrupting


def explained(verb: Callable[..., Any]) -> Callable[..., Any]:
    """Of a function of a run, `train` or `select`: what ends it from outside is raised with what is saved.

    Raises:
        Interrupted: a signal.
        DivergedError: losses or weights that are not finite.
        StoppedError: a file that could not be read or written.
        ConfigError: another run is at work in the output directory.
    """

    @wraps(verb)
    def explaining(run: Run, *args: Any, **kwargs: Any) -> Any:
        try:
            with interrupting(), _alone(run):
                return verb(run, *args, **kwargs)
        except Interrupted as stop:
            raise Interrupted(_ending(run, verb, str(stop)), stop.signal_number) from stop
        except KeyboardInterrupt as stop:
            raise Interrupted(_ending(run, verb, "stopped by Ctrl-C")) from stop
        except DivergedError as error:
            raise DivergedError(_diverged(run, str(error))) from error
        except (StoppedError, OSError, SafetensorError) as error:
            raise StoppedError(_ending(run, verb, _failure(run, error))) from error

    return explaining


def _alone(run: Run) -> AbstractContextManager[None]:
    """Of the processes of one run, the first holds the directory."""
    return locked(Path(run.trainer.output_dir)) if run.trainer.process_index == 0 else nullcontext()


def _ending(run: Run, verb: Callable, why: str) -> str:
    return f"{why}\n{_saved(run)}\n{_next(run, verb)}"


def _saved(run: Run) -> str:
    directory = Path(run.trainer.output_dir)
    if not directory.is_dir():
        return f"saved: nothing, there is no {directory}"
    names = [outputs.SELECTION] if (directory / outputs.SELECTION).exists() else []
    if checkpoint := last_checkpoint(directory):
        names.append(checkpoint.name)
    if outputs.is_saved(run, directory):
        names.append("the trained adapter")
    return f"saved in {directory}: {', '.join(names) or 'nothing yet'}"


def _next(run: Run, verb: Callable) -> str:
    directory = Path(run.trainer.output_dir)
    if outputs.is_saved(run, directory):
        what = "with what comes after the training"
    elif checkpoint := last_checkpoint(directory):
        what = f"from {checkpoint.name}"
    else:
        what = "from the start"
    return f"the same command goes on {what}: {_command(run, verb.__name__)}"


def _command(run: Run, verb: str, *more: str) -> str:
    given = [override for override in run.source.overrides if not override.startswith("resume_from_checkpoint=true")]
    return shlex.join(["smt", verb, run.source.path, *given, *more])


def _diverged(run: Run, why: str) -> str:
    rate = run.trainer.learning_rate
    checkpoint = last_checkpoint(Path(run.trainer.output_dir))
    precision = " Train in bf16 instead of fp16, whose range is small." if run.trainer.fp16 else ""
    advice = f"lower the learning_rate (it is {rate:g}), raise warmup_steps, or look for a broken row.{precision}"
    change = [f"learning_rate={rate / 2:g}"]
    if checkpoint is None:
        where = "from the start, after deleting the output directory"
    else:
        where, change = f"from {checkpoint.name}", ["resume_from_checkpoint=true", *change]
    return f"{why}\n{_saved(run)}\n{advice}\nto go on {where}: {_command(run, 'train', *change)}"


def _failure(run: Run, error: BaseException) -> str:
    directory = Path(run.trainer.output_dir)
    text = str(error) if isinstance(error, StoppedError) else f"stopped: {error}"
    if not (isinstance(error, DiskFullError) or is_full(error, directory)) or not directory.is_dir():
        return text
    free = shutil.disk_usage(directory).free / 2**20
    needed = _size(last_checkpoint(directory)) / 2**20
    room = f"; a checkpoint takes {needed:,.1f} MiB, and a new one is written before an old one goes" if needed else ""
    return f"{text}\nthe disk is full: {free:,.1f} MiB left in {directory}{room}. Free some room"


def _size(checkpoint: Path | None) -> int:
    return sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file()) if checkpoint else 0
