"""What keys of a run must have in common with each other, and with the files they name."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ...blocks import BlockSelection
from ...config import SMTConfig
from ...config.agreement import disagreements
from ...schedules import LayerSampling, Regrowth, Schedule
from ...schedules.callback import check_engine, check_together
from ...schedules.regrowth import check_movable
from ...selection.avoid import check_avoided
from ..data.source import file_errors, mixture_errors
from .keys import AUTO, MEZO, OWN_OPTIMIZERS, SMT_OPTIMIZERS, TASK_FORMS, TRAINER_OPTIMIZERS, RunConfig
from .source import Errors


def check_presence(flat: Mapping[str, Any], errors: Errors) -> None:
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
    if flat.get("eval_strategy", "no") != "no" and not has_eval:
        errors.add("eval_strategy", "eval_strategy needs an evaluation set; name one in eval_dataset_path, or say no")
    for key in ("smt.warmup_batches", "generation_max_new_tokens", "generation_batch_size"):
        if isinstance(flat.get(key), int) and flat[key] < 1:
            errors.add(key, f"{key} must be at least 1, got {flat[key]}")


# Ours that are about answers which a model writes.
_OF_SFT = ("eval_exact_match", "generation_max_new_tokens", "generation_batch_size")
# TRL 1.16 refuses others only when the first batch is there.
_DPO_LOSSES = (
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
)


def check_task(task: str, good: Mapping[str, Any], errors: Errors) -> None:
    """What a task cannot do though its keys are known."""
    form = good.get("dataset_format", AUTO)
    if form not in (AUTO, *TASK_FORMS[task]):
        errors.add(
            "dataset_format",
            f"dataset_format: rows of task: {task} have the form {' or '.join(TASK_FORMS[task])}, not {form}; say "
            "that, or set another task",
        )
    for key in _OF_SFT:
        # The defaults pass: the resolved keys of a run, which is read again, hold them.
        default = RunConfig.__dataclass_fields__[key].default
        if task != "sft" and good.get(key, default) != default:
            errors.add(key, f"{key} is about completions of prompts, which task: {task} does not make; leave it out")
    if good.get("dataset_streaming") and task == "classification":
        errors.add(
            "dataset_streaming",
            "dataset_streaming: task: classification reads all rows first, to know the classes; leave it out",
        )
    if good.get("dataset_streaming") and good.get("precompute_ref_log_probs"):
        errors.add(
            "precompute_ref_log_probs",
            "precompute_ref_log_probs takes rows that are read whole; leave it out, or dataset_streaming",
        )
    losses = good.get("loss_type", []) if task == "dpo" else []
    for number, loss in enumerate([losses] if isinstance(losses, str) else losses):
        if loss not in _DPO_LOSSES:
            place = "loss_type" if isinstance(losses, str) else f"loss_type.{number}"
            near = next(iter(difflib.get_close_matches(loss, _DPO_LOSSES, n=1)), None)
            hint = f"did you mean {near!r}?" if near else f"there are {', '.join(_DPO_LOSSES)}"
            errors.add(place, f"{place}: there is no loss {loss!r}; {hint}")


def check_quantisation(good: Mapping[str, Any], errors: Errors) -> None:
    asked = [key for key in ("load_in_4bit", "load_in_8bit") if good.get(key)]
    if len(asked) == 2:
        errors.add("load_in_8bit", "load_in_8bit and load_in_4bit are both set; keep one of them")
    elif asked and find_spec("bitsandbytes") is None:
        errors.add(asked[0], f"{asked[0]} needs bitsandbytes, which is not installed: pip install bitsandbytes")
    # The defaults pass: the resolved keys of a run, which is read again, hold them.
    for key, default in (("bnb_4bit_quant_type", "nf4"), ("bnb_4bit_use_double_quant", False)):
        if good.get(key, default) != default and "load_in_4bit" not in asked:
            errors.add(key, f"{key} has no effect without load_in_4bit: true; set that, or leave the key out")


def check_files(task: str, good: Mapping[str, Any], errors: Errors) -> None:
    for key in ("dataset_path", "eval_dataset_path"):
        for place, fault in file_errors(good.get(key)):
            errors.add(key + place, f"{key}: {fault}")
    if good.get("dataset_mixture") is not None:
        for place, fault in mixture_errors(good["dataset_mixture"], TASK_FORMS[task]):
            errors.add("dataset_mixture" + place, fault)
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
    check_selections(good, errors)


def check_selections(good: Mapping[str, Any], errors: Errors) -> None:
    """The selection files that are named, and that no setting beside `smt.selection` says otherwise."""
    chosen = _selections("smt.selection", good.get("smt.selection", AUTO), errors, "say auto")
    _selections("smt.avoid", good.get("smt.avoid"), errors, "leave it out")
    given = {key.removeprefix("smt."): value for key, value in good.items() if key.startswith("smt.")}
    given = {field: value for field, value in given.items() if value is not None}
    told: dict[str, str] = {}
    for path, selection in chosen.items():
        told = disagreements(selection, given, path) | told
    for field, message in told.items():
        errors.add(f"smt.{field}", f"smt.{message}")
    if not chosen or given.get("avoid") is None or errors.about("smt.avoid"):
        return
    for selection in chosen.values():
        try:
            check_avoided(selection, SMTConfig(avoid=given["avoid"]))
        except ValueError as error:
            errors.add("smt.avoid", f"smt.{error}")


def _selections(key: str, value: Any, errors: Errors, otherwise: str) -> dict[str, BlockSelection]:
    """The selections in the files that a key names, by path."""
    found = {}
    if value == []:
        errors.add(key, f"{key} is an empty list; name selection files, or {otherwise}")
    for number, path in enumerate(value if isinstance(value, list) else [value]):
        place = f"{key}.{number}" if isinstance(value, list) else key
        if path is None or value == AUTO:
            continue
        if not Path(path).is_file():
            errors.add(place, f"{place}: there is no file {path}; make it with `smt select`, or {otherwise}")
            continue
        try:
            found[path] = BlockSelection.load(path)
        except ValueError as error:
            errors.add(place, f"{place}: {error}")
    return found


def check_optim(trainer: Mapping[str, Any], errors: Errors) -> None:
    name = trainer.get("optim")
    if name is None or name in TRAINER_OPTIMIZERS:
        return
    if name not in OWN_OPTIMIZERS:
        near = difflib.get_close_matches(name, [*OWN_OPTIMIZERS, *TRAINER_OPTIMIZERS], n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"say {', '.join(OWN_OPTIMIZERS)} or one of transformers'"
        errors.add("optim", f"optim: there is no optimizer {name!r}; {hint}")
    elif trainer.get("optim_args"):
        errors.add("optim_args", f"optim_args: {name} takes none, got {trainer['optim_args']!r}; leave the key out")


# What is about gradients, or who holds the weights, and why `optim: mezo` is not to be had with it.
_NOT_WITH_MEZO = {
    "max_grad_norm": "it has no gradient to clip; leave the key out, and take a lower learning_rate",
    "fp16": "fp16 scales the loss for a backward pass, which there is not; say bf16: true, or leave the key out",
    "activation_offloading": "nothing is saved for a backward pass that could be moved; leave the key out",
    "deepspeed": "it trains weights that each process has whole; leave the key out, or take another optim",
    "fsdp": "it trains weights that each process has whole; leave the key out, or take another optim",
}


# Schedules that look at no gradient.
_WITHOUT_GRADIENTS = ("layer_sampling",)


def check_mezo(good: Mapping[str, Any], chooses_by_gradients: bool, schedules: Iterable[str], errors: Errors) -> None:
    """What `optim: mezo` cannot be combined with, and its keys without it.

    Args:
        good: the settings of the run.
        chooses_by_gradients: whether there is a warm-up pass with a backward pass.
        schedules: the names of those that are given.
        errors: takes what is wrong.
    """
    if good.get("optim") != MEZO:
        for key in ("mezo_eps", "mezo_samples"):
            # The defaults pass: the resolved keys of a run, which is read again, hold them.
            default = RunConfig.__dataclass_fields__[key].default
            if good.get(key, default) != default:
                errors.add(key, f"{key} has no effect without optim: mezo; set that, or leave the key out")
        return
    for key, reason in _NOT_WITH_MEZO.items():
        if good.get(key):
            errors.add(key, f"{key} does not go with optim: mezo: {reason}")
    for name in schedules:
        if name not in _WITHOUT_GRADIENTS:
            errors.add(name, f"{name} is for training by gradients, which optim: mezo has not; leave one of them out")
    if good.get("gradient_checkpointing") and not chooses_by_gradients:
        errors.add(
            "gradient_checkpointing",
            "gradient_checkpointing has no effect with optim: mezo, which saves nothing for a backward pass; leave it "
            "out",
        )
    if isinstance(eps := good.get("mezo_eps"), (int, float)) and not 0 < eps < float("inf"):
        errors.add("mezo_eps", f"mezo_eps must be a finite number above 0, got {eps}")
    if isinstance(samples := good.get("mezo_samples"), int) and samples < 1:
        errors.add("mezo_samples", f"mezo_samples must be at least 1, got {samples}")


# Of transformers' optimizers: the pages of some are never given back, others update in backward and hold no blocks.
_WITHOUT_REST = ("paged_", "lomo", "adalomo")


def check_schedules(
    schedules: Sequence[Schedule], smt: SMTConfig | None, trainer: Mapping[str, Any], errors: Errors
) -> None:
    """What schedules cannot run with, said before anything is loaded."""
    if not schedules:
        return
    names = [schedule.name for schedule in schedules]
    processes = {"world_size": int(os.environ.get("WORLD_SIZE", "1"))}
    engine = {key: trainer.get(key) for key in ("deepspeed", "fsdp", "ddp_find_unused_parameters")}
    for check in (
        lambda: check_together(schedules),
        lambda: check_engine(SimpleNamespace(**processes | engine), schedules),
    ):
        try:
            check()
        except ValueError as error:
            errors.add(names[0], str(error))
    for schedule in schedules:
        try:
            schedule.check_arguments(SimpleNamespace(**trainer))
        except ValueError as error:
            errors.add(schedule.name, str(error))
    if smt is not None and smt.lora_rank is not None:
        errors.add(
            "smt.lora_rank", f"smt.lora_rank does not go with {names[0]}, which is for blocks; leave one of them out"
        )
    optim = str(trainer.get("optim"))
    if any(isinstance(schedule, Regrowth) for schedule in schedules):
        if optim not in SMT_OPTIMIZERS:
            errors.add(
                "optim" if "optim" in trainer else Regrowth.name,
                f"optim: {trainer.get('optim', 'adamw_torch')} counts no steps by block, which blocks that regrowth "
                f"brings in need; say {' or '.join(SMT_OPTIMIZERS)}",
            )
        try:
            check_movable(smt)
        except ValueError as error:
            errors.add(Regrowth.name, str(error))
    if any(isinstance(schedule, LayerSampling) for schedule in schedules) and (
        optim.startswith(_WITHOUT_REST) or optim.endswith("_layerwise")
    ):
        errors.add(
            "optim",
            f"optim: {optim} cannot give up the state of layers that rest; leave layer_sampling out, or "
            "take another, as smt_adamw_8bit",
        )
