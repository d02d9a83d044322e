"""Rows that cannot be used: the first one stops the run, or all are left out, counted and told."""

from __future__ import annotations

from ..errors import ConfigError

STOP, SKIP = "stop", "skip"
SHOWN = 3


class Broken:
    """The broken rows of a set.

    Args:
        policy: `"stop"`: `add` raises; `"skip"`: it counts, and keeps the first places.
    """

    def __init__(self, policy: str = STOP):
        self.policy, self.count, self.first = policy, 0, []

    def add(self, place: str, fault: str) -> None:
        """Note a row.

        Raises:
            ConfigError: broken rows stop the run.
        """
        if self.policy == STOP:
            raise ConfigError(f"{place}: {fault}; mend or drop the row, or leave such rows out: on_broken_row: skip")
        self.count += 1
        if len(self.first) < SHOWN:
            self.first.append(f"{place}: {fault}")

    def __str__(self) -> str:
        """`, 5 rows skipped (a.jsonl, line 3: ...; ...)`, or nothing."""
        if not self.count:
            return ""
        more = "; ..." if self.count > len(self.first) else ""
        return f", {self.count:,} row{'s' * (self.count > 1)} skipped ({'; '.join(self.first)}{more})"
