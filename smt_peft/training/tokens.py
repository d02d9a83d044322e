"""The rows of a run as token ids, made by TRL's own code."""

from __future__ import annotations

import copy
import os

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from .data import Data
from .errors import ConfigError
from .model import passes_as_adapted
from .schema import Run


class _Weightless(SFTConfig):
    """Settings of a trainer that leaves a model where it is, on the meta device too."""

    place_model_on_device = False


def check_rows(run: Run, tokenizer: PreTrainedTokenizerBase, rows: Dataset) -> None:
    """Refuse rows that the settings do not fit.

    Raises:
        ConfigError: names the key and the repair.
    """
    columns = set(rows.column_names)
    if "messages" in columns and tokenizer.chat_template is None and not run.trainer.chat_template_path:
        raise ConfigError(
            "dataset_path holds messages, but the tokenizer has no chat template; name one in chat_template_path"
        )
    if run.trainer.completion_only_loss and not columns & {"completion", "labels"}:
        # TRL would train on every token and say nothing.
        repair = "write assistant_only_loss: true" if "messages" in columns else "leave it out"
        raise ConfigError(f"completion_only_loss needs rows of prompt and completion, not {sorted(columns)}; {repair}")


def tokenising_trainer(run: Run, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: Data) -> SFTTrainer:
    """A trainer without an adapter, whose data sets are tokenised as the training will see them.

    Args:
        run: whose settings say how.
        model: the base; on the meta device, it stays there, and nothing is written or sent.
        tokenizer: may be given a chat template by the settings.
        data: from `load_data`.

    Raises:
        ConfigError: TRL refuses the rows, or no row keeps a token to learn from.
    """
    args = copy.copy(run.trainer)
    if model.device.type == "meta":
        args.__class__ = _Weightless
        # A trainer makes its directory, and a repository on the Hub, as soon as it is built.
        args.output_dir, args.push_to_hub, args.report_to = os.curdir, False, []
    with passes_as_adapted(model):
        try:
            trainer = SFTTrainer(
                model=model,
                args=args,
                train_dataset=data.train,
                eval_dataset=data.evaluation,
                processing_class=tokenizer,
            )
        except (ValueError, RuntimeError) as error:
            raise ConfigError(f"the rows cannot be turned into tokens as the settings say: {error}") from error
    if len(trainer.train_dataset) == 0:
        raise ConfigError(
            f"max_length: no row keeps a token to learn from within {run.trainer.max_length} tokens; raise max_length"
        )
    return trainer
