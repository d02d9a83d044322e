"""Output that is whole or not there: written beside its place, and renamed into it at the end."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..say import say


@contextmanager
def directory_aside(out: Path, nbytes: int = 0) -> Iterator[Path]:
    """A new directory to write into, which becomes `out` when the context ends well, and else is removed.

    Args:
        out: new or empty.
        nbytes: what is going to be written at least; less room on the disk is told before the first byte.

    Raises:
        FileExistsError: `out` exists and is not empty.
        OSError: there is no room, or no leave to write there; says how to go on.
    """
    check_new_directory(out)
    aside = _beside(out)
    with _told(out, aside):
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        # Left by a process that was killed.
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        _check_room(aside, nbytes)
        yield aside
        for file in aside.iterdir():
            sync(file)
        if out.exists():
            out.rmdir()
        aside.rename(out)


@contextmanager
def file_aside(out: Path) -> Iterator[Path]:
    """The same for one file, which must not exist."""
    check_new_file(out)
    aside = _beside(out)
    with _told(out, aside):
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        yield aside
        sync(aside)
        aside.rename(out)


def check_new_directory(out: Path) -> None:
    """Raise `FileExistsError` unless a directory can be made there, or is there and empty."""
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise FileExistsError(f"{out} exists and is not empty; choose a new directory")


def check_new_file(out: Path) -> None:
    """Raise `FileExistsError` when something is there."""
    if out.exists() or out.is_symlink():
        raise FileExistsError(f"{out} exists; choose a new name")


def sync(path: Path) -> None:
    """Have the disk hold what was written to a file, or into a directory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        # Some network file systems know no such thing for directories.
        if not path.is_dir():
            raise
    finally:
        os.close(handle)


def _beside(out: Path) -> Path:
    return out.absolute().with_name(f".{out.absolute().name}.smt-part")


def _check_room(aside: Path, nbytes: int) -> None:
    free = shutil.disk_usage(aside).free
    if free < nbytes:
        raise OSError(errno.ENOSPC, f"{nbytes / 2**30:.2f} GiB are needed and {free / 2**30:.2f} GiB free")


@contextmanager
def _told(out: Path, aside: Path) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        if aside.is_dir():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(
                error.errno,
                f"no space left for {out} ({error.strerror}); nothing was kept of it: free some, or choose a place on "
                "another disk, and run the same again",
            ) from error
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise OSError(error.errno, f"{out} cannot be written ({error}); choose another place") from error
        if isinstance(error, KeyboardInterrupt):
            say(f"interrupted: nothing was kept of {out}; run the same again")
        raise
