"""Commonsense-170k: how a question is put to a model, and how an answer is read out of what it says.

One training set of eight tasks and their eight test sets, as LLM-Adapters publishes them (github.com/AGI-Edgerunners/
LLM-Adapters): rows of `instruction`, `input`, `output`, `answer`, where `output` is "the correct answer is <answer>".
The papers on LoRA, DoRA, SMT and DiaBlo report the mean of the eight accuracies. Their evaluations count a row as right
when the first of the task's answer words that the completion holds is the row's `answer`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FIELDS = ("instruction", "input", "output", "answer")
# The Alpaca prompt: published accuracies are of models that were trained and asked with it.
HEAD = "Below is an instruction that describes a task{more}. Write a response that appropriately completes the request."
WITH_INPUT = ", paired with an input that provides further context"


@dataclass(frozen=True)
class Task:
    """A test set: its folder, its answer words, and its number of rows, over which published accuracies are taken."""

    name: str
    folder: str
    answers: tuple[str, ...]
    rows: int


_LETTERED = ("answer1", "answer2", "answer3", "answer4", "answer5")
# In the order of the published tables.
TASKS = (
    Task("BoolQ", "boolq", ("true", "false"), 3270),
    Task("PIQA", "piqa", ("solution1", "solution2"), 1838),
    Task("SIQA", "social_i_qa", _LETTERED, 1954),
    Task("HellaSwag", "hellaswag", ("ending1", "ending2", "ending3", "ending4"), 10042),
    Task("WinoGrande", "winogrande", ("option1", "option2"), 1267),
    Task("ARC-e", "ARC-Easy", _LETTERED, 2376),
    Task("ARC-c", "ARC-Challenge", _LETTERED, 1172),
    Task("OBQA", "openbookqa", _LETTERED, 500),
)


def prompt(row: Mapping[str, str]) -> str:
    """What the model is to continue, up to where its response begins."""
    parts = [HEAD.format(more=WITH_INPUT if row["input"] else ""), f"### Instruction:\n{row['instruction']}"]
    if row["input"]:
        parts.append(f"### Input:\n{row['input']}")
    return "\n\n".join([*parts, "### Response:\n"])


def read_answer(task: Task, completion: str) -> str | None:
    """The first answer word of the task in a completion, in any case and at any place; None: there is none."""
    found = re.search("|".join(task.answers), completion.lower())
    return found.group() if found else None


def read_rows(file: Path) -> Iterator[dict[str, str]]:
    """The rows of a published JSON file.

    Raises:
        ValueError: the file is not there or no list of rows with the four fields as text; names the file and the row.
    """
    if not file.is_file():
        raise ValueError(f"there is no file {file}; download it from github.com/AGI-Edgerunners/LLM-Adapters")
    try:
        rows = json.loads(file.read_text("utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is no JSON ({error}); download it again") from error
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{file} must hold a list of rows, got {type(rows).__name__}; download it again")
    for number, row in enumerate(rows, start=1):
        _check_row(row, f"{file}, row {number}")
        yield row


def _check_row(row: Any, where: str) -> None:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a row must be an object with {', '.join(FIELDS)}, got {type(row).__name__}")
    wrong = [name for name in FIELDS if not isinstance(row.get(name), str)]
    wrong += [name for name in FIELDS if name != "input" and row.get(name) == ""]
    if wrong:
        raise ValueError(f"{where}: {wrong[0]} must be text, got {row.get(wrong[0])!r}; fill it in or drop the row")
