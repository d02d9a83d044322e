"""Ctrl-C, and the SIGTERM of a cluster: the first asks a training to stop after its step, the second stops at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..errors import Interrupted

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def name(number: int) -> str:
    """As a user knows it."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


class Request:
    """A wish to stop; `number` is that of the signal, 0 while there is none."""

    def __init__(self):
        self.number = 0


@contextmanager
def interrupting() -> Iterator[None]:
    """SIGTERM ends what runs inside as Ctrl-C does."""

    def handle(number, frame):
        raise Interrupted(f"stopped by {name(number)}", number)

    with _handled((signal.SIGTERM,), handle):
        yield


@contextmanager
def requesting() -> Iterator[Request]:
    """Inside, the first signal is noted for the next step boundary; another one ends it there and then."""
    request = Request()

    def handle(number, frame):
        if request.number:
            raise Interrupted(f"stopped by a second {name(number)}, at once", number)
        request.number = number
        if os.environ.get("RANK", "0") == "0":
            # Not by `print`, which may be what was interrupted.
            os.write(2, f"\n{name(number)}: the run stops at the next step boundary; once more, at once\n".encode())

    with _handled(_SIGNALS, handle):
        yield request


@contextmanager
def _handled(numbers: tuple[int, ...], handle: Callable) -> Iterator[None]:
    # Python lets no other thread have a say in signals.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()

    def handle_here(number, frame):
        if os.getpid() == owner:
            handle(number, frame)
        elif number == signal.SIGTERM:
            # Forked: a worker that loads data. Ctrl-C reaches it too, and is the parent's affair.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    former = {number: signal.signal(number, handle_here) for number in numbers}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
