"""Several adapters of one base merged at once: they share no weight, so that the order does not matter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from .adapter import SavedAdapter, settings_of
from .checkpoint import Checkpoint
from .edits import Edits


def base_of_all(adapter_dirs: Sequence[Path]) -> str:
    """The base that all adapters name.

    Raises:
        FileNotFoundError: there is no adapter in a directory.
        ValueError: they name different bases.
    """
    bases = {directory: settings_of(directory)["base_model_name_or_path"] for directory in adapter_dirs}
    first = adapter_dirs[0]
    for directory, base in bases.items():
        if _place(base) != _place(bases[first]):
            raise ValueError(
                f"{directory} was trained on {base}, but {first} on {bases[first]}; only adapters of one base can be "
                "merged together"
            )
    return bases[first]


def _place(base: str | None) -> str | None:
    """One name for a directory, however an adapter has written its path."""
    return str(Path(base).resolve()) if base and Path(base).is_dir() else base


class EditsTogether:
    """The changes of several adapters, as `Edits` has those of one. Every weight is changed by one adapter at most, so
    each is base + delta rounded once, and the result is that of merging one adapter after the other, in any order.

    Attributes:
        touched: names of the stored tensors that change.

    Raises:
        NotInPlace: as `Edits`.
        ValueError: an adapter is damaged, belongs to another model, or trains more than blocks.
    """

    def __init__(self, adapter_dirs: Sequence[Path], checkpoint: Checkpoint):
        self.checkpoint = checkpoint
        self.parts = [Edits(SavedAdapter.open(directory), checkpoint) for directory in adapter_dirs]
        for part in self.parts:
            if part.adapter.besides:
                raise ValueError(
                    f"{part.adapter.directory} trains {next(iter(part.adapter.besides))} in full, which is no delta "
                    "that can be added to another; merge this adapter alone"
                )
        self.touched = list(dict.fromkeys(name for part in self.parts for name in part.touched))

    def check(self) -> None:
        """As `Edits.check`, and that no two adapters change the same weight.

        Raises:
            ValueError: they do; names both, the module and the repair.
        """
        for number, part in enumerate(self.parts):
            part.check()
            for other in self.parts[:number]:
                _check_disjoint(other, part)

    def apply_(self, name: str, values: Tensor) -> Tensor:
        for part in self.parts:
            part.apply_(name, values)
        return values


def _check_disjoint(one: Edits, other: Edits) -> None:
    for name in one.touched:
        if name not in other.touched:
            continue
        changed = torch.zeros(one.checkpoint.tensors[name].numel, dtype=torch.bool)
        for _, places in one.places(name):
            changed[places] = True
        for module, places in other.places(name):
            if bool(changed[places].any()):
                raise ValueError(
                    f"{module}: {one.adapter.directory} and {other.adapter.directory} change the same weights, whose "
                    "sum would be rounded twice; add the adapters first (add_weighted_adapter) and merge the sum, or "
                    "train one with avoid"
                )
