"""Trainers that turn rows into token ids and train nothing."""

from __future__ import annotations

import copy
import os

from transformers import IntervalStrategy, PreTrainedModel, TrainingArguments


def at_rest(args: TrainingArguments, model: PreTrainedModel) -> TrainingArguments:
    """Settings for such a trainer: a model on the meta device stays there, and nothing is written or sent."""
    args = copy.copy(args)
    # A trainer that is to evaluate insists on rows to evaluate on.
    args.eval_strategy = IntervalStrategy.NO
    if model.device.type == "meta":
        args.__class__ = type("Weightless", (type(args),), {"place_model_on_device": False})
        # A trainer makes its directory, and a repository on the Hub, as soon as it is built.
        args.output_dir, args.push_to_hub, args.report_to = os.curdir, False, []
    return args
