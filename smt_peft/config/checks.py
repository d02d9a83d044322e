"""The ranges of `SMTConfig`'s fields, and which of them contradict each other."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..blocks import BlockSelection
from .choices import BUDGETS, CALLABLE_PREFIX, COUPLED, DEFAULT_DENSITY, FORWARDS, SAVED_ACTIVATIONS, SCORES, SPREADS

if TYPE_CHECKING:
    from .config import SMTConfig


def check(config: SMTConfig) -> None:
    """Bring a config's fields into their usual form, and hold them to their ranges and to each other.

    Raises:
        ValueError: names the field and the repair.
    """
    _check_targets(config)
    _check_runtime(config)
    _check_reuse(config)
    _check_coupled(config)
    _check_amount(config)
    _check_choice(config)
    _check_low_rank(config)


def _check_targets(config: SMTConfig) -> None:
    for name in ("target_modules", "exclude_modules"):
        value = getattr(config, name)
        names = [value] if isinstance(value, str) else value
        if value is not None and not (
            isinstance(names, (list, tuple, set)) and all(isinstance(name, str) for name in names)
        ):
            raise ValueError(f"{name} must be names, a regex or None, got {value!r}")
        if isinstance(value, str) and value != "all-linear":
            _compile(value, name)
        if isinstance(value, (list, tuple)):
            setattr(config, name, set(value))
    if isinstance(config.target_modules, str) and config.target_modules != "all-linear":
        for name in ("layers_to_transform", "layers_pattern"):
            if getattr(config, name) is not None:
                raise ValueError(f"`{name}` cannot be used when `target_modules` is a str.")
    layers = config.layers_to_transform
    if layers is not None and not all(_is_int(n) for n in (layers if isinstance(layers, (list, tuple)) else [layers])):
        raise ValueError(f"layers_to_transform must be an int or a list of ints, got {layers!r}")
    if config.layers_pattern and config.layers_to_transform is None:
        raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified. ")
    names = config.target_parameters
    if isinstance(names, str) or not all(isinstance(name, str) and name for name in names or ()):
        raise ValueError(f"target_parameters must be a list of parameter names or None, got {names!r}")
    if names is not None:
        config.target_parameters = sorted(set(names))


def _check_runtime(config: SMTConfig) -> None:
    if isinstance(config.selection, Path):
        config.selection = str(config.selection)
    if not isinstance(config.selection, (BlockSelection, str, type(None))):
        raise ValueError(
            f"selection must be a BlockSelection, the path of one, or None, got {type(config.selection).__name__}"
        )
    given = config.avoid if isinstance(config.avoid, (list, tuple)) else [config.avoid]
    given = [str(each) if isinstance(each, Path) else each for each in given]
    if not all(isinstance(each, (BlockSelection, str, type(None))) for each in given):
        raise ValueError(f"avoid must be a BlockSelection, the path of one, a list of these, or None, got {given}")
    config.avoid = given or None if isinstance(config.avoid, (list, tuple)) else given[0]
    if not _is_int(config.seed):
        raise ValueError(f"seed must be an int, got {config.seed!r}")
    damaged = "adapter_config.json is damaged, restore it or save the adapter again"
    if not isinstance(config.block_pattern or {}, dict):
        raise ValueError(f"block_pattern must be a map, got {config.block_pattern!r}; {damaged}")
    values = config.base_fingerprint or {}
    if not isinstance(values, dict) or not all(_is_sample(row) for row in values.values()):
        raise ValueError(f"base_fingerprint must map modules to lists of floats; {damaged}")
    if not isinstance(config.base_quantization or {}, dict):
        raise ValueError(f"base_quantization must be a map, got {config.base_quantization!r}; {damaged}")
    for name, entry in (config.block_pattern or {}).items():
        valid = isinstance(entry, (list, tuple)) and len(entry) == 3 and all(_is_int(n) and n > 0 for n in entry)
        if not valid:
            raise ValueError(
                f"block_pattern[{name!r}] must be [num_blocks, rows, cols], three positive ints, got "
                f"{entry!r}; {damaged}"
            )


def _check_reuse(config: SMTConfig) -> None:
    """Before `density` gets its default: then it shows whether it was given."""
    if isinstance(config.selection, BlockSelection):
        config.check_agreement(config.selection)
    elif config.selection is not None and Path(config.selection).is_file():
        config.check_agreement(BlockSelection.load(config.selection))


def _check_coupled(config: SMTConfig) -> None:
    if config.coupled is None:
        return
    if config.coupled not in COUPLED:
        raise ValueError(
            "coupled must be 'both' (all of a channel trains), 'consumers' (its columns alone) or None, "
            f"got {config.coupled!r}"
        )
    against = {
        "block_size": (config.block_size != "auto", "a channel has the shape that its matrices give it"),
        "num_blocks": (config.num_blocks is not None, "blocks of a channel differ in size; set density"),
        "spread": (config.spread == "capped", "a channel is one whole stripe"),
        "budget": (isinstance(config.budget, Mapping), "take 'per_module', 'per_layer' or 'global'"),
        "max_column_share": (config.max_column_share is not None, "density is the share of the columns"),
        "max_lora_rank": (config.max_lora_rank is not None, "density bounds the rank: one per row or column"),
        "avoid": (config.avoid is not None, "a channel is chosen whole, whatever single blocks others have"),
        "target_parameters": (config.target_parameters is not None, "channels of bare parameters are not known"),
        "score": (config.score == "diagonal", "whole rows and columns have no diagonal; take 'random'"),
    }
    for name, (given, reason) in against.items():
        if given:
            value = "" if name == "avoid" else f"={getattr(config, name)!r}"
            raise ValueError(
                f"{name}{value} contradicts coupled={config.coupled!r}: {reason}. Leave {name} out, or coupled"
            )


def _check_amount(config: SMTConfig) -> None:
    if config.density is None and config.num_blocks is None:
        config.density = DEFAULT_DENSITY
    if config.density is not None and config.num_blocks is not None:
        raise ValueError(f"both density={config.density} and num_blocks={config.num_blocks} are set; keep one of them")
    if config.density is not None:
        _check_share("density", config.density)
    elif not _is_int(config.num_blocks) or config.num_blocks < 1:
        raise ValueError(f"num_blocks must be a positive int, got {config.num_blocks!r}")
    _check_density_pattern(config)
    _check_block_size(config)
    if config.max_column_share is not None:
        _check_share("max_column_share", config.max_column_share)
    if config.max_lora_rank is not None and (not _is_int(config.max_lora_rank) or config.max_lora_rank < 1):
        raise ValueError(f"max_lora_rank must be a positive int, got {config.max_lora_rank!r}")


def _check_choice(config: SMTConfig) -> None:
    if not callable(config.score) and not str(config.score).startswith(CALLABLE_PREFIX):
        _check_name("score", config.score, SCORES)
    _check_name("spread", config.spread, SPREADS)
    _check_name("forward", config.forward, FORWARDS)
    _check_name("saved_activations", config.saved_activations, SAVED_ACTIVATIONS)
    if not isinstance(config.budget, Mapping):
        _check_name("budget", config.budget, BUDGETS)
        return
    if not config.budget:
        raise ValueError("budget is an empty map; give {regex: share} entries or one of " + ", ".join(BUDGETS))
    for pattern, share in config.budget.items():
        _compile(pattern, "budget")
        _check_share(f"budget[{pattern!r}]", share)
    if sum(config.budget.values()) > 1 + 1e-9:
        raise ValueError(
            f"the shares of budget add up to {sum(config.budget.values()):g}; they divide one budget, "
            "so lower them to at most 1 in total"
        )


def _check_low_rank(config: SMTConfig) -> None:
    if config.lora_rank is None:
        for name, default in (("lora_alpha", None), ("lora_dropout", 0.0)):
            if getattr(config, name) != default:
                raise ValueError(
                    f"{name}={getattr(config, name)!r} has no effect without lora_rank; set lora_rank, or leave "
                    f"{name} out"
                )
        return
    if not _is_int(config.lora_rank) or config.lora_rank < 1:
        raise ValueError(f"lora_rank must be a positive int or None, got {config.lora_rank!r}")
    if config.lora_alpha is not None and not (_is_number(config.lora_alpha) and 0 < config.lora_alpha < math.inf):
        raise ValueError(f"lora_alpha must be a number above 0 or None, got {config.lora_alpha!r}")
    if not _is_number(config.lora_dropout) or not 0 <= config.lora_dropout < 1:
        raise ValueError(f"lora_dropout must be at least 0 and below 1, got {config.lora_dropout!r}")
    if config.max_lora_rank is not None and config.max_block_rank < 1:
        raise ValueError(
            f"max_lora_rank={config.max_lora_rank} is the rank of blocks and low-rank pair together, and "
            f"lora_rank={config.lora_rank} leaves none of it to the blocks; raise max_lora_rank, or lower lora_rank"
        )
    if config.avoid is not None:
        raise ValueError(
            f"avoid keeps clear of the weights of others, but lora_rank={config.lora_rank} puts a low-rank pair beside "
            "the blocks, which changes all weights of a module; leave one of them out"
        )
    if config.target_parameters:
        raise ValueError(
            f"lora_rank={config.lora_rank} puts a low-rank pair beside the blocks of linear layers, and "
            f"target_parameters={config.target_parameters} names bare parameters; leave one of them out"
        )


def _check_density_pattern(config: SMTConfig) -> None:
    pattern = config.density_pattern
    if pattern is None:
        return
    if not isinstance(pattern, Mapping) or not pattern:
        raise ValueError(f"density_pattern must be {{regex: density}} entries or None, got {pattern!r}")
    if config.num_blocks is not None:
        raise ValueError(
            "density_pattern counts weights, but num_blocks counts blocks; set density instead of num_blocks"
        )
    for key, density in pattern.items():
        _compile(key, "density_pattern")
        _check_share(f"density_pattern[{key!r}]", density)


def _check_block_size(config: SMTConfig) -> None:
    size = config.block_size
    if size == "auto":
        if config.density is None:
            raise ValueError(
                "block_size='auto' follows from density, but num_blocks is set; give block_size a number, "
                "e.g. 64, or set density instead of num_blocks"
            )
        return
    sides = [size, size] if _is_int(size) else size
    if not isinstance(sides, (list, tuple)) or len(sides) != 2 or not all(_is_int(side) for side in sides):
        raise ValueError(f"block_size must be 'auto', an int or (rows, cols), got {size!r}")
    if any(side < 1 and side != -1 for side in sides):
        raise ValueError(f"block_size must be positive, or -1 for the whole side, got {size!r}")
    if not _is_int(size):
        config.block_size = list(size)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_sample(row: Any) -> bool:
    """Whether this is a `fingerprint.Sample`: floats, or pairs of floats."""
    if not isinstance(row, list):
        return False
    pairs = [value if isinstance(value, list) else [value, 0.0] for value in row]
    return len({type(value) for value in row}) <= 1 and all(
        len(pair) == 2 and all(isinstance(value, float) for value in pair) for pair in pairs
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_share(name: str, value: Any) -> None:
    if not _is_number(value) or not 0 < value <= 1:
        raise ValueError(f"{name} must be above 0 and at most 1 (a share, 0.01 is 1 %), got {value!r}")


def _check_name(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value in known:
        return
    near = difflib.get_close_matches(str(value), known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"unknown {name} {value!r}; {hint}known are {', '.join(known)}")


def _compile(pattern: str, name: str) -> None:
    if not isinstance(pattern, str):
        raise ValueError(f"{name} {pattern!r} is no regular expression; write it as text")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{name} {pattern!r} is no valid regular expression ({error})") from error
