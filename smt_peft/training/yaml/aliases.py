"""The names that axolotl, LLaMA-Factory, older Transformers and the SMT paper's scripts have for keys of a run.

A name that means exactly what a key means is read as that key, converted where the values differ, and told in one line.
A name that means nearly that is refused, with what to write instead.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .source import Errors
from .values import faults


class Untranslatable(ValueError):
    """A value that has no counterpart here.

    Args:
        message: what to write instead.
        step: path of the guilty part inside the value, `0.type`.
    """

    def __init__(self, message: str, step: str = ""):
        super().__init__(message)
        self.step = step


@dataclass(frozen=True)
class Alias:
    """Another trainer's name for a key.

    Args:
        key: ours.
        hint: type of its values; None: that of the key.
        convert: our value of theirs; None: the same. Raises `Untranslatable`.
        note: what else there is to know about the translation.
    """

    key: str
    hint: Any = None
    convert: Callable[[Any], Any] | None = None
    note: str = ""


def _of(table: Mapping[Any, Any], advice: str) -> Callable[[Any], Any]:
    """Translates the values of a table, and refuses others with an advice."""

    def convert(value: Any) -> Any:
        if value not in table:
            raise Untranslatable(advice)
        return table[value]

    return convert


def _ratio(value: float) -> float:
    if not 0 <= value < 1:
        raise Untranslatable("a ratio is at least 0 and below 1; for a number of steps write warmup_steps")
    return value


# axolotl's names for rows whose columns say the same.
_TYPES = ("alpaca", "chat_template", "completion")


def _local_files(sets: list[dict[str, Any]]) -> list[str]:
    """The paths of axolotl's list of data sets, if each is a local file whose columns say what it is."""
    if not sets:
        raise Untranslatable("the list is empty; write dataset_path: FILE")
    for number, one in enumerate(sets):
        path = one.get("path")
        if not isinstance(path, str):
            raise Untranslatable("an entry needs the path of a local file; write dataset_path: FILE", str(number))
        if not Path(path).is_file():
            where = f"for a data set on the Hub write dataset_name: {path}, without a list"
            raise Untranslatable(f"there is no file {path}; {where}", f"{number}.path")
        if other := next((key for key in one if key not in ("path", "type", "ds_type")), None):
            raise Untranslatable(
                f"{other} is not understood; prepare the rows in a file and write dataset_path: FILE",
                f"{number}.{other}",
            )
        if one.get("type", "chat_template") not in _TYPES:
            raise Untranslatable(
                f"the type {one['type']!r} is not understood, only {', '.join(_TYPES)} are; make the rows "
                f"prompt/completion, messages or text, and write dataset_path: {path}",
                f"{number}.type",
            )
    return [one["path"] for one in sets]


_PRECISIONS = {"bf16-true": "bfloat16", "16-true": "float16", "32-true": "float32", "32": "float32", 32: "float32"}
# Theirs are taken of the gradient's signed sum over the warm-up; blocks of one size have one order by sum and by mean.
_CALCULATIONS = {"mean_abs": "mean_abs", "abs_mean": "grad_sum_abs", "L1": "grad_sum_abs"}

_PRECISION = Alias(
    "dtype",
    str | int,
    _of(_PRECISIONS, "for mixed precision write bf16: true (or fp16: true) and dtype: float32; for bf16 weights dtype"),
)
_INVERTED = Alias("completion_only_loss", bool, lambda value: not value)
_DATASETS = {
    "hint": list[dict[str, Any]],
    "convert": _local_files,
    "note": "the columns say what a row is, and no wording is put around them",
}
_CALCULATION = Alias(
    "smt.score",
    str,
    _of(_CALCULATIONS, "of mean_abs, abs_mean and L1 there is a counterpart; see score in docs/yaml.md"),
)

_STAGES = "of sft and dpo there is a counterpart; write task: sft, task: dpo or task: classification"
_LOSSES = "of sigmoid, hinge and ipo there is a counterpart; write loss_type, as TRL's DPOConfig has it"

ALIASES: dict[str, Alias] = {
    # what is learned
    "stage": Alias("task", str, _of({"sft": "sft", "dpo": "dpo"}, _STAGES)),
    "rl": Alias("task", str, _of({"dpo": "dpo"}, _STAGES)),
    "rl_beta": Alias("beta"),
    "dpo_beta": Alias("beta"),
    "pref_beta": Alias("beta"),
    "pref_loss": Alias("loss_type", str, _of({"sigmoid": "sigmoid", "hinge": "hinge", "ipo": "ipo"}, _LOSSES)),
    # the base model
    "base_model": Alias("model_name_or_path"),
    "model": Alias("model_name_or_path"),
    "torch_dtype": Alias("dtype", str | None, lambda value: value and value.removeprefix("torch.")),
    "precision": _PRECISION,
    # data and loss
    "datasets": Alias("dataset_path", **_DATASETS),
    "test_datasets": Alias("eval_dataset_path", **_DATASETS),
    "dataset_processes": Alias("dataset_num_proc"),
    "preprocessing_num_workers": Alias("dataset_num_proc"),
    "sequence_len": Alias("max_length"),
    "cutoff_len": Alias("max_length"),
    "max_seq_length": Alias("max_length"),
    "max_seq_len": Alias("max_length"),
    "sample_packing": Alias("packing"),
    "eval_sample_packing": Alias("eval_packing"),
    "train_on_inputs": _INVERTED,
    "train_on_input": _INVERTED,
    "train_on_prompt": _INVERTED,
    "train_on_completions": Alias("completion_only_loss", bool),
    "group_by_length": Alias("train_sampling_strategy", bool, lambda value: "group_by_length" if value else "random"),
    # batches, epochs, learning rate
    "micro_batch_size": Alias("per_device_train_batch_size"),
    "batch_size": Alias("per_device_train_batch_size"),
    "per_gpu_train_batch_size": Alias("per_device_train_batch_size"),
    "eval_batch_size": Alias("per_device_eval_batch_size"),
    "per_gpu_eval_batch_size": Alias("per_device_eval_batch_size"),
    "num_epochs": Alias("num_train_epochs"),
    "epochs": Alias("num_train_epochs"),
    "lr": Alias("learning_rate"),
    "smt_learning_rate": Alias("learning_rate"),
    "lr_scheduler": Alias("lr_scheduler_type"),
    "lr_warmup_steps": Alias("warmup_steps", int),
    "warmup_ratio": Alias("warmup_steps", float, _ratio, "below 1 it is a share of all steps"),
    "optimizer": Alias("optim"),
    # memory, evaluation, saving
    "activation_checkpointing": Alias("gradient_checkpointing", bool),
    "activation_checkpointing_kwargs": Alias("gradient_checkpointing_kwargs"),
    "enable_activation_checkpointing": Alias("gradient_checkpointing", bool),
    "no_cuda": Alias("use_cpu"),
    "evaluation_strategy": Alias("eval_strategy"),
    "out_dir": Alias("output_dir"),
    # the scripts of the paper
    "calculation_strategy": _CALCULATION,
    "calculate_strategy": _CALCULATION,
}

_METHOD = "the method of a run is always SMT, leave it out; its settings are in the smt: block"
_BUDGET = "blocks have no rank; write smt: {density: 0.01}, the trained share of the targeted weights"
_RANK = f"{_BUDGET}; for a low-rank pair beside the blocks, smt: {{lora_rank: <value>}}"
_SPLIT = "nothing is split off the training set; put rows aside in a file and write eval_dataset_path: FILE"
_QUANTISE = "write load_in_4bit: true (and bnb_4bit_quant_type: nf4 or fp4) or load_in_8bit: true"
_TARGETS = "write smt: {target_modules: all-linear}, or a list of names"

# Names without an exact counterpart, and what to write instead; `<value>` stands for what was given.
REFUSED: dict[str, str] = {
    "checkpoint_dir": "write model_name_or_path: DIRECTORY, in Transformers' format",
    "adapter": _METHOD,
    "finetuning_type": _METHOD,
    "tuner_type": _METHOD,
    "train_type": _METHOD,
    "use_peft": _METHOD,
    "use_peft_smt": _METHOD,
    "lora_r": _RANK,
    "lora_rank": _RANK,
    "lora_alpha": "blocks are added as they are, without a factor; leave it out, or set smt.lora_rank and .lora_alpha",
    "lora_dropout": "blocks have no dropout; leave it out, or set smt.lora_rank and smt.lora_dropout",
    "smt_dropout": "blocks have no dropout; leave it out",
    "lora_target": _TARGETS,
    "lora_target_modules": _TARGETS,
    "lora_target_linear": _TARGETS,
    "quantize": _QUANTISE,
    "quantization_bit": _QUANTISE,
    "dataset": "write dataset_path: FILE for local files, or dataset_name: NAME for a data set on the Hub",
    "val_dataset": "write eval_dataset_path: FILE for local files, or dataset_test_split: SPLIT on the Hub",
    "dataset_name_or_path": "write dataset_path: FILE for local files, or dataset_name: NAME for a data set on the Hub",
    "num_labels": "the classes are those of the training set; leave it out",
    "ref_model": "the reference is the base with the blocks off; leave it out",
    "ref_adapter": "the reference is the base with the blocks off; leave it out",
    "val_set_size": _SPLIT,
    "val_size": _SPLIT,
    "global_batch_size": "write per_device_train_batch_size and gradient_accumulation_steps; their product with the "
    "number of processes is the global batch",
    "saves_per_epoch": "write save_strategy: steps and save_steps: 1 / (<value> x num_train_epochs); below 1 it is a "
    "share of all steps",
    "evals_per_epoch": "write eval_strategy: steps and eval_steps: 1 / (<value> x num_train_epochs); below 1 it is a "
    "share of all steps",
    "wandb_project": "write report_to: wandb and run_name; the environment names the project, WANDB_PROJECT=<value>",
    "logging_dir": "write report_to: tensorboard; the environment names the directory, TENSORBOARD_LOGGING_DIR=<value>",
    "overwrite_output_dir": "a run never writes over another; leave it out, and choose another output_dir",
    "save_safetensors": "adapters are always saved as safetensors; leave it out",
    "num_submatrix_attn": "the number of blocks is one for all targets; write smt: {target_modules: [q_proj, k_proj, "
    "v_proj], block_size: 256, num_blocks: <value>, budget: global, spread: free}",
    "num_submatrix_mlp": "the number of blocks is one for all targets; leave it out where it is 0, else write smt: "
    "{num_blocks: SUM OF BOTH, budget: {'[qkv]_proj': SHARE, 'gate_proj|up_proj|down_proj': SHARE}, block_size: 256, "
    "spread: free}",
    "selection_strategy": "write smt: {budget: global, spread: free} for no_restriction, smt: {budget: per_module, "
    "spread: free} for norm_dist",
    "full_ft_steps": "the warm-up looks at gradients and trains nothing here; write smt: {warmup_batches: <value>}",
    "smt_w_decay": "write weight_decay; it pulls the blocks towards the base's weights here, and towards zero there",
    "smt_offload": "leave it out; gradient_checkpointing and activation_offloading save memory here",
}


_FAILED = object()


def translate(flat: Mapping[str, Any], errors: Errors) -> tuple[dict[str, Any], list[str]]:
    """Read every alias as the key it stands for.

    Args:
        flat: the settings by dotted key.
        errors: gets what cannot be translated, and keys that are given twice; its source learns the new names.

    Returns:
        The settings without aliases, and one notice for each that was used.
    """
    ours: dict[str, Any] = {}
    notices: list[str] = []
    for name, value in _without_doubles(flat, errors).items():
        if name in REFUSED:
            errors.add(name, f"{name} is no key of a run; {REFUSED[name].replace('<value>', str(value))}")
        elif name not in ALIASES:
            ours[name] = value
        elif (converted := _convert(name, value, errors)) is not _FAILED:
            alias = ALIASES[name]
            ours[alias.key] = converted
            note = f" ({alias.note})" if alias.note else ""
            written, read = (f"{key}: {_shown(what)}" for key, what in ((name, value), (alias.key, converted)))
            notices.append(f"{errors.source.place(name)}: {written} is read as {read}{note}")
            errors.source.rename(name, alias.key)
    return ours, notices


def _without_doubles(flat: Mapping[str, Any], errors: Errors) -> dict[str, Any]:
    """One name for each key. The command line wins; two names in the file, or two there, are an error."""
    names: dict[str, list[str]] = {}
    for name in flat:
        names.setdefault(ALIASES[name].key if name in ALIASES else name, []).append(name)
    kept = []
    for key, given in names.items():
        on_line = [name for name in given if errors.source.is_overridden(name)]
        rivals = on_line or given
        if len(rivals) > 1:
            places = " and ".join(f"{name} ({_spot(name, errors)})" for name in rivals)
            errors.add(rivals[-1], f"{places} both set {key}; keep one of them")
        kept.append(rivals[0])
    return {name: flat[name] for name in flat if name in kept}


def _spot(name: str, errors: Errors) -> str:
    line = errors.source.line(name)
    return "command line" if errors.source.is_overridden(name) else f"line {line}"


def _convert(name: str, value: Any, errors: Errors) -> Any:
    alias = ALIASES[name]
    found = faults(name, value, alias.hint) if alias.hint is not None else []
    for place, message in found:
        errors.add(place, message, alias.key)
    if found:
        return _FAILED
    try:
        return alias.convert(value) if alias.convert else value
    except Untranslatable as error:
        place = f"{name}.{error.step}" if error.step else name
        what = "" if error.step else f" {_shown(value)} has no counterpart;"
        errors.add(place, f"{place}:{what} {error}", alias.key)
        return _FAILED


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)
