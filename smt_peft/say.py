"""What the package tells its user: single lines on the logger `smt_peft`."""

from __future__ import annotations

import logging
import os
import sys

logger = logging.getLogger("smt_peft")
_said: set[str] = set()


def say(message: str) -> None:
    """Log one line at level INFO; on stderr where the application has configured no logging.

    Of several processes the first alone speaks; `torchrun` and its kin number them in `RANK`.

    `logging.getLogger("smt_peft").setLevel(logging.WARNING)` silences it.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    if logger.hasHandlers():
        logger.info(message)
    elif logger.level <= logging.INFO:
        print(message, file=sys.stderr)


def once(message: str) -> None:
    """`say`, but a given line only once per process."""
    if message not in _said:
        _said.add(message)
        say(message)
