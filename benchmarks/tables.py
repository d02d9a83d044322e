"""Every table of README.md and docs/ that holds a measurement, made again from the JSON committed here.

    python -m benchmarks.tables            # writes them
    python -m benchmarks.tables --check    # says which differ, and exits with 1

A table stands between `<!-- table NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

from .cost.documents import TABLES as COST
from .operations import TABLES as OPERATIONS
from .quality.tables import TABLES as QUALITY
from .quickstart import TABLES as QUICKSTART

ROOT = Path(__file__).resolve().parents[1]
TABLES: dict[str, Callable[[], str]] = {**QUICKSTART, **OPERATIONS, **QUALITY, **COST}
PLACE = re.compile(r"(<!-- table (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def documents() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def filled(text: str) -> str:
    """The text with every table made again.

    Raises:
        KeyError: a table of a name that nothing makes.
    """
    return PLACE.sub(lambda place: f"{place[1]}{TABLES[place['name']]()}\n{place[3]}", text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args()
    old = []
    for path in documents():
        text = path.read_text(encoding="utf-8")
        new = filled(text)
        if new != text:
            old.append(path.relative_to(ROOT).as_posix())
            if not args.check:
                path.write_text(new, encoding="utf-8")
    if old:
        print(f"{'differ' if args.check else 'written'}: {', '.join(old)}")
    return int(args.check and bool(old))


if __name__ == "__main__":
    sys.exit(main())
