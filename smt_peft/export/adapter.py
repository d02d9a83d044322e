"""An adapter as its files hold it: settings, blocks and what was trained besides, read without a model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..blocks import BlockGrid, BlockLayout
from ..config import SMTConfig
from ..tuner.delta import SMTBlocks
from ..tuner.low_rank import LowRank, dense_sum, whole

PREFIX, WEIGHT, INDEX = "base_model.model.", ".smt_blocks.weight", ".smt_blocks.index"
LORA_A, LORA_B = ".smt_low_rank.lora_A", ".smt_low_rank.lora_B"


def settings_of(directory: Path) -> dict[str, Any]:
    """What `adapter_config.json` says.

    Raises:
        FileNotFoundError: there is no adapter in `directory`.
        ValueError: the file is damaged, or names no base.
    """
    file = directory / "adapter_config.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"there is no adapter in {directory}: it has no adapter_config.json; pass the output_dir of a run"
        )
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        base = settings.get("base_model_name_or_path")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file} is damaged ({error}); restore it, or save the adapter again") from error
    if not base:
        raise ValueError(f"{file} names no base model; set base_model_name_or_path in it")
    return settings


@dataclass(frozen=True)
class SavedAdapter:
    """A saved SMT adapter.

    Args:
        directory: where it lies.
        config: its settings.
        keys: names of the tensors in its file.
    """

    directory: Path
    config: SMTConfig
    keys: tuple[str, ...]

    @classmethod
    def open(cls, directory: Path) -> SavedAdapter:
        """Read the settings and the names of the tensors.

        Raises:
            FileNotFoundError: there is no adapter in `directory`, or its tensors are missing.
            ValueError: a file is damaged, or this is an adapter of another method; says how to mend it.
        """
        settings = settings_of(directory)
        if settings.get("peft_type") != "SMT":
            raise ValueError(f"{directory} holds an adapter of type {settings.get('peft_type')}, not SMT")
        file = directory / SAFETENSORS_WEIGHTS_NAME
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing; restore it, or save the adapter again")
        try:
            with safe_open(file, framework="pt") as tensors:
                keys = tuple(tensors.keys())
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file} is damaged ({error}); restore it, or save the adapter again") from error
        try:
            return cls(directory, SMTConfig.from_pretrained(str(directory)), keys)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{directory}/adapter_config.json is damaged ({error}); save the adapter again") from error

    @property
    def modules(self) -> list[str]:
        """Names of the modules, and of the bare parameters, that have blocks."""
        return [key.removeprefix(PREFIX).removesuffix(WEIGHT) for key in self.keys if key.endswith(WEIGHT)]

    @property
    def besides(self) -> dict[str, str]:
        """Key by name of every tensor that is neither block nor low-rank pair: of modules, tables and token rows
        trained besides."""
        return {key.removeprefix(PREFIX): key for key in self.keys if not key.endswith((*_PARTS, *_PAIR))}

    def tensor(self, key: str) -> Tensor:
        with safe_open(self.directory / SAFETENSORS_WEIGHTS_NAME, framework="pt") as tensors:
            return tensors.get_tensor(key)

    def blocks(self, module: str, shape: tuple[int, int]) -> tuple[BlockLayout, Tensor]:
        """Where the blocks of a module lie, and its delta `(num_blocks, rows, cols)`.

        Args:
            module: one of `modules`.
            shape: `(rows, cols)` of the module's weight in the base.

        Raises:
            ValueError: what the file holds cannot be blocks of such a weight; names the module.
        """
        count, rows, cols = self._pattern(module)
        if rows > shape[0] or cols > shape[1]:
            raise ValueError(
                f"{module}: block_pattern has blocks of {rows} x {cols}, which a {shape[0]} x {shape[1]} weight does "
                "not have; the adapter belongs to another model, use its own base"
            )
        grid = BlockGrid(*shape, rows, cols)
        weight, index = self._tensors(module, _PARTS)
        with torch.device("meta"):
            SMTBlocks(module, grid, count).check_loaded(weight, index)
        return BlockLayout(grid, index), weight

    def low_rank(self, module: str, shape: tuple[int, int]) -> tuple[Tensor, Tensor] | None:
        """The low-rank pair of a module, `(r, cols)` and `(rows, r)`; None when it has none.

        Raises:
            ValueError: what the file holds cannot be the pair of such a weight; names the module.
        """
        pair = self._tensors(module, _PAIR)
        if self.config.lora_rank is None:
            if any(tensor is not None for tensor in pair):
                raise ValueError(
                    f"{module}: the adapter file has a low-rank pair for this module, but adapter_config.json has no "
                    "lora_rank; restore the config"
                )
            return None
        with torch.device("meta"):
            LowRank(module, shape, self.config).check_loaded(*pair)
        return pair

    def change(self, module: str, shape: tuple[int, int]) -> tuple[BlockLayout, Tensor]:
        """Where the adapter changes a module's weight, and what it adds there: its blocks, or, with a low-rank pair,
        the whole matrix as one block.

        Raises:
            ValueError: as `blocks` and `low_rank`.
        """
        layout, weight = self.blocks(module, shape)
        pair = self.low_rank(module, shape)
        if pair is None:
            return layout, weight
        return whole(layout.grid, weight.device), dense_sum(weight, layout, *pair, self.config.low_rank_scaling)[None]

    def _tensors(self, module: str, ends: tuple[str, ...]) -> tuple[Tensor | None, ...]:
        return tuple(self.tensor(PREFIX + module + end) if self._has(module, end) else None for end in ends)

    def _has(self, module: str, end: str) -> bool:
        return PREFIX + module + end in self.keys

    def _pattern(self, module: str) -> tuple[int, int, int]:
        """Number and shape of a module's blocks; a name may lack a prefix, such as a head model adds."""
        pattern = self.config.block_pattern or {}
        found = [name for name in pattern if f".{module}".endswith(f".{name}") or f".{name}".endswith(f".{module}")]
        entry = pattern.get(module) or (pattern[found[0]] if len(found) == 1 else None)
        if entry is None:
            raise ValueError(
                f"{module}: the adapter file has blocks for this module, but block_pattern in adapter_config.json does "
                "not name it; restore the config"
            )
        sides = list(entry) if isinstance(entry, (list, tuple)) else []
        if len(sides) != 3 or any(not isinstance(side, int) or side < 1 for side in sides):
            raise ValueError(f"{module}: block_pattern says {entry!r} instead of [num_blocks, rows, cols]")
        return tuple(sides)


_PARTS, _PAIR = (WEIGHT, INDEX), (LORA_A, LORA_B)
