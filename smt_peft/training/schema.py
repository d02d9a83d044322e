"""The YAML of a run: TRL's `SFTConfig` names and a few of our own, flat, plus one `smt:` block of `SMTConfig` names.

Every key is checked before anything is loaded, and all errors are reported at once, each with its line.
"""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from transformers.training_args import OptimizerNames
from trl import SFTConfig

from ..config import SMTConfig
from .data.source import file_errors, mixture_errors
from .source import Errors, read_yaml

AUTO = "auto"
# Fields of SMTConfig that a file of PEFT holds, or that a run fills in itself.
_INTERNAL = {
    "peft_type",
    "peft_version",
    "task_type",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "block_pattern",
    "base_fingerprint",
    "base_quantization",
    "fan_in_fan_out",
}
_TRAINER_OPTIMIZERS = tuple(name.value for name in OptimizerNames)
# Fields of SFTConfig that would do nothing here, or something unsafe.
_REFUSED = {"trust_remote_code", "model_init_kwargs", "do_train", "do_eval", "do_predict", "local_rank"}
# What `optim` may be besides the trainer's own: `SMTAdamW`, by the `state_dtype` of its moments.
SMT_OPTIMIZERS = {"smt_adamw": "float32", "smt_adamw_bf16": "bfloat16", "smt_adamw_8bit": "8bit"}
# Names other trainers use: too far from ours for difflib.
_SYNONYMS = {
    "base_model": "model_name_or_path",
    "model": "model_name_or_path",
    "sequence_len": "max_length",
    "cutoff_len": "max_length",
    "max_seq_length": "max_length",
    "lr": "learning_rate",
    "micro_batch_size": "per_device_train_batch_size",
    "batch_size": "per_device_train_batch_size",
    "epochs": "num_train_epochs",
    "num_epochs": "num_train_epochs",
    "torch_dtype": "dtype",
    "lr_scheduler": "lr_scheduler_type",
    "precision": "dtype",
    "evaluation_strategy": "eval_strategy",
    "warmup_ratio": "warmup_steps (below 1 it is a ratio)",
    "dataset": "dataset_path",
    "datasets": "dataset_path",
    "sample_packing": "packing",
    "train_on_inputs": "completion_only_loss",
}


@dataclass
class RunConfig:
    """The keys of a run that are neither TRL's nor SMT's.

    Args:
        model_name_or_path: the base model: a local directory or a name on the Hub.
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
    """

    model_name_or_path: str
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
    dataset_format: Literal["auto", "tokenised", "messages", "sharegpt", "prompt/completion", "alpaca", "text"] = AUTO
    dataset_streaming: bool = False
    on_broken_row: Literal["stop", "skip"] = "stop"
    eval_exact_match: bool = False
    generation_max_new_tokens: int = 64
    generation_batch_size: int = 64
    compare_lora: bool = False
    compare_lora_learning_rate: float | None = None
    verify: bool = True


@dataclass
class Run:
    """A checked run.

    Args:
        config: our own keys.
        trainer: TRL's, built.
        smt: the tuner's settings, its `selection` still None.
        selection: `"auto"` or the path of a selection file.
        warmup_batches: batches of the warm-up pass, with `selection="auto"`.
        resolved: every key that was given, interpolations and overrides applied, and every default of ours.
        state_dtype: of `SMTAdamW`; None: the optimizer is one of the trainer's own.
    """

    config: RunConfig
    trainer: SFTConfig
    smt: SMTConfig
    selection: str
    warmup_batches: int
    resolved: dict[str, Any]
    state_dtype: str | None = None


@dataclass
class _Warmup:
    selection: str = AUTO
    warmup_batches: int = 64


def known_keys() -> dict[str, Any]:
    """Every key of a run with its type; those of the nested block start with `smt.`."""
    hints = {name: hint for name, hint in get_type_hints(SFTConfig).items() if name not in _REFUSED}
    hints = {field.name: hints[field.name] for field in fields(SFTConfig) if field.name in hints}
    hints["resume_from_checkpoint"] = bool | str | None
    smt = get_type_hints(SMTConfig)
    smt = {field.name: smt[field.name] for field in fields(SMTConfig) if field.name not in _INTERNAL}
    smt |= get_type_hints(_Warmup) | {"score": str}
    return hints | get_type_hints(RunConfig) | {f"smt.{name}": hint for name, hint in smt.items()}


def load_run(path: str | Path, overrides: Sequence[str] = ()) -> Run:
    """Read a YAML, apply `key=value` overrides (`smt.density=0.02` reaches into the block), and check all of it.

    Raises:
        ConfigError: lists every error with its line and the repair.
    """
    settings, lines = read_yaml(Path(path), overrides)
    errors = Errors(str(path), lines, overrides)
    flat = _flatten(settings, errors)
    known = known_keys()
    good = {key: value for key, value in flat.items() if _check(key, value, known, errors)}
    _check_presence(flat, errors)
    _check_quantisation(good, errors)
    _check_files(good, errors)
    ours = {key for key in good if key in RunConfig.__dataclass_fields__}
    block = {key.removeprefix("smt."): value for key, value in good.items() if key.startswith("smt.")}
    warmup = _Warmup(**{key: block.pop(key) for key in ("selection", "warmup_batches") if key in block})
    trainer = {key: value for key, value in good.items() if key not in ours and not key.startswith("smt.")}
    smt = _build(lambda given: SMTConfig(task_type="CAUSAL_LM", **given), block, "smt", errors)
    _check_optim(trainer, errors)
    theirs = {key: value for key, value in trainer.items() if key != "optim" or value in _TRAINER_OPTIMIZERS}
    sft = _build(lambda given: SFTConfig(**_with_defaults(given)), theirs, "", errors)
    errors.raise_any()
    config = RunConfig(**{key: good[key] for key in ours})
    resolved = {
        **{field.name: getattr(config, field.name) for field in fields(config)},
        **trainer,
        "smt": {**vars(warmup), **block},
    }
    state_dtype = SMT_OPTIMIZERS.get(trainer.get("optim"))
    return Run(config, sft, smt, warmup.selection, warmup.warmup_batches, resolved, state_dtype)


def _flatten(settings: dict[str, Any], errors: Errors) -> dict[str, Any]:
    flat = {str(key): value for key, value in settings.items() if key != "smt"}
    block = settings.get("smt")
    if isinstance(block, Mapping):
        flat |= {f"smt.{key}": value for key, value in block.items()}
    elif block is not None:
        errors.add("smt", f"smt is a block of settings (density: 0.01, ...), got {block!r}")
    # YAML 1.1 reads a bare `no` as false.
    return {key: "no" if value is False and key.endswith("_strategy") else value for key, value in flat.items()}


def _check(key: str, value: Any, known: Mapping[str, Any], errors: Errors) -> bool:
    if key not in known:
        errors.add(key, f"unknown key {key!r}" + _hint(key, known))
        return False
    adapter = TypeAdapter(
        known[key], config=None if _is_class(known[key]) else ConfigDict(arbitrary_types_allowed=True)
    )
    try:
        adapter.validate_python(value, strict=True)
    except ValidationError:
        errors.add(key, f"{key} must be {_describe(known[key])}, got {value!r} ({_describe(type(value))})")
        return False
    return True


def _is_class(hint: Any) -> bool:
    """Pydantic refuses a config for types that carry one of their own: dataclasses and models."""
    return hasattr(hint, "__dataclass_fields__")


def _hint(key: str, known: Mapping[str, Any]) -> str:
    if key in _REFUSED:
        return "; it has no effect here, leave it out"
    for name in (f"smt.{key}", key.removeprefix("smt.")):
        if name in known:
            return f"; did you mean {name!r}? {'It belongs in' if '.' in name else 'It stays out of'} the smt: block"
    near = _SYNONYMS.get(key) or next(iter(difflib.get_close_matches(key, known, n=1)), None)
    return f"; did you mean {near!r}?" if near else "; neither TRL's SFTConfig, nor this run, nor smt: has it"


def _describe(hint: Any) -> str:
    names = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        type(None): "null",
        list: "a list",
        dict: "a map",
    }
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(_describe(part) for part in get_args(hint)))
    if origin is Literal:
        return " or ".join(repr(value) for value in get_args(hint))
    return names.get(origin or hint, getattr(hint, "__name__", str(hint)))


def _check_presence(flat: Mapping[str, Any], errors: Errors) -> None:
    repairs = {
        "model_name_or_path": "name the base model: a directory or a name on the Hub",
        "output_dir": "name the directory that the run is to be saved in",
    }
    for key, repair in repairs.items():
        if flat.get(key) is None and not errors.about(key):
            errors.add(key, f"{key} is missing; {repair}")
    given = ("dataset_path", "dataset_name", "dataset_mixture")
    sources = [key for key in given if flat.get(key) is not None]
    # A Hub data set may be there for its test split only.
    if (
        len(sources) != 1
        and not any(map(errors.about, given))
        and not (sources == ["dataset_name", "dataset_mixture"] and flat.get("dataset_test_split"))
    ):
        found = f"{' and '.join(sources)} are set" if sources else "none is set"
        errors.add("dataset_path", f"exactly one of {', '.join(given[:2])} and {given[2]} is needed, {found}")
    steps = flat.get("max_steps")
    if flat.get("dataset_streaming") is True and not (isinstance(steps, int) and steps > 0):
        errors.add("dataset_streaming", "dataset_streaming needs max_steps: a stream does not say how long an epoch is")
    has_eval = flat.get("eval_dataset_path") is not None or flat.get("dataset_test_split") is not None
    if flat.get("eval_exact_match") is True and not has_eval:
        errors.add("eval_exact_match", "eval_exact_match needs an evaluation set; name one in eval_dataset_path")
    for key in ("smt.warmup_batches", "generation_max_new_tokens", "generation_batch_size"):
        if isinstance(flat.get(key), int) and flat[key] < 1:
            errors.add(key, f"{key} must be at least 1, got {flat[key]}")


def _check_quantisation(good: Mapping[str, Any], errors: Errors) -> None:
    asked = [key for key in ("load_in_4bit", "load_in_8bit") if good.get(key)]
    if len(asked) == 2:
        errors.add("load_in_8bit", "load_in_8bit and load_in_4bit are both set; keep one of them")
    elif asked and find_spec("bitsandbytes") is None:
        errors.add(asked[0], f"{asked[0]} needs bitsandbytes, which is not installed: pip install bitsandbytes")
    # The defaults pass: the resolved keys of a run, which is read again, hold them.
    for key, default in (("bnb_4bit_quant_type", "nf4"), ("bnb_4bit_use_double_quant", False)):
        if good.get(key, default) != default and "load_in_4bit" not in asked:
            errors.add(key, f"{key} has no effect without load_in_4bit: true; set that, or leave the key out")


def _check_files(good: Mapping[str, Any], errors: Errors) -> None:
    for key in ("dataset_path", "eval_dataset_path"):
        for fault in file_errors(good.get(key)):
            errors.add(key, f"{key}: {fault}")
    if good.get("dataset_mixture") is not None:
        for fault in mixture_errors(good["dataset_mixture"]):
            errors.add("dataset_mixture", fault)
    model = good.get("model_name_or_path")
    if model is not None:
        directory = Path(model).expanduser()
        # `a/b` may be a name on the Hub, unless `a` is a directory here.
        local = (
            directory.exists()
            or model.startswith((".", "/", "~"))
            or directory.parts[:1] != directory.parts
            and (len(directory.parts) > 2 or Path(directory.parts[0]).is_dir())
        )
        if local and not (directory / "config.json").is_file():
            what = "holds no config.json, so no model" if directory.is_dir() else "does not exist"
            errors.add("model_name_or_path", f"model_name_or_path: the directory {model} {what}")
    selection = good.get("smt.selection", AUTO)
    if selection != AUTO and not Path(selection).is_file():
        errors.add(
            "smt.selection", f"smt.selection: there is no file {selection}; make it with `smt select`, or say auto"
        )


def _check_optim(trainer: Mapping[str, Any], errors: Errors) -> None:
    name = trainer.get("optim")
    if name is None or name in _TRAINER_OPTIMIZERS:
        return
    if name not in SMT_OPTIMIZERS:
        near = difflib.get_close_matches(name, [*SMT_OPTIMIZERS, *_TRAINER_OPTIMIZERS], n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"say {', '.join(SMT_OPTIMIZERS)} or one of transformers'"
        errors.add("optim", f"optim: there is no optimizer {name!r}; {hint}")
    elif trainer.get("optim_args"):
        errors.add("optim_args", f"optim_args: {name} takes none, got {trainer['optim_args']!r}; leave the key out")


def _with_defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    """TRL trains in bf16 by default, which a CPU refuses unless told `use_cpu`."""
    cuda = torch.cuda.is_available() and not given.get("use_cpu")
    values = {"dataloader_pin_memory": cuda, **given}
    if given.get("bf16") is None and not given.get("fp16"):
        values["bf16"] = cuda
    if (values.get("bf16") or values.get("fp16")) and not cuda:
        values["use_cpu"] = True
    # What to resume from is looked up when the run starts.
    values.pop("resume_from_checkpoint", None)
    return values


def _build(build, given: Mapping[str, Any], prefix: str, errors: Errors) -> Any:
    """Construct a config, and lay what it refuses to the key it speaks of."""
    try:
        with warnings.catch_warnings():
            # TRL sets `gradient_checkpointing` itself, so transformers' notice of its new name is not the user's.
            warnings.filterwarnings("ignore", ".*gradient_checkpointing.* is deprecated", FutureWarning)
            return build(dict(given))
    except (ValueError, TypeError, ImportError, NotImplementedError) as error:
        message = str(error)
        guilty = next(
            (key for key in given if _mentions(message, key)),
            next((key for key, value in given.items() if _mentions(message, value)), ""),
        )
        key = ".".join(part for part in (prefix, guilty) if part)
        errors.add(key, f"{key}: {message}" if key else message)
        return None


def _mentions(message: str, word: Any) -> bool:
    return re.search(rf"(?<!\w){re.escape(str(word))}(?!\w)", message) is not None
