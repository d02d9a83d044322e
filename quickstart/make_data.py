"""Make the instruction data of the quickstart: rewrite an identifier in another naming style.

    python quickstart/make_data.py        # remakes quickstart/data/train.jsonl and test.jsonl

The identifiers are those of the standard library of the running Python, taken from its sources with `ast`.
A row is

    {"prompt": "# snake_case: HTTPServerError\\n", "completion": "http_server_error"}

Rows are drawn by a hash of the identifier's letters, so the same Python gives the same files, and no
identifier is in both files, in whatever style (`file_name`, `FileName` and `filename` count as one).
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
SKIPPED_DIRS = frozenset({"site-packages", "dist-packages", "test", "tests", "lib2to3"})
WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")  # an acronym, or a word with or without its capital
STYLES: dict[str, Callable[[list[str]], str]] = {
    "snake_case": "_".join,
    "CamelCase": lambda words: "".join(word.capitalize() for word in words),
    "UPPER_CASE": lambda words: "_".join(words).upper(),
}


def names_in(tree: ast.AST) -> Iterator[str]:
    """Every identifier that a module defines, imports or uses."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, (ast.arg, ast.keyword)) and node.arg:
            yield node.arg


def collect_identifiers() -> list[str]:
    """All identifiers of the standard library, sorted; modules that do not parse are left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    names: set[str] = set()
    for path in sorted(root.rglob("*.py")):
        if SKIPPED_DIRS.intersection(path.relative_to(root).parts):
            continue
        try:
            names.update(names_in(ast.parse(path.read_bytes())))
        except (SyntaxError, ValueError):
            continue
    if not names:
        raise FileNotFoundError(f"no library sources (*.py) under {root}: use a Python that ships them")
    return sorted(names)


def split_words(name: str) -> list[str] | None:
    """``HTTPServerError`` or ``http_server_error`` to ``[http, server, error]``; None for an unclear style.

    Clear are: two to four words of two letters or more, one style throughout; no digits or outer underscores.
    """
    if not re.fullmatch(r"[a-z]+(_[a-z]+)+|[A-Z]+(_[A-Z]+)+|[A-Za-z]+", name):
        return None
    words = WORD.findall(name)
    if not 2 <= len(words) <= 4 or min(map(len, words)) < 2:
        return None
    return [word.lower() for word in words]


def make_rows(names: list[str], longest: int) -> dict[str, dict[str, str]]:
    """One row per identifier, keyed by its lower-case letters, whose hash chooses the target style."""
    rows: dict[str, dict[str, str]] = {}
    for name in names:
        words = split_words(name)
        if words is None:
            continue
        letters = "".join(words)
        styles = [style for style, render in STYLES.items() if render(words) != name]
        style = styles[zlib.crc32(f"style {letters}".encode()) % len(styles)]
        row = {"prompt": f"# {style}: {name}\n", "completion": STYLES[style](words)}
        if len(row["prompt"]) + len(row["completion"]) <= longest:
            rows.setdefault(letters, row)
    return rows


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{len(rows):,} rows, {path.stat().st_size:,} bytes: {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the instruction data of the quickstart.")
    parser.add_argument("--output-dir", type=Path, default=HERE / "data")
    parser.add_argument("--train-rows", type=int, default=4000, help="most training rows (%(default)s)")
    parser.add_argument("--test-rows", type=int, default=300, help="test rows (%(default)s)")
    parser.add_argument("--longest", type=int, default=62, help="most bytes in a row (%(default)s)")
    args = parser.parse_args()
    rows = make_rows(collect_identifiers(), args.longest)
    order = sorted(rows, key=lambda letters: (zlib.crc32(f"order {letters}".encode()), letters))
    if len(order) <= args.test_rows:
        parser.error(f"--test-rows {args.test_rows} leaves no training rows of {len(order)} identifiers")
    chosen = [rows[letters] for letters in order[: args.test_rows + args.train_rows]]
    write_rows(args.output_dir / "test.jsonl", chosen[: args.test_rows])
    write_rows(args.output_dir / "train.jsonl", chosen[args.test_rows :])


if __name__ == "__main__":
    main()
