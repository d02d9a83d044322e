"""The settings of a trainer of classifiers."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import TrainingArguments


@dataclass
class ClassificationConfig(TrainingArguments):
    """Transformers' `TrainingArguments`, and what there is to say of rows with a label.

    Args:
        max_length: tokens of a row at most, the rest is cut off; None: as many as the tokenizer says the model takes.
        dataset_text_field: the column of the text.
        dataset_text_pair_field: the column of a second text, the hypothesis to a premise; None: `text_pair`, if there
            is one.
        dataset_label_field: the column of the class.
        dataset_num_proc: processes that turn rows into tokens; None: this one.
        logging_steps: steps between two logs; below 1 a share of all steps.
    """

    max_length: int | None = 512
    dataset_text_field: str = "text"
    dataset_text_pair_field: str | None = None
    dataset_label_field: str = "label"
    dataset_num_proc: int | None = None
    logging_steps: float = 10
