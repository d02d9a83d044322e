"""Numbers as they are read."""

from __future__ import annotations

_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def percent(share: float) -> str:
    """`0.0084` as `0.84%`, `0.123` as `12.3%`."""
    if share in (0, 1):
        return f"{share:.0%}"
    # Nothing short of everything is to read as everything.
    if 0.9995 <= share < 1:
        return ">99.9%"
    return f"{share:.1%}" if share >= 0.09995 else f"{share:.2%}" if share >= 0.00005 else f"{100 * share:.1e}%"


def size(number: int) -> str:
    """Bytes in the unit that leaves one to four digits before the point."""
    name = next((name for name, factor in reversed(_UNITS.items()) if number >= factor), "B")
    return f"{number} B" if name == "B" else f"{number / _UNITS[name]:.1f} {name}"


def duration(seconds: float) -> str:
    """`3725` as `1 h 02 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{seconds / 60:.1f} min"
