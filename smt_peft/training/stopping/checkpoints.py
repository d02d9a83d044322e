"""Checkpoints that are whole or are not there: written aside, synced, listed and renamed; renamed before deletion.

A directory `checkpoint-N` holds `contents.json`, the size of every file in it, so that one that has lost a file since,
to a deletion or a copy that was stopped half way, is not resumed from.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME

from ...export.aside import sync

CONTENTS = "contents.json"
# What is being written, and what is being deleted. Neither is looked into; the next start removes both.
SAVING, DELETING = "saving.part", "deleting.part"
_FULL = {errno.ENOSPC, errno.EDQUOT}
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def last_checkpoint(directory: Path) -> Path | None:
    """The latest whole checkpoint, or None."""
    return next((path for path in reversed(_numbered(directory)) if is_whole(path)), None)


def is_whole(checkpoint: Path) -> bool:
    """Whether every file is there that was written. Of one without a list, its last file is asked for."""
    try:
        if (checkpoint / CONTENTS).exists():
            sizes = json.loads((checkpoint / CONTENTS).read_text(encoding="utf-8"))
            return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
        return isinstance(json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8")), dict)
    except (OSError, ValueError, AttributeError):
        return False


def publish(aside: Path, checkpoint: Path) -> None:
    """Make what was written in `aside` the checkpoint; one of that name is replaced.

    Raises:
        OSError: the disk is full or gone; the checkpoint is then not there, or the former one is.
    """
    sizes = {str(file.relative_to(aside)): file.stat().st_size for file in _files(aside)}
    (aside / CONTENTS).write_text(json.dumps(sizes, indent=1), encoding="utf-8")
    # The rename may reach the disk before the files do, and a machine lose its power between the two.
    for file in _files(aside):
        sync(file)
    for folder, *_ in os.walk(aside):
        sync(Path(folder))
    if checkpoint.exists():
        discard(checkpoint)
    aside.rename(checkpoint)
    sync(checkpoint.parent)


def discard(path: Path) -> None:
    """Delete a directory, which loses its name first."""
    grave = path.parent / DELETING
    grave.mkdir(exist_ok=True)
    path.rename(grave / path.name)
    shutil.rmtree(grave, ignore_errors=True)


def prune(directory: Path, limit: int | None, kept: set[Path]) -> None:
    """Discard the earliest checkpoints until there are `limit`; those in `kept` stay. None: as many as there are."""
    present = _numbered(directory)
    spare = [path for path in present if path not in kept]
    for path in spare[: max(0, len(present) - limit)] if limit else ():
        discard(path)


def clean(directory: Path) -> None:
    """Remove what a run killed here was writing or deleting."""
    for path in directory.glob("*.part"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def is_full(error: BaseException | None, directory: Path) -> bool:
    """Whether an error, or what it came from, is for want of room; ask before anything is removed.

    Libraries in other languages have but words for it, and PyTorch's writer not even these.
    """
    while error is not None:
        if getattr(error, "errno", None) in _FULL or "No space left" in str(error) or "quota" in str(error):
            return True
        error = error.__cause__
    return directory.is_dir() and shutil.disk_usage(directory).free < 2**20


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The trainer's state of a checkpoint; empty when it cannot be read."""
    try:
        return json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _numbered(directory: Path) -> list[Path]:
    found = [path for path in directory.glob("checkpoint-*") if _CHECKPOINT.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(_CHECKPOINT.fullmatch(path.name)[1]))


def _files(directory: Path) -> Iterator[Path]:
    return (path for path in sorted(directory.rglob("*")) if path.is_file())
