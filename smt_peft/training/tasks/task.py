"""What a run does differently for each kind of learning."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments

from ..data.load import Data
from ..launched import unprepare
from ..model import Head, load_base, load_tokenizer, weightless

if TYPE_CHECKING:
    from ..yaml.schema import Run

LossFunction = Callable[[nn.Module, Any], Tensor]


@dataclass
class Prepared:
    """Everything a training needs: the base model, its tokenizer, the rows as read, and as token ids.

    Args:
        model: the base, without an adapter.
        tokenizer: of the run.
        data: the rows.
        trainer: without an adapter, whose data sets are what the training will see.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    data: Data
    trainer: Trainer

    @property
    def train_set(self) -> Dataset | IterableDataset:
        return self.trainer.train_dataset

    @property
    def eval_set(self) -> Dataset | None:
        return self.trainer.eval_dataset


class Task(ABC):
    """One kind of learning: its data, its trainer and its measures. The model has the head that `head` says."""

    def load_tokenizer(self, run: Run) -> PreTrainedTokenizerBase:
        return load_tokenizer(run.config.model_name_or_path)

    @abstractmethod
    def load_data(self, run: Run, tokenizer: PreTrainedTokenizerBase) -> Data:
        """The rows of a run, checked; as `data.load.load_data`."""

    def head(self, data: Data) -> Head:
        """What the base model ends in."""
        return Head()

    def load_model(self, run: Run, data: Data, device: torch.device | str) -> PreTrainedModel:
        """The base model with weights, on a device."""
        model, _ = load_base(run.config, device, self.head(data))
        return model

    def weightless(self, run: Run, data: Data) -> PreTrainedModel:
        """The base model on the meta device."""
        return weightless(run.config, self.head(data))

    @abstractmethod
    def tokenising_trainer(
        self, run: Run, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: Data
    ) -> Trainer:
        """A trainer without an adapter, whose data sets are tokenised as the training will see them.

        Raises:
            ConfigError: the rows cannot be turned into tokens, or none keeps something to learn from.
        """

    def warm_up_loss(self, prepared: Prepared) -> LossFunction | None:
        """The loss by which blocks are scored; None: the model's own."""
        return None

    @abstractmethod
    def trainer(
        self,
        prepared: Prepared,
        args: TrainingArguments,
        config: PeftConfig,
        callbacks: Iterable[TrainerCallback],
        mixins: Sequence[type] = (),
    ) -> Trainer:
        """A trainer over the tokenised rows, with an adapter on the base model; `mixins` as `safe` takes them."""

    @abstractmethod
    def measure(self, run: Run, prepared: Prepared, trainer: Trainer, label: str) -> dict[str, float]:
        """What the model of a trainer achieves on the evaluation set, as far as the run asks for it."""

    @abstractmethod
    def sample(self, trainer: Trainer, tokenizer: PreTrainedTokenizerBase) -> str:
        """The first row that a trainer would train on, as a person reads it."""

    @abstractmethod
    def probes(self, rows: Iterable[dict]) -> list[list[int]]:
        """Token ids of a few rows, by which a saved adapter is compared with the one in memory."""


def evaluated(trainer: Trainer) -> dict[str, float]:
    """The metrics of the evaluation set, which leave no trace in the trainer."""
    history = list(trainer.state.log_history)
    found = trainer.evaluate()
    unprepare(trainer.model)
    trainer.state.log_history = history
    return found
