"""Results of the MetaMathQA comparison beside those that PEFT has published, as a table.

python -m benchmarks.hub.metamathqa.compare                        # all of benchmarks/results/metamathqa
python -m benchmarks.hub.metamathqa.compare FILE.json DIRECTORY    # those, e.g. of PEFT's own results
python -m benchmarks.hub.metamathqa.compare --trainable 9175040    # only what trains as many weights
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[2] / "results"
PUBLISHED = RESULTS / "published" / "peft_metamathqa.csv"
GIB, MB = 2**30, 10**6
COLUMNS = (
    "",
    "experiment",
    "lr",
    "trainable",
    "test acc %",
    "+-",
    "forgetting",
    "train loss",
    "max GiB",
    "train s",
    "total s",
    "MB",
    "GPU",
)
# Rows of GSM8K's test set, which the spread of an accuracy follows from.
TEST_ROWS = 1319


@dataclass(frozen=True)
class Row:
    """One run: accuracies and losses as they are, seconds, bytes."""

    experiment: str
    ours: bool
    test_acc: float
    forgetting: float
    train_loss: float
    train_time_s: float
    total_time_s: float
    mem_max_bytes: int
    file_size: int
    trainable: int
    lr: float
    gpu: str

    @classmethod
    def of_csv(cls, row: dict[str, str]) -> Row:
        numbers = {name: float(row[name]) for name in ("test_acc", "forgetting", "train_loss", "lr")}
        seconds = {name: float(row[name]) for name in ("train_time_s", "total_time_s")}
        counts = {name: int(row[name]) for name in ("mem_max_bytes", "file_size", "trainable")}
        return cls(row["experiment"], ours=False, gpu=row["gpu"], **numbers, **seconds, **counts)

    @classmethod
    def of_log(cls, log: dict[str, Any]) -> Row:
        """Of a JSON of PEFT's harness.

        Raises:
            ValueError: the run was not finished.
        """
        run, train = log["run_info"], log["train_info"]
        last = next((entry for entry in train["metrics"] if "test accuracy" in entry), None)
        if train["status"] != "success" or last is None:
            raise ValueError(
                f"{run['experiment_name']}: its status is {train['status']!r}, so there is no test accuracy"
            )
        return cls(
            experiment=run["experiment_name"],
            ours=True,
            test_acc=last["test accuracy"],
            forgetting=last["forgetting"],
            train_loss=last["train loss"],
            train_time_s=train["train_time"],
            total_time_s=run["total_time"],
            mem_max_bytes=train["accelerator_memory_max"],
            file_size=train["file_size"],
            trainable=train["num_trainable_params"],
            lr=run["train_config"]["optimizer_kwargs"]["lr"],
            gpu=log["meta_info"]["system_info"]["accelerator"],
        )

    def line(self) -> str:
        spread = 100 * math.sqrt(self.test_acc * (1 - self.test_acc) / TEST_ROWS)
        cells = (
            "**ours**" if self.ours else "",
            self.experiment,
            f"{self.lr:g}",
            f"{self.trainable:,}",
            f"{100 * self.test_acc:.1f}",
            f"{spread:.1f}",
            f"{self.forgetting:.3f}",
            f"{self.train_loss:.3f}",
            f"{self.mem_max_bytes / GIB:.1f}",
            f"{self.train_time_s:.0f}",
            f"{self.total_time_s:.0f}",
            f"{self.file_size / MB:.1f}",
            self.gpu,
        )
        return _line(cells)


def published(file: Path = PUBLISHED) -> list[Row]:
    with file.open(encoding="utf-8", newline="") as lines:
        return [Row.of_csv(row) for row in csv.DictReader(lines)]


def results(paths: Iterable[Path]) -> list[Row]:
    """The rows of result files, and of those in directories.

    Raises:
        ValueError: a path is not there, a file is no result, or is one of an unfinished run; names it.
    """
    rows = []
    for path in paths:
        if not path.exists():
            raise ValueError(f"{path} is not there; make results with benchmarks.hub.metamathqa.run")
        for file in sorted(path.glob("*.json")) if path.is_dir() else [path]:
            try:
                rows.append(Row.of_log(json.loads(file.read_text("utf-8"))))
            except (KeyError, TypeError, json.JSONDecodeError) as error:
                raise ValueError(f"{file} is no result of PEFT's harness: {error!r}") from error
    return rows


def table(rows: Iterable[Row]) -> str:
    """Markdown, the best test accuracy first; `+-` is one binomial standard deviation over the test rows."""
    ordered = sorted(rows, key=lambda row: row.test_acc, reverse=True)
    return "\n".join([_line(COLUMNS), _line(["---"] * len(COLUMNS)), *(row.line() for row in ordered)])


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="*", type=Path, help="result files, or directories of them")
    parser.add_argument("--trainable", type=int, help="leave out what trains another number of weights")
    arguments = parser.parse_args(argv)
    own = RESULTS / "metamathqa"
    paths = arguments.paths or ([own] if own.is_dir() else [])
    try:
        rows = published() + results(paths)
    except ValueError as error:
        sys.exit(f"error: {error}")
    if arguments.trainable is not None:
        rows = [row for row in rows if row.trainable == arguments.trainable]
    print(table(rows))


if __name__ == "__main__":
    main()
