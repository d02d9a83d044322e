"""What `smt train` would do, told without reading a weight or writing a file."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from datasets import IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer
from transformers.utils.logging import disable_progress_bar

from ..bases.targets import find_targets
from ..selection.avoid import avoided_blocks
from ..selection.budget import check_room, make_scopes
from ..selection.experts import matrices
from . import outputs
from .data.load import Data
from .errors import ConfigError
from .tasks.table import task_of
from .tell import tell
from .yaml.schema import Run
from .yaml.settings import render_settings

FIRST_ROWS = 64


def dry_run(run: Run, planned: Callable[[Run], str] | None = None) -> None:
    """Print the settings, the data set, the targets, the memory and one sample.

    Args:
        run: from `yaml.schema.load_run`.
        planned: says what memory a run takes; a function, as the room that knows it stands above this one.

    Raises:
        ConfigError: what `train` would refuse as well, as far as it shows without weights.
    """
    disable_progress_bar()
    outputs.check_output_dir(run)
    tell(render_settings(run))
    task = task_of(run)
    tokenizer = task.load_tokenizer(run)
    data = task.load_data(run, tokenizer)
    model = task.weightless(run, data)
    tell(_targets(run, model))
    if planned is not None:
        tell("\n" + planned(run) + "\n")
    tell(task.sample(_tokenised(run, model, tokenizer, data), tokenizer))


def _tokenised(run: Run, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: Data) -> Trainer:
    """The first rows alone, if they hold one to learn from: all would take as long as in a training."""
    rows = FIRST_ROWS if isinstance(data.train, IterableDataset) else min(FIRST_ROWS, len(data.train))
    few = replace(data, train=data.train.take(rows), evaluation=None)
    try:
        return task_of(run).tokenising_trainer(run, model, tokenizer, few)
    except ConfigError:
        return task_of(run).tokenising_trainer(run, model, tokenizer, replace(data, evaluation=None))


def _targets(run: Run, model: PreTrainedModel) -> str:
    """What the `smt:` block names, and how much of it may be trained."""
    try:
        targets = find_targets(model, run.smt)
        grids = {name: matrix.grid(run.smt) for name, matrix in matrices(targets).items()}
        scopes = make_scopes(grids, run.smt)
        if run.smt.avoid is not None:
            blocked = avoided_blocks(run.smt, targets, grids)
            for scope in scopes:
                check_room(scope, grids, blocked)
    except ValueError as error:
        raise ConfigError(f"smt: {error}") from error
    weights = sum(grid.numel for grid in grids.values())
    budget = sum(scope.budget for scope in scopes)
    unit = "blocks" if run.smt.num_blocks is not None else "weights"
    return f"smt: {len(grids):,} matrices of {weights:,} weights ({_kinds(grids)}), a budget of {budget:,} {unit}"


def _kinds(names: Iterable[str]) -> str:
    """`q_proj 2, experts.down_proj 8`: how many there are of each name, layers and experts aside."""
    counts: dict[str, int] = {}
    for name in names:
        kind = name.partition("[")[0].rpartition(".")[2]
        counts[kind] = counts.get(kind, 0) + 1
    return ", ".join(f"{kind} {count:,}" for kind, count in counts.items())
