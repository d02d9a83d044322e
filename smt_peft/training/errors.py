"""Errors a user can repair: printed without a traceback by the command line."""

import signal


class ConfigError(ValueError):
    """A YAML, a data file or an output directory that cannot be used; the message says where and how to mend it."""


class VerificationError(RuntimeError):
    """What was saved is not what was trained."""


class StoppedError(RuntimeError):
    """A run could not go on; the message says why, what is saved, and how to go on."""


class DiskFullError(StoppedError):
    """Something could not be written for want of room."""


class DivergedError(StoppedError):
    """A loss or a weight became infinite or no number; from the same settings the run would only come there again."""


class Interrupted(KeyboardInterrupt):
    """A signal ended a run; the message says what is saved and how to go on.

    Args:
        message: what to tell the user.
        signal_number: SIGINT is Ctrl-C, SIGTERM what clusters send.
    """

    def __init__(self, message: str, signal_number: int = signal.SIGINT):
        super().__init__(message)
        self.signal_number = signal_number
