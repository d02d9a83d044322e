"""Errors a user can repair: printed without a traceback by the command line."""


class ConfigError(ValueError):
    """A YAML, a data file or an output directory that cannot be used; the message says where and how to mend it."""


class VerificationError(RuntimeError):
    """What was saved is not what was trained."""
