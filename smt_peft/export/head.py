"""What a model ends in: the logits of a language model, or the classes of a classifier."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

# The names of the classes of a classifier by their numbers, which no adapter holds itself.
LABELS = "labels.json"
# How Transformers calls the layer that gives the classes, in the order in which models have them.
_LAYERS = ("classifier.out_proj.weight", "classifier.weight", "score.weight")


@dataclass(frozen=True)
class Head:
    """What a base model ends in.

    Args:
        task_type: as PEFT calls it: `CAUSAL_LM`, or `SEQ_CLS`, whose head is made anew unless the checkpoint has it.
        labels: the names of the classes of `SEQ_CLS`, in their order.
    """

    task_type: str = "CAUSAL_LM"
    labels: tuple[str, ...] = ()

    @property
    def auto_class(self) -> type:
        return AutoModelForCausalLM if self.task_type == "CAUSAL_LM" else AutoModelForSequenceClassification

    def settings(self) -> dict[str, Any]:
        """What a model's config is told of it."""
        if not self.labels:
            return {}
        return {
            "num_labels": len(self.labels),
            "id2label": dict(enumerate(self.labels)),
            "label2id": {label: number for number, label in enumerate(self.labels)},
            "problem_type": "single_label_classification",
        }


def head_of(directory: Path, task_type: str | None) -> Head:
    """The head that a saved adapter was trained with.

    Args:
        directory: of the adapter.
        task_type: as its config says; None: a causal language model.

    Raises:
        ValueError: of a classifier, neither `labels.json` nor the tensors of the adapter say how many classes it has.
    """
    if task_type != "SEQ_CLS":
        return Head()
    try:
        if (directory / LABELS).is_file():
            names = json.loads((directory / LABELS).read_text(encoding="utf-8"))
            return Head("SEQ_CLS", tuple(names[str(number)] for number in range(len(names))))
        with safe_open(directory / SAFETENSORS_WEIGHTS_NAME, framework="pt") as tensors:
            names = tensors.keys()
            layer = next(name for end in _LAYERS for name in names if name.endswith(end))
            count = tensors.get_slice(layer).get_shape()[0]
        return Head("SEQ_CLS", tuple(f"LABEL_{number}" for number in range(count)))
    except (StopIteration, KeyError, ValueError, OSError, SafetensorError) as error:
        raise ValueError(
            f"{directory} is an adapter of a classifier, but does not say its classes; write them into {LABELS}: "
            '{"0": "first", "1": "second"}'
        ) from error
