"""What a method is measured on: a frozen base model, batches to train on, and a score on rows it has not seen."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np
from torch import nn

Row = TypeVar("Row")
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Score:
    """Of a model on one split.

    Args:
        accuracy: share of rows that are right, 0 to 1.
        loss: mean cross-entropy in nats.
    """

    accuracy: float
    loss: float


class Task(Protocol):
    """One task. `base()` makes the same model every time; everything random follows from the seed that is given."""

    name: str
    steps: int
    autocast: bool
    #: What is trained in full beside every method, as a classifier's head is, at a rate of its own.
    head: list[str]
    #: `task_type` of a PEFT config.
    kind: str

    def base(self) -> nn.Module:
        """The model before fine-tuning, fp32 and frozen."""

    def batches(self, seed: int) -> Iterator[dict[str, Any]]:
        """Endless batches of the training split."""

    def score(self, model: nn.Module, split: str) -> Score:
        """On `"validation"` or `"test"`."""

    def remembered(self, model: nn.Module) -> float | None:
        """Loss in nats per byte on held-out text of what the base was pre-trained on; None where there is none."""

    def describe(self) -> dict[str, Any]:
        """What the rows were made from: sizes, versions, a checksum."""


@dataclass(frozen=True)
class Split:
    """Rows parted by a checksum of their key, so that a row stays where it is when others come or go."""

    train: Sequence[Any] = field(default_factory=list)
    validation: Sequence[Any] = field(default_factory=list)
    test: Sequence[Any] = field(default_factory=list)


def parted(rows: Sequence[Row], keys: Sequence[str], validation: int, test: int) -> Split:
    """`test` and `validation` rows with the lowest checksums, in that order; the others are for training."""
    order = sorted(range(len(rows)), key=lambda i: (zlib.crc32(f"order {keys[i]}".encode()), keys[i]))
    if len(order) <= validation + test:
        raise ValueError(f"{len(order)} rows leave none for training beside {validation} + {test}; make more rows")
    chosen = [rows[i] for i in order]
    return Split(chosen[validation + test :], chosen[test : test + validation], chosen[:test])


def shuffled(count: int, batch: int, seed: int) -> Iterator[np.ndarray]:
    """Endless index arrays `(batch,)`: one epoch after another, each shuffled, the last incomplete batch left out."""
    if count < batch:
        raise ValueError(f"{count} training rows are fewer than a batch of {batch}")
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(count)
        for start in range(0, count - batch + 1, batch):
            yield order[start : start + batch]
