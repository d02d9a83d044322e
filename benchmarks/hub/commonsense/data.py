"""Turn the published commonsense_170k.json into the files that the YAMLs beside this name.

    python -m benchmarks.hub.commonsense.data commonsense_170k.json

writes `data/commonsense/train.jsonl` and, of 120 rows that are held out as in the published trainings,
`validation.jsonl`: prompt/completion rows.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from .questions import prompt, read_rows

OUT = Path("data", "commonsense")
VALIDATION = 120


def convert(source: Path, out: Path, validation: int = VALIDATION, seed: int = 0) -> tuple[int, int]:
    """Write both files; the rows keep their order.

    Args:
        source: JSON as LLM-Adapters publishes it.
        out: directory of the files.
        validation: rows held out, drawn at random.
        seed: of the draw.

    Returns:
        Rows for training, and held out.

    Raises:
        ValueError: the source is damaged, or has no more rows than are to be held out.
    """
    rows = [{"prompt": prompt(row), "completion": row["output"]} for row in read_rows(source)]
    if not 0 < validation < len(rows):
        raise ValueError(f"{source} has {len(rows)} rows, of which {validation} cannot be held out; say --validation")
    held = set(random.Random(seed).sample(range(len(rows)), validation))
    out.mkdir(parents=True, exist_ok=True)
    _write(out / "train.jsonl", (row for number, row in enumerate(rows) if number not in held))
    _write(out / "validation.jsonl", (rows[number] for number in sorted(held)))
    return len(rows) - validation, validation


def _write(file: Path, rows: Iterable[dict]) -> None:
    with file.open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="commonsense_170k.json")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--validation", type=int, default=VALIDATION, help="rows held out")
    parser.add_argument("--seed", type=int, default=0, help="of the rows held out")
    arguments = parser.parse_args(argv)
    try:
        train, held = convert(arguments.source, arguments.out, arguments.validation, arguments.seed)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(f"{arguments.out}: {train:,} rows to train on, {held:,} held out")


if __name__ == "__main__":
    main()
