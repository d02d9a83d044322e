"""A Python that has this environment's packages, but neither this package nor PEFT."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ABSENT = ("peft", "smt_peft", "smt_main", "__editable__", "setup")
PRELUDE = """
import importlib.util, sys
assert not sys.flags.no_user_site or sys.flags.isolated
for name in ("smt_peft", "peft"):
    assert importlib.util.find_spec(name) is None, name
"""


def site_without(directory: Path, *kept: str) -> Path:
    """A site directory with links to all installed packages but those.

    Args:
        directory: where to make it.
        kept: names of `ABSENT` that stay.
    """
    site = directory / "site"
    site.mkdir(parents=True)
    for path in map(Path, sys.path):
        if path.name not in ("site-packages", "dist-packages"):
            continue
        for entry in path.iterdir():
            name = entry.name.split("-")[0].lower()
            left_out = entry.suffix == ".pth" or (name.startswith(ABSENT) and name not in kept)
            if not left_out and not (site / entry.name).exists():
                (site / entry.name).symlink_to(entry)
    return site


def run_plain(site: Path, code: str, *arguments: object, prelude: str = PRELUDE) -> subprocess.CompletedProcess:
    """Run code there; -I and -S keep out every other place that modules could come from."""
    code = f"import sys; sys.path.append({str(site)!r})\n{prelude}\n{code}"
    return subprocess.run(
        [sys.executable, "-I", "-S", "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False
    )
