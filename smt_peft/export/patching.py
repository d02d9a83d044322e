"""Writing a patch into a checkpoint on disk, in place, and taking it out again, to the byte.

Nothing but the patched elements changes. Before the first is written a journal says what is under way, and it goes
when the result has been proven by its hashes. A process that is killed between leaves every element as it was or as it
will be, so that writing all of them again, either way, ends in one of the two checkpoints.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal, TextIO

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..say import say
from .aside import sync
from .checkpoint import JOURNAL, Checkpoint, StoredTensor
from .patch import Patch, PatchedTensor, stored

Pairs = list[tuple[PatchedTensor, StoredTensor]]

# Elements closer than this are written by one call, with those between them as they are: single columns of a large
# matrix would otherwise be millions of calls. Not through a memory map, which a full disk turns into a signal.
WINDOW = 1 << 20


def apply_patch(patch: str | Path, checkpoint: str | Path) -> Patch:
    """Make the checkpoint in a directory the merged one.

    Args:
        patch: as `export_patch` wrote it.
        checkpoint: directory of the base; its files are written, so nobody else may be reading them.

    Raises:
        FileNotFoundError: there is no such patch or checkpoint.
        OSError: the files cannot be written; a process that ended within says how to go on.
        ValueError: the patch is in already, is not of this checkpoint, or the files are shared with others. Nothing has
            been written then.
    """
    return _write(Patch.open(patch), Path(checkpoint), "apply")


def revert_patch(patch: str | Path, checkpoint: str | Path) -> Patch:
    """Make the checkpoint what it was before `apply_patch`, byte for byte; raises as that does."""
    return _write(Patch.open(patch), Path(checkpoint), "revert")


def _write(patch: Patch, directory: Path, action: Literal["apply", "revert"]) -> Patch:
    if not directory.is_dir():
        raise FileNotFoundError(f"there is no checkpoint at {directory}; pass the directory of its config.json")
    checkpoint = Checkpoint.open(directory, journal=True)
    pairs = list(stored(patch, checkpoint))
    _check_files({theirs.file for _, theirs in pairs}, directory)
    journal = directory / JOURNAL
    with _held(journal) as file:
        if _says(file, patch):
            say(f"going on where a process ended: {action} {patch.file}")
        else:
            try:
                found = [theirs.sha256() for _, theirs in tqdm(pairs, desc="checking", unit="tensor", disable=None)]
                _check_hashes(patch, directory, found, action)
            except BaseException:
                journal.unlink()
                raise
            _say(file, patch, directory)
        _put_all(patch, pairs, action, directory)
        _prove(pairs, action)
        journal.unlink(missing_ok=True)
        sync(directory)
    return patch


def _check_files(files: set[Path], directory: Path) -> None:
    """Raise unless these are plain files of this directory alone, that may be written."""
    for file in sorted(files):
        links = "a symbolic link" if file.is_symlink() else "a hard link" if file.stat().st_nlink > 1 else None
        if links:
            raise ValueError(
                f"{file} is {links}, such as the Hub's cache has, so that others read the same bytes; copy the "
                f"checkpoint (cp -rL {directory} COPY) and patch the copy. Nothing was written"
            )
    for place in (*sorted(files), directory):
        if not os.access(place, os.W_OK):
            raise PermissionError(f"{place} may not be written; nothing was changed. Patch a copy, or change its mode")


def _check_hashes(patch: Patch, directory: Path, found: list[str], action: str) -> None:
    """Raise unless every tensor is as it is before `apply`, or after it for `revert`."""
    before, after = ([getattr(tensor, when) for tensor in patch.tensors] for when in ("before", "after"))
    if found == (before if action == "apply" else after):
        return
    if found == (after if action == "apply" else before):
        raise ValueError(f"{patch.file} is {'in' if action == 'apply' else 'not in'} {directory}; nothing was written")
    name = next(
        tensor.name for tensor, theirs, expected in zip(patch.tensors, found, before, strict=True) if theirs != expected
    )
    raise ValueError(
        f"{name} in {directory} is not the tensor that {patch.file} was made for: another base, or another patch is "
        "in it; nothing was written"
    )


@contextmanager
def _held(journal: Path) -> Iterator[TextIO]:
    """The journal, made if there is none, and locked: of two processes at once, one is refused."""
    with journal.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(
                error.errno, f"another process is patching {journal.parent} now; wait for its end"
            ) from error
        yield file


def _says(file: TextIO, patch: Patch) -> bool:
    """Whether a process ended while it was writing this patch.

    Raises:
        ValueError: it was another patch.
    """
    file.seek(0)
    try:
        content: dict[str, Any] = json.loads(file.read())
        same, other = content["sha256"] == patch.sha256, content["patch"]
    except (ValueError, KeyError, TypeError):
        # New, or cut off before its own end: so before the first element, which the hashes are to say.
        return False
    if not same:
        raise ValueError(
            f"another patch, {other}, was being written when its process ended; run smt patch apply or smt patch "
            "revert with that one first. Nothing was written"
        )
    return True


def _say(file: TextIO, patch: Patch, directory: Path) -> None:
    file.truncate(0)
    file.write(json.dumps({"patch": str(patch.file.absolute()), "sha256": patch.sha256}) + "\n")
    file.flush()
    os.fsync(file.fileno())
    sync(directory)


def _put_all(patch: Patch, pairs: Pairs, action: str, directory: Path) -> None:
    try:
        for tensor, theirs in tqdm(pairs, desc=action, unit="tensor", disable=None):
            index, old, new = patch.changes(tensor)
            _put(theirs, index, new if action == "apply" else old)
        for file in {theirs.file for _, theirs in pairs}:
            sync(file)
    except BaseException as error:
        why = (
            f"stopped while writing into {directory} ({error or type(error).__name__}), which is neither the old nor "
            f"the new checkpoint now: smt patch apply {patch.file} {directory} finishes, smt patch revert {patch.file} "
            f"{directory} takes back what was written"
        )
        if isinstance(error, OSError):
            raise OSError(error.errno, why) from error
        say(why)
        raise


def _prove(pairs: Pairs, action: str) -> None:
    for tensor, theirs in pairs:
        if theirs.sha256() != (tensor.after if action == "apply" else tensor.before):
            raise ValueError(
                f"{tensor.name} in {theirs.file} is not what it should be after writing: something else has changed it "
                "since the patch was made, or the disk is failing; restore the checkpoint from its source"
            )


def _put(tensor: StoredTensor, index: Tensor, values: Tensor) -> None:
    """Write elements of a stored tensor: between the first and the last of a window what lies between, as it is."""
    size = values.dtype.itemsize
    window = index * size // WINDOW
    _, counts = torch.unique_consecutive(window, return_counts=True)
    with tensor.file.open("r+b", buffering=0) as file:
        for places, wanted in zip(index.split(counts.tolist()), values.split(counts.tolist()), strict=True):
            first, last = int(places[0]), int(places[-1])
            buffer = _read(file, tensor.begin + first * size, (last - first + 1) * size)
            torch.frombuffer(buffer, dtype=values.dtype)[places - first] = wanted
            _write_all(file, tensor.begin + first * size, buffer)


def _read(file: BinaryIO, place: int, size: int) -> bytearray:
    return bytearray(os.pread(file.fileno(), size, place))


def _write_all(file: BinaryIO, place: int, content: bytearray) -> None:
    view = memoryview(content)
    while view:
        written = os.pwrite(file.fileno(), view, place)
        place, view = place + written, view[written:]
