"""The keys of a run and their types: its trainer's own, a few of ours, `SMTConfig`'s in the `smt:` block, and those of
each schedule in a block of its name."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, get_type_hints

from transformers import TrainingArguments
from transformers.training_args import OptimizerNames
from trl import DPOConfig, SFTConfig

from ...config import RECORDED, SMTConfig
from ...schedules import SCHEDULES, Schedule
from ...selection.warmup import WARMUP_BATCHES
from ..data.forms import FORMS
from ..data.labelled import labelled
from ..data.preferences import PREFERENCES
from ..tasks.arguments import ClassificationConfig
from .aliases import ALIASES

AUTO = "auto"
# What is a map of settings of its own, by its name, and whose settings.
BLOCKS: dict[str, type] = {"smt": SMTConfig, **SCHEDULES}
TRAINER_OPTIMIZERS = tuple(name.value for name in OptimizerNames)
# What `optim` may be besides the trainer's own: `SMTAdamW`, by the `state_dtype` of its moments.
SMT_OPTIMIZERS = {"smt_adamw": "float32", "smt_adamw_bf16": "bfloat16", "smt_adamw_8bit": "8bit"}
# Besides: `MeZO`, which does without a backward pass.
MEZO = "mezo"
OWN_OPTIMIZERS = (*SMT_OPTIMIZERS, MEZO)
# Defaults of the trainers that are about gradients, as they are with it.
WITHOUT_GRADIENTS = {"gradient_checkpointing": False, "max_grad_norm": 0.0}
# The settings of the trainer of each task; the first is the default.
TRAINERS: dict[str, type[TrainingArguments]] = {
    "sft": SFTConfig,
    "dpo": DPOConfig,
    "classification": ClassificationConfig,
}
# The forms that rows of each task may have.
TASK_FORMS = {"sft": tuple(FORMS), "dpo": (PREFERENCES.name,), "classification": (labelled().name,)}
# The head that PEFT knows a model of each task by.
TASK_TYPES = {"sft": "CAUSAL_LM", "dpo": "CAUSAL_LM", "classification": "SEQ_CLS"}
# Fields of these that would do nothing here, or something unsafe, or that no YAML can hold.
INEFFECTIVE = {
    "trust_remote_code",
    "model_init_kwargs",
    "do_train",
    "do_eval",
    "do_predict",
    "local_rank",
    "parallelism_config",
}
# The same of one task: not with an adapter, or not in TRL 1.16, or under another name.
_INEFFECTIVE_IN = {
    "dpo": {"sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps", "padding_free", "pad_token"}
}
# A layer that stores its weight transposed says so itself.
_INTERNAL = RECORDED | {"fan_in_fan_out"}


@dataclass
class RunConfig:
    """The keys of a run that are neither TRL's nor SMT's.

    Args:
        model_name_or_path: the base model: a local directory or a name on the Hub.
        preset: settings of a paper, by name (`smt_peft/presets`); keys that are given change them.
        task: what is learned: the next tokens of texts and answers (`sft`), which of two answers is the better one
            (`dpo`), or the class of a text (`classification`).
        dtype: of the base weights; None stands for float32 on a CPU and `"auto"` (the checkpoint's own) elsewhere.
        load_in_4bit: quantise the base to 4 bits with bitsandbytes while it is loaded; `dtype` is then that of the
            computation.
        load_in_8bit: the same to 8 bits.
        bnb_4bit_quant_type: the 4-bit code.
        bnb_4bit_use_double_quant: keep the scales of 4-bit weights in 8 bits.
        dataset_path: one or more local files: jsonl, json, csv or parquet.
        dataset_name: a data set on the Hub, instead of `dataset_path`.
        dataset_config: its configuration, where it has several.
        dataset_train_split: the split of `dataset_name` to train on.
        dataset_test_split: the split of `dataset_name` to evaluate on.
        eval_dataset_path: local files to evaluate on.
        dataset_mixture: several sources to train on, instead of either: each with `path` (local files) or `name` (with
            `config` and `split`), with its `format`, and with a `weight` to draw by, or without to take all rows.
        dataset_mixture_stopping_strategy: where the draw ends: as soon as one source has run out, so that no row comes
            twice; or when all have, smaller ones over and over.
        dataset_format: the form of the rows; `"auto"`: by their columns.
        dataset_streaming: read the training rows as they are needed, in their order; takes `max_steps`.
        on_broken_row: stop at the first row that cannot be used, or skip all of them and say how many.
        eval_exact_match: complete the prompts of the evaluation set greedily, before and after training, and count
            the completions that equal the expected one, surrounding blanks aside.
        generation_max_new_tokens: length limit of such a completion.
        generation_batch_size: prompts completed at once.
        compare_lora: train PEFT's LoRA too, from the same base, on the same modules with as many trainable weights.
        compare_lora_learning_rate: its learning rate; None stands for `learning_rate`.
        verify: read the saved adapter back in a fresh process and compare.
        mezo_eps: with `optim: mezo`, how far weights are displaced to measure the loss.
        mezo_samples: with `optim: mezo`, random directions of a step; each takes two forward passes.
    """

    model_name_or_path: str
    preset: str | None = None
    task: Literal["sft", "dpo", "classification"] = "sft"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None
    load_in_4bit: bool = False
    load_in_8bit: bool = False
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    bnb_4bit_use_double_quant: bool = False
    dataset_path: str | list[str] | None = None
    dataset_name: str | None = None
    dataset_config: str | None = None
    dataset_train_split: str = "train"
    dataset_test_split: str | None = None
    eval_dataset_path: str | list[str] | None = None
    dataset_mixture: list[dict[str, Any]] | None = None
    dataset_mixture_stopping_strategy: Literal["first_exhausted", "all_exhausted"] = "first_exhausted"
    dataset_format: Literal[
        "auto",
        "tokenised",
        "messages",
        "sharegpt",
        "prompt/completion",
        "alpaca",
        "text",
        "preference",
        "text/label",
    ] = AUTO
    dataset_streaming: bool = False
    on_broken_row: Literal["stop", "skip"] = "stop"
    eval_exact_match: bool = False
    generation_max_new_tokens: int = 64
    generation_batch_size: int = 64
    compare_lora: bool = False
    compare_lora_learning_rate: float | None = None
    verify: bool = True
    mezo_eps: float = 1e-3
    mezo_samples: int = 1


@dataclass
class Warmup:
    """The keys of the `smt:` block that are not the tuner's.

    Args:
        selection: `auto`, or the path of a selection file.
        warmup_batches: batches that the selection looks at; of several processes, each looks at as many.
    """

    selection: str = AUTO
    warmup_batches: int = WARMUP_BATCHES


def known_keys(task: str = "sft") -> dict[str, Any]:
    """Every key of a run with its type; those of a nested block start with its name, `smt.density`."""
    owner = TRAINERS[task]
    theirs = get_type_hints(owner)
    left_out = INEFFECTIVE | _INEFFECTIVE_IN.get(task, set()) | ALIASES.keys()
    hints = {field.name: theirs[field.name] for field in fields(owner) if field.name not in left_out}
    hints["resume_from_checkpoint"] = bool | str | None
    if task == "dpo":
        # A single one need not be a list.
        hints["loss_type"] = str | list[str]
    smt = get_type_hints(SMTConfig)
    smt = {field.name: smt[field.name] for field in fields(SMTConfig) if field.name not in _INTERNAL}
    smt |= get_type_hints(Warmup) | {"score": str}
    blocks = {"smt": smt, **{name: _settings(schedule) for name, schedule in SCHEDULES.items()}}
    nested = {f"{block}.{name}": hint for block, settings in blocks.items() for name, hint in settings.items()}
    return hints | get_type_hints(RunConfig) | nested


def _settings(schedule: type[Schedule]) -> dict[str, Any]:
    theirs = get_type_hints(schedule)
    return {field.name: theirs[field.name] for field in fields(schedule)}


def tasks_with(key: str) -> list[str]:
    """The tasks that know a key."""
    return [task for task in TRAINERS if key in known_keys(task)]


def is_ineffective(key: str, task: str) -> bool:
    """Whether a key of the trainer has no effect in a run."""
    return key in INEFFECTIVE | _INEFFECTIVE_IN.get(task, set())
