"""The two tables people read and the suite obeys: `skips.md` (test -> reason) and `files.md` (file -> what is run)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from packaging.specifiers import SpecifierSet

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Skip:
    """A test that is not run with SMT.

    Args:
        test: `file.py::Class::test[case]`, with `*` for anything.
        message: what PEFT says when it skips the test itself, with `*` for anything; empty when it is skipped here.
        reason: why.
        peft: the PEFT versions this holds for.
    """

    test: str
    message: str
    reason: str
    peft: SpecifierSet

    @property
    def is_ours(self) -> bool:
        """Whether the test is skipped here, not by PEFT."""
        return not self.message

    def names(self, test: str) -> bool:
        return matches(self.test, test)

    def explains(self, test: str, message: str) -> bool:
        """Whether this line accounts for a skip of `test` that said `message`."""
        return self.names(test) and matches(self.message or self.reason, message)


@dataclass(frozen=True)
class File:
    """What is done with one file of PEFT's tests; `stand_in` holds the tests in which SMT stands in for LoRA."""

    is_taken: bool
    stand_in: tuple[str, ...]


def matches(pattern: str, text: str) -> bool:
    """Whether all of `text` is `pattern`, in which `*` stands for anything."""
    return re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), text, re.DOTALL) is not None


def read_skips(peft_version: str, path: Path = HERE / "skips.md") -> list[Skip]:
    """The lines of the table that hold for `peft_version`."""
    skips = [
        Skip(test, message, reason, SpecifierSet(peft)) for test, message, reason, peft in _rows(path, num_columns=4)
    ]
    return [skip for skip in skips if peft_version in skip.peft]


def read_files(path: Path = HERE / "files.md") -> dict[str, File]:
    """By the name of a file of PEFT's tests what is done with it."""
    return {
        name: File(how not in ("", "no"), tuple(stand_in.split()))
        for name, how, stand_in, _ in _rows(path, num_columns=4)
    }


def untold(files: Iterable[str]) -> list[str]:
    """Files of PEFT's tests that no line of `files.md` names."""
    patterns = read_files()
    return sorted(file for file in files if not any(matches(pattern, file) for pattern in patterns))


def unexplained(skipped: Iterable[tuple[str, str]], skips: list[Skip]) -> list[tuple[str, str]]:
    """Those of the skips, `(test, message)`, that no line of the table accounts for."""
    return [one for one in skipped if not any(skip.explains(*one) for skip in skips)]


def stale(skipped: Iterable[tuple[str, str]], skips: list[Skip], files: set[str]) -> list[Skip]:
    """Lines of the table about `files`, all of which were run, that account for no skip."""
    skipped = list(skipped)
    return [
        skip
        for skip in skips
        if any(matches(skip.test.split("::")[0], file) for file in files)
        and not any(skip.explains(*one) for one in skipped)
    ]


def _rows(path: Path, num_columns: int) -> Iterator[list[str]]:
    """The rows of the Markdown tables in a file, without their heads."""
    lines = path.read_text("utf-8").splitlines()
    for above, line in zip([""] + lines, lines, strict=False):
        if not line.startswith("|") or set(line) <= set("|- ") or not above.startswith("|"):
            continue
        cells = [cell.strip().strip("`") for cell in line.strip()[1:-1].split("|")]
        if len(cells) != num_columns:
            raise ValueError(f"{path.name}: a line of {len(cells)} columns where {num_columns} belong: {line}")
        yield cells
