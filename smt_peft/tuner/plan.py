"""What an adapter will look like, settled before the model is touched: per module its grid and its blocks."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ..bases.fingerprint import Sample, Weight, fingerprint, mismatch
from ..bases.target import Target
from ..bases.targets import find_targets
from ..blocks import BlockGrid, BlockSelection
from ..config import DEFAULT_DENSITY, SMTConfig
from ..say import say
from ..selection import select_without_data
from ..selection.avoid import check_avoided
from .engines import check_whole


@dataclass
class Plan:
    """The blocks of one adapter on one model.

    Args:
        selection: blocks by module name.
        base_fingerprint: see `fingerprint.fingerprint`.
    """

    selection: BlockSelection
    base_fingerprint: dict[str, Sample]

    def block_pattern(self) -> dict[str, list[int]]:
        """`{module: [num_blocks, rows, cols]}`."""
        return {
            name: [len(blocks), *self.selection.grids[name].block_shape]
            for name, blocks in self.selection.blocks.items()
        }

    def entry(self, name: str) -> tuple[BlockGrid, int, Tensor]:
        """Grid, number of blocks and positions for a module."""
        # The names of a compiled model carry a prefix, which PEFT takes off where it injects by a state dict.
        compiled = f"_orig_mod.{name}"
        name = compiled if compiled in self.selection.blocks else name
        if name not in self.selection.blocks:
            raise ValueError(
                f"{name}: the state dict has blocks for this module, but the config does not target it; use the config "
                "that was saved with them"
            )
        blocks = self.selection.blocks[name]
        return self.selection.grids[name], len(blocks), blocks


def make_plan(model: nn.Module, config: SMTConfig) -> Plan:
    """Settle the blocks: from the selection given, from the counts of a saved adapter, or without data.

    Raises:
        NotImplementedError: the model is tensor parallel; names the module.
        ValueError: no target, the model is sharded already, or the selection or the saved adapter belongs to another
            model; names the module.
        FileNotFoundError: `selection` is the path of no file.
    """
    targets = find_targets(model, config)
    check_whole(targets, config.inference_mode)
    # A merged adapter has changed the weights it sits on.
    bases = {name: target.evidence for name, target in targets.items() if not target.is_merged}
    if config.selection is not None:
        selection = config.selection
        if isinstance(selection, str):
            selection = BlockSelection.load(selection)
            _check_path(config, selection)
        check_selection(selection, targets, bases)
        check_avoided(selection, config)
    elif config.block_pattern:
        selection = _from_pattern(targets, config)
        if config.awaits_weights and config.base_model_name_or_path:
            check_base(config, bases)
    else:
        selection = select_without_data(targets, config)
        if config.needs_data:
            say(
                f"no selection given: blocks are drawn at random (seed {config.seed}); select_blocks(model, config, "
                f"dataloader) would choose them by {config.score_name}"
            )
    if not config.awaits_weights:
        _tell_frozen([name for name in targets if name not in selection.blocks], len(targets))
    if config.awaits_weights and config.base_fingerprint:
        return Plan(selection, config.base_fingerprint)
    chosen = {name: weight for name, weight in bases.items() if name in selection.blocks}
    return Plan(selection, fingerprint(chosen))


def _check_path(config: SMTConfig, selection: BlockSelection) -> None:
    """A host may have set the path later than all else. `density` has its default by now, which says nothing."""
    config = config.copy()
    config.density = None if config.density == DEFAULT_DENSITY else config.density
    config.check_agreement(selection)


def _tell_frozen(names: list[str], num_targets: int) -> None:
    """A target that does not train must not go unsaid."""
    if names:
        listed = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        say(f"{len(names)} of {num_targets} targeted modules hold no chosen block and stay frozen: {listed}")


def check_selection(selection: BlockSelection, targets: dict[str, Target], bases: dict[str, Weight]) -> None:
    """Raise `ValueError`, naming the module, unless the selection was made for this model and these targets."""
    repair = "make a selection for this model with select_blocks"
    for name in selection.blocks:
        if name not in targets:
            raise ValueError(
                f"{name}: the selection has blocks for this module, which is no target of the model; check "
                f"target_modules, or {repair}"
            )
        grid = selection.grids[name]
        grid.check_blocks(selection.blocks[name], name)
        if grid.shape != targets[name].shape:
            raise ValueError(
                f"{name}: the selection is for a {grid.rows} x {grid.cols} weight, this model's is "
                f"{' x '.join(map(str, targets[name].shape))}; {repair}"
            )
    _check_fingerprint(
        selection.provenance.get("base_fingerprint"),
        bases,
        f"the selection was made on another base model; {repair}, or drop 'base_fingerprint' from its "
        "provenance to use it all the same",
    )


def check_base(config: SMTConfig, bases: dict[str, Weight]) -> None:
    """Raise `ValueError`, naming a module, when a saved adapter meets base weights it was not trained on."""
    _check_fingerprint(
        config.base_fingerprint,
        bases,
        "the adapter was trained on another base model. Load the base named in its adapter_config.json "
        "(base_model_name_or_path); to apply it to this base all the same, remove base_fingerprint there",
    )


def _check_fingerprint(expected: dict[str, Sample] | None, bases: dict[str, Weight], repair: str) -> None:
    differs = mismatch(expected, bases) if expected else None
    if differs:
        raise ValueError(f"{differs}: the base weights are not those expected; {repair}")


def _from_pattern(targets: dict[str, Target], config: SMTConfig) -> BlockSelection:
    """Blocks as many as a saved adapter has; where they lie is overwritten when its weights are read."""
    grids, counts = {}, {}
    for pattern, (num_blocks, rows, cols) in config.block_pattern.items():
        name = _find(pattern, targets)
        grid = BlockGrid(*targets[name].shape, rows, cols)
        if name in grids or num_blocks > grid.num_blocks or rows > grid.rows or cols > grid.cols:
            raise ValueError(
                f"{name}: block_pattern asks for {num_blocks} blocks of {rows} x {cols}, which a {grid.rows} x "
                f"{grid.cols} weight does not have, or names the module twice; the adapter belongs to another model, "
                "load it on its own base"
            )
        grids[name], counts[name] = grid, num_blocks
    return select_without_data(targets, config, counts=counts, grids=grids)


def _find(pattern: str, targets: dict[str, Target]) -> str:
    """The target a key of `block_pattern` names: exactly, or up to a prefix, such as a head model adds."""
    if pattern in targets:
        return pattern
    found = [name for name in targets if name.endswith("." + pattern) or pattern.endswith("." + name)]
    if len(found) == 1:
        return found[0]
    problem = "no target module" if not found else f"several target modules ({', '.join(found)})"
    raise ValueError(
        f"block_pattern names {pattern!r}, which matches {problem} of this model; the adapter belongs to "
        "another model or its target_modules were changed, load it on its own base"
    )
