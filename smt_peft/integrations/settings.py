"""The settings of SMT as another trainer's user gives them, and the adapter they lead to."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model
from torch import nn

from ..config import RECORDED, SMTConfig
from ..selection import select_blocks
from ..selection.warmup import WARMUP_BATCHES, LossFunction

AUTO = "auto"
SELECTION = "selection.safetensors"
_KNOWN = sorted({field.name for field in fields(SMTConfig)} - RECORDED | {"warmup_batches"})


@dataclass(frozen=True)
class Settings:
    """Fields of `SMTConfig`, and where the blocks come from.

    Args:
        config: the tuner's settings, its `selection` None.
        selection: `"auto"`, or the path of a selection file.
        warmup_batches: batches of the warm-up pass, with `selection="auto"`.
    """

    config: SMTConfig
    selection: str = AUTO
    warmup_batches: int = WARMUP_BATCHES

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> Settings:
        """Check what was given.

        Raises:
            ValueError: a name is unknown, a value is out of its range, or the selection file does not exist.
        """
        if not isinstance(given, Mapping):
            raise ValueError(f"smt is a block of settings (density: 0.01, ...), got {given!r}")
        for name in given:
            if name not in _KNOWN:
                near = difflib.get_close_matches(str(name), _KNOWN, n=1)
                hint = f"did you mean {near[0]!r}?" if near else "known are " + ", ".join(_KNOWN)
                raise ValueError(f"smt.{name}: unknown setting; {hint}")
        given = _plain(given)
        selection, batches = given.pop("selection", AUTO), given.pop("warmup_batches", WARMUP_BATCHES)
        if not isinstance(batches, int) or isinstance(batches, bool) or batches < 1:
            raise ValueError(f"smt.warmup_batches must be a positive whole number, got {batches!r}")
        if selection != AUTO and not (isinstance(selection, str) and Path(selection).is_file()):
            raise ValueError(
                f"smt.selection is 'auto' or the path of a selection file, got {selection!r}, which is no file; "
                "`smt select` makes one"
            )
        try:
            return cls(SMTConfig(**given), selection, batches)
        except (TypeError, ValueError) as error:
            raise ValueError(f"smt: {error}") from error

    @property
    def need_batches(self) -> bool:
        """Whether blocks are yet to be chosen by gradients or activations."""
        return self.selection == AUTO and self.config.needs_data

    def unchosen(self, task_type: str | None) -> SMTConfig:
        """A config for a host that adapts the model itself: with the selection file, or to choose without data."""
        config = self.config.copy()
        config.task_type = task_type
        config.selection = None if self.selection == AUTO else self.selection
        return config

    def adapt(
        self,
        model: nn.Module,
        batches: Callable[[], Iterable],
        directory: str | Path,
        *,
        task_type: str | None = None,
        loss_fn: LossFunction | None = None,
        **options: Any,
    ) -> PeftModel:
        """Choose the blocks of a base model, or read which were chosen, and make them trainable.

        Args:
            model: the base model, on the device that it trains on.
            batches: gives this process's own part of the data; not called unless `need_batches`.
            directory: where a choice made here is kept, as `selection.safetensors`.
            task_type: PEFT's, as `"CAUSAL_LM"`.
            loss_fn: as for `select_blocks`.
            **options: for `get_peft_model`.

        Raises:
            ValueError: as `select_blocks` and `get_peft_model` do.
        """
        config = self.unchosen(task_type)
        if self.selection == AUTO:
            loader = batches() if self.need_batches else None
            config.selection = select_blocks(model, config, loader, self.warmup_batches, loss_fn=loss_fn)
            if int(os.environ.get("RANK", "0")) == 0:
                Path(directory).mkdir(parents=True, exist_ok=True)
                config.selection.save(Path(directory, SELECTION))
        return get_peft_model(model, config, **options)


def _plain(value: Any) -> Any:
    """Ordinary maps and lists, where a host has kinds of its own."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
