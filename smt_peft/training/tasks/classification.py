"""Classification of texts, or of pairs of texts, by Transformers' own `Trainer`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from datasets import Dataset
from peft import PeftConfig, get_peft_model
from transformers import (
    AutoConfig,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
)

from ..data.labelled import classes_of, labelled
from ..data.load import Data, read_evaluation, read_train
from ..data.read import Reading
from ..errors import ConfigError
from ..model import Head, load_base, load_tokenizer, passes_as_adapted
from ..stopping.trainer import safe
from ..tell import tell
from ..tokens import at_rest
from .arguments import ClassificationConfig
from .task import Prepared, Task, evaluated

if TYPE_CHECKING:
    from ..yaml.schema import Run

SHOWN = 10
# A tokenizer that knows no longest row says 1e30.
NO_LIMIT = 2**31
_HEADS = ("classifier", "score")
_MEASURES = {"eval_loss": "eval_loss", "accuracy": "eval_accuracy", "f1": "eval_f1"}


@dataclass
class Labelled(Data):
    """Rows of `text`, with or without `text_pair`, and `label`, the name of one of `classes`."""

    classes: tuple[str, ...] = ()


class Classification(Task):
    def load_tokenizer(self, run: Run) -> PreTrainedTokenizerBase:
        return load_tokenizer(run.config.model_name_or_path, generates=False)

    def load_data(self, run: Run, tokenizer: PreTrainedTokenizerBase) -> Labelled:
        trainer = run.trainer
        form = labelled(trainer.dataset_text_field, trainer.dataset_text_pair_field, trainer.dataset_label_field)
        reading = Reading(on_broken_row=run.config.on_broken_row, forms={form.name: form})
        train = read_train(run.config, trainer.seed, reading)
        try:
            classes = _in_order_of(run.config.model_name_or_path, classes_of(train.unique("label")))
        except ConfigError as error:
            raise ConfigError(f"{trainer.dataset_label_field}: {error}") from error
        names = ", ".join(classes[:SHOWN]) + ", ..." * (len(classes) > SHOWN)
        tell(f"{len(classes)} classes: {names}")
        also = partial(_unknown_label, classes=frozenset(classes))
        reading = Reading(on_broken_row=run.config.on_broken_row, forms={form.name: form}, also=also)
        return Labelled(train, read_evaluation(run.config, trainer.seed, reading), classes)

    def head(self, data: Labelled) -> Head:
        return Head("SEQ_CLS", data.classes)

    def load_model(self, run: Run, data: Labelled, device: torch.device | str) -> PreTrainedModel:
        """As of `Task`; what the checkpoint has no weights for is added to `run.smt.modules_to_save`.

        Its values are random and another time others, so they have to be saved with the adapter.
        """
        model, missing = load_base(run.config, device, self.head(data))
        _train_in_full(run, model, missing)
        return model

    def weightless(self, run: Run, data: Labelled) -> PreTrainedModel:
        model = super().weightless(run, data)
        _train_in_full(run, model)
        return model

    def tokenising_trainer(
        self, run: Run, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: Labelled
    ) -> Trainer:
        if model.config.get_text_config().pad_token_id is None:
            # A decoder's head reads the last token that is no padding.
            model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        args = at_rest(run.trainer, model)
        limit = min(args.max_length or NO_LIMIT, tokenizer.model_max_length)
        tokenise = partial(_tokenised, tokenizer=tokenizer, limit=limit, classes=data.classes)
        train, evaluation = (
            rows and _mapped(rows, tokenise, args.dataset_num_proc) for rows in (data.train, data.evaluation)
        )
        with passes_as_adapted(model):
            return _trainer(model, args, train, evaluation, tokenizer)

    def trainer(
        self,
        prepared: Prepared,
        args: ClassificationConfig,
        config: PeftConfig,
        callbacks: Iterable[TrainerCallback],
        mixins: Sequence[type] = (),
    ) -> Trainer:
        model = get_peft_model(prepared.model, config)
        settings = model.peft_config["default"]
        # PEFT names the head once more than the run.
        settings.modules_to_save = list(dict.fromkeys(settings.modules_to_save))
        if (args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            model.enable_input_require_grads()
        rows = prepared.train_set, prepared.eval_set
        return _trainer(model, args, *rows, prepared.tokenizer, list(callbacks), mixins)

    def measure(self, run: Run, prepared: Prepared, trainer: Trainer, label: str) -> dict[str, float]:
        """`eval_loss`, `accuracy`, and `f1`, the mean over the classes."""
        if prepared.eval_set is None:
            return {}
        found = evaluated(trainer)
        return {name: found[key] for name, key in _MEASURES.items()}

    def sample(self, trainer: Trainer, tokenizer: PreTrainedTokenizerBase) -> str:
        row = next(iter(trainer.train_dataset))
        ids, name = row["input_ids"], trainer.model.config.id2label[row["labels"]]
        return f"one sample, {len(ids):,} tokens, of the class {name!r}:\n{tokenizer.decode(ids)}"

    def probes(self, rows: Iterable[dict]) -> list[list[int]]:
        return [row["input_ids"] for row in rows]


def scores(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy, and the F1 of each class that is there or was said, averaged over these classes.

    Args:
        prediction: of logits (rows, classes) and labels (rows,).
    """
    logits, labels = prediction.predictions, prediction.label_ids
    said = np.argmax(logits[0] if isinstance(logits, tuple) else logits, axis=-1)
    each = []
    for number in np.union1d(said, labels):
        hits = np.sum((said == number) & (labels == number))
        each.append(2 * hits / (np.sum(said == number) + np.sum(labels == number)))
    return {"accuracy": float(np.mean(said == labels)), "f1": float(np.mean(each))}


def _trainer(
    model: PreTrainedModel,
    args: ClassificationConfig,
    train: Dataset,
    evaluation: Dataset | None,
    tokenizer: PreTrainedTokenizerBase,
    callbacks: list[TrainerCallback] | None = None,
    mixins: Sequence[type] = (),
) -> Trainer:
    return safe(Trainer, *mixins)(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=scores,
        callbacks=callbacks,
    )


def _train_in_full(run: Run, model: PreTrainedModel, missing: Iterable[str] = ()) -> None:
    """Name the head, and what else has no weights in the checkpoint, among the modules that train in full."""
    names = [name for name, _ in model.named_children() if name in _HEADS]
    others = {key.rpartition(".")[0]: None for key in sorted(missing) if key.partition(".")[0] not in names}
    given = run.smt.modules_to_save or []
    run.smt.modules_to_save = list(dict.fromkeys([*given, *names, *others]))
    if others:
        tell(f"the checkpoint has no weights of {', '.join(others)}, so that trains in full, as the head does")


def _mapped(rows: Dataset, tokenise, processes: int | None) -> Dataset:
    return rows.map(tokenise, batched=True, num_proc=processes, remove_columns=rows.column_names)


def _tokenised(batch: dict, tokenizer: PreTrainedTokenizerBase, limit: int, classes: tuple[str, ...]) -> dict:
    """Token ids, and whatever else the tokenizer says the model takes."""
    numbers = {name: number for number, name in enumerate(classes)}
    found = tokenizer(batch["text"], batch.get("text_pair"), truncation=True, max_length=limit)
    return {**found, "labels": [numbers[name] for name in batch["label"]]}


def _unknown_label(row: dict, classes: frozenset[str]) -> str | None:
    return None if row["label"] in classes else f"no row of the training set has the label {row['label']!r}"


def _in_order_of(name: str, classes: tuple[str, ...]) -> tuple[str, ...]:
    """The classes as a checkpoint that knows them by these names has them, whose head then fits."""
    known = tuple(AutoConfig.from_pretrained(name).id2label.values())
    return known if set(known) == set(classes) and len(known) == len(classes) else classes
