"""The rows of a run as token ids, made by TRL's own code."""

from __future__ import annotations

import copy
import os

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from .data.load import Data
from .errors import ConfigError
from .model import passes_as_adapted
from .schema import Run


class _Weightless(SFTConfig):
    """Settings of a trainer that leaves a model where it is, on the meta device too."""

    place_model_on_device = False


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
    if next(iter(trainer.train_dataset), None) is None:
        raise ConfigError(
            f"max_length: no row keeps a token to learn from within {run.trainer.max_length} tokens; raise max_length"
        )
    return trainer
