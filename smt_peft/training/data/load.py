"""The data of a run: its training set, and the set it is evaluated on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from datasets import Dataset, IterableDataset, disable_progress_bars, enable_progress_bars
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig

from ..errors import ConfigError
from ..tell import tell
from .broken import Broken
from .files import LocalFile
from .loss import check_loss, kind_of
from .mixture import mix
from .read import Reading, read_part
from .source import Source
from .stream import stream_parts
from .template import conversation_check

if TYPE_CHECKING:
    # Not at run time: the schema of a run asks the sources what is wrong with them.
    from ..yaml.keys import RunConfig

QUIET_ROWS = 50_000


@dataclass
class Data:
    """The rows of a run: `train`, and `evaluation` or None, in a form TRL reads."""

    train: Dataset | IterableDataset
    evaluation: Dataset | None


def load_data(config: RunConfig, trainer: SFTConfig, tokenizer: PreTrainedTokenizerBase) -> Data:
    """Read, check and convert the data of a run; prints one line per set.

    Args:
        config: of the run.
        trainer: whose `dataset_text_field`, `seed`, chat template and kinds of loss count here.
        tokenizer: of the base model.

    Raises:
        ConfigError: a row is broken (with its file and line), a set is empty, has no columns that are understood, or
            cannot say which of its tokens are to be learned.
    """
    reading = Reading(
        text_field=trainer.dataset_text_field,
        also=conversation_check(trainer, tokenizer),
        on_broken_row=config.on_broken_row,
    )
    train = read_train(config, trainer.seed, reading)
    evaluation = read_evaluation(config, trainer.seed, reading)
    for key, rows in (("the training set", train), ("the evaluation set", evaluation)):
        if rows is not None:
            check_loss(next(iter(rows)), key, trainer, tokenizer)
    if config.eval_exact_match and not {"prompt", "completion"} <= set(evaluation.column_names):
        raise ConfigError(
            "eval_exact_match compares completions, so it needs prompt/completion rows in the evaluation "
            f"set, which has {evaluation.column_names}; set eval_exact_match: false"
        )
    return Data(train, evaluation)


def read_train(config: RunConfig, seed: int, reading: Reading) -> Dataset | IterableDataset:
    """The sound rows of the training set; prints one line per source.

    Args:
        config: of the run.
        seed: of the draw from a mixture.
        reading: how rows are read, but for their form, which each source says.

    Raises:
        ConfigError: a row is broken (with its file and line), or there is none, or the columns are not understood.
    """
    disable_progress_bars()
    train = _read(_train_sources(config), "train set", config, seed, reading, streaming=config.dataset_streaming)
    if isinstance(train, Dataset) and len(train) > QUIET_ROWS:
        enable_progress_bars()
    return train


def read_evaluation(config: RunConfig, seed: int, reading: Reading) -> Dataset | None:
    """The same for the evaluation set; None where the run has none."""
    if config.eval_dataset_path is None and config.dataset_test_split is None:
        return None
    return _read([_evaluation_source(config)], "evaluation set", config, seed, reading)


def _train_sources(config: RunConfig) -> list[Source]:
    if config.dataset_mixture is not None:
        return [Source.of(entry) for entry in config.dataset_mixture]
    if config.dataset_path is not None:
        return [Source(path=_paths(config.dataset_path), format=config.dataset_format)]
    hub = {"name": config.dataset_name, "config": config.dataset_config, "split": config.dataset_train_split}
    return [Source(**hub, format=config.dataset_format)]


def _evaluation_source(config: RunConfig) -> Source:
    if config.eval_dataset_path is not None:
        return Source(path=_paths(config.eval_dataset_path), format=config.dataset_format)
    hub = {"name": config.dataset_name, "config": config.dataset_config, "split": config.dataset_test_split}
    return Source(**hub, format=config.dataset_format)


def _paths(paths: str | list[str]) -> str | tuple[str, ...]:
    return paths if isinstance(paths, str) else tuple(paths)


def _read(
    sources: list[Source], title: str, config: RunConfig, seed: int, reading: Reading, streaming: bool = False
) -> Dataset | IterableDataset:
    field = reading.text_field
    found = []
    for source in sources:
        reading = replace(reading, form=source.format)
        if streaming:
            rows, form = stream_parts(source.parts(), reading, f"{title}: {source.label}")
            tell(f"{title}: {source.label}, {form.name}, streamed in order")
        else:
            rows = _read_whole(source, reading, title, streamed=config.dataset_streaming, text_field=field)
        found.append(rows)
    weights = [source.weight for source in sources]
    labels = [source.label for source in sources]
    mixed = mix(
        found,
        labels,
        None if weights[0] is None else weights,
        seed,
        config.dataset_mixture_stopping_strategy,
        field,
    )
    if len(sources) > 1:
        shares = "all rows of each"
        if weights[0] is not None:
            shares = "drawn " + " : ".join(f"{weight / sum(weights):.3g}" for weight in weights)
        count = "" if streaming else f", {_rows(len(mixed))}"
        tell(f"{title}: a mixture of {len(sources)} sources as {kind_of(next(iter(mixed)))}, {shares}{count}")
    return mixed


def _read_whole(source: Source, reading: Reading, title: str, streamed: bool, text_field: str) -> Dataset:
    """The rows of a source; `streamed` fetches a split of the Hub alone, and not the whole data set."""
    broken = Broken(reading.on_broken_row)
    parts = source.parts()
    read = [read_part(part, reading, broken, isinstance(part, LocalFile) or not streamed) for part in parts]
    rows = mix([rows for rows, _ in read], [part.label for part in parts], text_field=text_field)
    names = " and ".join(dict.fromkeys(form.name for _, form in read))
    tell(f"{title}: {source.label}, {names}, {_rows(len(rows))}{broken}")
    return rows


def _rows(count: int) -> str:
    return f"{count:,} row{'s' * (count != 1)}"
