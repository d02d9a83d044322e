"""One run at a time in an output directory."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import ConfigError

# Workers that load data notice within 5 s that their run was killed, and hold its lock until then.
PATIENCE = 10.0


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold a directory, which is made if there is none; the system lets go of it when this process ends, however.

    Raises:
        ConfigError: another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    new = not directory.exists()
    if new:
        directory.mkdir(parents=True)
    elif not directory.is_dir():  # which others complain of
        yield
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        until = time.monotonic() + PATIENCE
        while not _take(fcntl, handle):
            if time.monotonic() > until:
                raise ConfigError(f"output_dir: another run is at work in {directory}; let it end, or stop it first")
            time.sleep(0.2)
        yield
    finally:
        os.close(handle)
        if new:
            with suppress(OSError):  # Not empty, as a rule.
                directory.rmdir()


def _take(fcntl, handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # A file system without locks: it goes as it went before there were any.
    return True
