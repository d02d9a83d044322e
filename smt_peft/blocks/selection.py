"""The chosen blocks of a model: data that is saved, drawn, compared, combined and handed on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .grid import BlockGrid
from .layout import BlockLayout


@dataclass(eq=False)
class BlockSelection:
    """The chosen blocks of a model: data that can be saved, drawn, compared, combined and handed to another run.

    Args:
        blocks: per module name (as in `model.named_modules()` of the base model) the chosen blocks, int32 `(B, 2)`
            sorted `(row stripe, column stripe)`. A module without a chosen block is left out.
        grids: the tiling of every module that could have been chosen, so of at least those in `blocks`.
        scores: optionally the score of every block, fp32 `(R, C)` per module.
        provenance: how the selection came about (score, batches, seed, fingerprints): JSON values.

    Raises:
        ValueError: blocks are not sorted, unique, int32 and inside their grid; a module has no grid; a score grid has
            the wrong shape or a value that is not finite.
    """

    blocks: dict[str, Tensor]
    grids: dict[str, BlockGrid]
    scores: dict[str, Tensor] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if not self.blocks:
            raise ValueError("a selection without a single block trains nothing; raise density or num_blocks")
        for name, blocks in self.blocks.items():
            if name not in self.grids:
                raise ValueError(f"{name}: the selection has blocks but no grid for this module; pass its BlockGrid")
            self.grids[name].check_blocks(blocks, name)
            if len(blocks) == 0:
                raise ValueError(f"{name}: an empty list of blocks; leave the module out instead")
        for name, score in self.scores.items():
            if name not in self.grids or tuple(score.shape) != self.grids[name].stripes:
                raise ValueError(
                    f"{name}: kept scores of shape {tuple(score.shape)} do not fit the module's grid; "
                    "make the selection again with select_blocks"
                )
            if not bool(torch.isfinite(score).all()):
                raise ValueError(f"{name}: kept scores hold a value that is not finite; make the selection again")

    def layout(self, name: str) -> BlockLayout:
        return BlockLayout(self.grids[name], self.blocks[name])

    @property
    def num_blocks(self) -> int:
        return sum(len(blocks) for blocks in self.blocks.values())

    @property
    def effective_numel(self) -> int:
        """Trained weights, padding not counted."""
        return sum(self.grids[name].effective_numel(blocks) for name, blocks in self.blocks.items())

    @property
    def density(self) -> float:
        """Trained weights as a share of the weights of all targeted modules."""
        return self.effective_numel / sum(grid.numel for grid in self.grids.values())

    def stripe_coverage(self) -> tuple[float, float]:
        """Share of the row stripes, and of the column stripes, of all targeted modules that hold a chosen block."""
        rows = sum(len(torch.unique(blocks[:, 0])) for blocks in self.blocks.values())
        cols = sum(len(torch.unique(blocks[:, 1])) for blocks in self.blocks.values())
        grids = self.grids.values()
        return rows / sum(grid.row_stripes for grid in grids), cols / sum(grid.col_stripes for grid in grids)

    def summary(self) -> str:
        """One line: modules reached, blocks, share of weights, and share of row and column stripes."""
        rows, cols = self.stripe_coverage()
        return (
            f"{self.num_blocks:,} blocks in {len(self.blocks)} of {len(self.grids)} modules, "
            f"{self.density:.2%} of their weights ({self.effective_numel:,}), reaching {rows:.0%} of the row "
            f"stripes and {cols:.0%} of the column stripes"
        )

    def __eq__(self, other: object) -> bool:
        """Same blocks on the same grids; scores and provenance may differ."""
        if not isinstance(other, BlockSelection):
            return NotImplemented
        return self.blocks.keys() == other.blocks.keys() and all(
            self.grids[name] == other.grids[name] and torch.equal(blocks.cpu(), other.blocks[name].cpu())
            for name, blocks in self.blocks.items()
        )

    __hash__ = None

    def __or__(self, other: BlockSelection) -> BlockSelection:
        """Blocks in either selection."""
        return self._combine(other, lambda mine, theirs: torch.cat((mine, theirs)))

    def __and__(self, other: BlockSelection) -> BlockSelection:
        """Blocks in both selections. Raises `ValueError` when there is none."""
        return self._combine(other, lambda mine, theirs: mine[torch.isin(mine, theirs)])

    def __sub__(self, other: BlockSelection) -> BlockSelection:
        """Blocks of this selection that the other lacks. Raises `ValueError` when none is left."""
        return self._combine(other, lambda mine, theirs: mine[~torch.isin(mine, theirs)])

    def _combine(self, other: BlockSelection, pick) -> BlockSelection:
        grids = {**other.grids, **self.grids}
        for name in self.grids:
            if name in other.grids and self.grids[name] != other.grids[name]:
                raise ValueError(
                    f"{name}: the selections tile this module differently ({self.grids[name]} and "
                    f"{other.grids[name]}); make both with the same block_size"
                )
        none = torch.empty(0, dtype=torch.int64)
        combined = {}
        for name in dict.fromkeys((*self.blocks, *other.blocks)):
            grid = grids[name]
            mine, theirs = (grid.flatten(s.blocks[name].cpu()) if name in s.blocks else none for s in (self, other))
            chosen = pick(mine, theirs)
            if len(chosen):
                combined[name] = grid.unflatten(chosen)
        if not combined:
            raise ValueError("no block is left, and a selection without one trains nothing; combine other selections")
        return BlockSelection(combined, grids, provenance=_of_both(self.provenance, other.provenance))

    def num_common(self, other: BlockSelection) -> int:
        """How many blocks are in both selections, whose tilings must be the same where both have blocks."""
        pairs = {name: (self.layout(name), other.layout(name)) for name in self.blocks if name in other.blocks}
        for name, (mine, theirs) in pairs.items():
            if mine.grid != theirs.grid:
                raise ValueError(
                    f"{name}: blocks of {mine.grid} and of {theirs.grid} cannot be counted against each other; make "
                    "both selections with the same block_size"
                )
        of_both = pairs.values()
        return sum(int(torch.isin(*(each.grid.flatten(each.blocks.cpu()) for each in pair)).sum()) for pair in of_both)

    def save(self, path: str | Path) -> None:
        """Write the selection as a safetensors file: blocks, kept scores, grids and provenance."""
        tensors = {f"blocks:{name}": blocks.cpu().contiguous() for name, blocks in self.blocks.items()}
        tensors |= {f"scores:{name}": score.float().cpu().contiguous() for name, score in self.scores.items()}
        header = {
            "format": _FORMAT,
            "grids": {name: asdict(grid) for name, grid in self.grids.items()},
            "provenance": self.provenance,
        }
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Written aside and renamed: a run killed here leaves the old file or the new one, never half of one.
        aside = path.with_name(path.name + ".part")
        save_file(tensors, aside, metadata={_HEADER: json.dumps(header)})
        aside.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> BlockSelection:
        """Read and check a file written by `save`.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is truncated, no selection, or holds blocks that cannot be; names the module.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(
                f"there is no selection file at {path}; make one with select_blocks(...).save(...) "
                "or `smt select run.yaml`"
            )
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {}).get(_HEADER, "null"))
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no iterator of its own)
        except (SafetensorError, OSError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{path} cannot be read as a selection ({error}); it is truncated or no safetensors file, "
                "make it again with select_blocks"
            ) from error
        if not isinstance(header, Mapping) or header.get("format") != _FORMAT:
            raise ValueError(
                f"{path} is no selection file of a format known here ({_FORMAT}); make it again with select_blocks"
            )
        try:
            grids = {name: BlockGrid(**grid) for name, grid in header["grids"].items()}
            return cls(
                _with_prefix(tensors, "blocks:"),
                grids,
                _with_prefix(tensors, "scores:"),
                dict(header.get("provenance") or {}),
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path}: {error}") from error


_FORMAT = "smt-selection-1"
_HEADER = "smt_selection"


def _of_both(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of a combination: its base, where nothing speaks for two, and which targets are experts."""
    known: dict[str, Any] = {"combined": True}
    bases = [record.get("base_fingerprint") or {} for record in (one, other)]
    if all(bases) and all(bases[0][name] == bases[1][name] for name in bases[0].keys() & bases[1].keys()):
        known["base_fingerprint"] = bases[1] | bases[0]
    if experts := {**other.get("experts", {}), **one.get("experts", {})}:
        known["experts"] = experts
    return known


def _with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
