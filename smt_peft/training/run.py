"""A run, put together: model, data, selection, the trainer of its task, evaluation, and what is saved."""

from __future__ import annotations

import copy
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, load_peft_weights, set_peft_model_state_dict
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments, set_seed
from transformers.trainer import TRAINER_STATE_NAME

from .. import ops
from ..blocks import BlockSelection
from ..optim import MeZO, SMTAdamW
from ..report.files import FINAL_SELECTION
from ..report.html import HTML, write_report
from ..report.picture import draw_selection
from ..report.series import tokens_per_second
from ..report.table import report
from ..schedules import ScheduleCallback
from ..schedules.callback import ScheduleError
from ..selection import select_blocks
from ..selection.combine import load_selection
from ..tuner.delta import SMTBlocks
from ..tuner.held import held_selection
from ..tuner.hotswap import make_room
from ..tuner.low_rank import LowRank
from . import outputs
from .compare import lora_config
from .errors import ConfigError
from .forward_only import ForwardOnly
from .launched import all_or_none, forget_engine, wait_for_everyone, whole_or_gathering
from .measures import Measures, command, kept, measure_effective_update
from .model import checkpointed
from .stopping import checkpoints
from .stopping.stops import explained
from .tasks.table import task_of
from .tasks.task import Prepared
from .tell import tell
from .verify import verify_saved
from .yaml.keys import AUTO
from .yaml.schema import Run

PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets")


@explained
def train(
    run: Run,
    callbacks: Sequence[TrainerCallback] = (),
    plan: Callable[[Run], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Select, train, evaluate, save and verify.

    Args:
        run: from `yaml.schema.load_run`.
        callbacks: further callbacks of the trainer.
        plan: `plan.record.record`, for the report to set what was measured against what was planned; called when all
            else is done.

    Returns:
        The metrics, as written to `metrics.json`.

    Raises:
        ConfigError: the output directory, the model, the data or the `smt:` block cannot be used.
        VerificationError: what was saved is not what was trained.
        StoppedError, Interrupted: see `stopping.stops.explained`; the same run, started again, goes on from there.
    """
    clock = _Clock()
    earlier = outputs.check_output_dir(run)
    wait_for_everyone(run.trainer)
    directory = Path(run.trainer.output_dir)
    if run.trainer.process_index == 0:
        checkpoints.clean(directory)
    prepared = prepare(run)
    clock.lap("loading")
    selection = choose(run, prepared, earlier.selection)
    clock.lap("selection")
    measures = Measures()
    schedules = [ScheduleCallback(*run.schedules)] if run.schedules else []
    trainer = make_trainer(run, prepared, _smt_config(run, selection), [*callbacks, measures, *schedules])
    main = trainer.is_world_process_zero()
    if main:
        selection.save(directory / outputs.SELECTION)
        outputs.write_run(run)
    before = measure(run, prepared, trainer, "before")
    # Of the tuner, not of PeftModel: that one counts the padding of ragged blocks. Before the training, as a schedule
    # may hand over blocks at its end that do not all train at a time.
    trainable, _ = trainer.model.base_model.get_nb_trainable_parameters()
    seconds = fit(run, trainer, earlier.checkpoint)
    after = measure(run, prepared, trainer, "after")
    final = held_selection(trainer.model, selection) if run.schedules else selection
    if main and final is not selection:
        final.save(directory / FINAL_SELECTION)
    metrics = {
        "before": before,
        "after": {**after, "seconds": seconds},
        "trainable_parameters": trainable,
        "seconds": clock.laps | {"training": seconds},
        "effective_update": measure_effective_update(trainer.model),
        "memory": measures.memory or kept(directory / outputs.UNFINISHED, "memory") or {},
        "tokens_per_second": tokens_per_second(trainer.state.log_history),
        **_circumstances(trainer),
        "log_history": trainer.state.log_history,
    }
    outputs.save_adapter(trainer.model, prepared.tokenizer, trainer.state, directory, first=main)
    if main:
        if run.smt.task_type == "SEQ_CLS":
            outputs.write_labels(directory, prepared.model.config.id2label)
        outputs.write_metrics(directory, metrics, finished=False)
    if run.config.verify:
        metrics["verified"] = _verify(run, prepared, trainer, directory)
        if main:
            outputs.write_metrics(directory, metrics, finished=False)
    # Under DeepSpeed a model on the meta device would wait for the other processes.
    plannable = plan is not None and main and not trainer.is_deepspeed_enabled
    del trainer
    if run.config.compare_lora:
        metrics["lora"] = compare_lora(run, prepared, selection)
    metrics["seconds"]["total"] = clock.total()
    if plannable:
        metrics["plan"] = plan(run)
    if main:
        _finish(directory, final, metrics)
    return metrics


@explained
def select(run: Run) -> BlockSelection:
    """Choose blocks and save them as `selection.safetensors` in the output directory.

    Raises:
        ConfigError: as `train`.
    """
    if outputs.check_output_dir(run).checkpoint:
        raise ConfigError(f"output_dir: {run.trainer.output_dir} holds a run that uses its selection; choose another")
    wait_for_everyone(run.trainer)
    selection = choose(run, prepare(run), None)
    file = Path(run.trainer.output_dir) / outputs.SELECTION
    if run.trainer.process_index == 0:
        selection.save(file)
        report_file = write_report(file.parent)
        tell(f"wrote {file}, drawn in {report_file}; train with it: smt.selection={file}")
    return selection


def prepare(run: Run) -> Prepared:
    """Load model, tokenizer and data; a trainer without an adapter tokenises as the training will see it."""
    set_seed(run.trainer.seed)
    task = task_of(run)
    tokenizer = task.load_tokenizer(run)
    data = task.load_data(run, tokenizer)
    model = task.load_model(run, data, run.trainer.device)
    return Prepared(model, tokenizer, data, task.tokenising_trainer(run, model, tokenizer, data))


def choose(run: Run, prepared: Prepared, file: Path | None) -> BlockSelection:
    """The blocks to train: of `file`, of the files that `smt.selection` names, or chosen by a warm-up pass."""
    files = run.selection if file is None and run.selection != AUTO else file
    if files is not None:
        with _blaming("smt.selection"):
            selection = load_selection(files)
        named = " and ".join(files) if isinstance(files, list) else files
        tell(f"selection from {named}: {selection.summary()}")
        return selection
    loader = prepared.trainer.get_train_dataloader()
    set_seed(run.trainer.seed)
    try:
        with (
            _blaming("smt"),
            checkpointed(prepared.model, run.trainer.gradient_checkpointing),
            whole_or_gathering(prepared.model) as model,
        ):
            selection = select_blocks(
                model,
                run.smt,
                loader,
                num_batches=run.warmup_batches,
                loss_fn=task_of(run).warm_up_loss(prepared),
                progress=not run.trainer.disable_tqdm,
            )
    except RuntimeError as error:
        raise ConfigError(f"choosing blocks on the training set: {error}") from error
    selection.provenance["model_name_or_path"] = run.config.model_name_or_path
    # Accelerate believes a loader that was left half way to be in use still.
    loader.end()
    return selection


def make_trainer(
    run: Run, prepared: Prepared, config: PeftConfig, callbacks: Sequence[TrainerCallback] = (), **changed: Any
) -> Trainer:
    """The task's trainer over the tokenised rows, with an adapter on the base; `changed` replaces trainer keys."""
    args = copy.copy(run.trainer)
    for name, value in changed.items():
        setattr(args, name, value)
    if run.forward_only:
        # It may have been asked for to choose the blocks.
        args.gradient_checkpointing = args.activation_checkpointing = False
    forget_engine(args)
    mixins = (ForwardOnly,) if run.forward_only else ()
    with _blaming("smt"):
        trainer = task_of(run).trainer(prepared, args, config, callbacks, mixins)
    # None: the one that `args.optim` names. Not every trainer takes it when it is built.
    trainer.optimizer_cls_and_kwargs = _optimizer(run, args)
    trainer.witness = Path(run.trainer.output_dir) / outputs.RUN
    for module in trainer.model.modules():
        for parameter in module.parameters(recurse=False) if isinstance(module, (SMTBlocks, LowRank)) else ():
            if parameter.requires_grad:
                # On a quantised base TRL has cast them to bf16, in which small steps from a grown delta are lost.
                parameter.data = parameter.data.float()
    return trainer


def fit(run: Run, trainer: Trainer, checkpoint: str | None = None) -> float:
    """Train; returns the seconds it took. From a checkpoint of the last step there is nothing left to train."""
    if checkpoint is not None and outputs.is_trained(run, vars(state := _state_of(checkpoint))):
        # The trainer itself would make one step more.
        schedules = [call for call in trainer.callback_handler.callbacks if isinstance(call, ScheduleCallback)]
        if schedules:
            # For blocks that a schedule has retired, and the end of a training has taken in again.
            make_room(trainer.model, trainer.model.active_adapter, [PeftConfig.from_pretrained(checkpoint)])
        set_peft_model_state_dict(trainer.model, load_peft_weights(checkpoint, device=str(trainer.args.device)))
        for callback in schedules:
            callback.finish(trainer.model, Path(checkpoint))
        trainer.end_as(state)
        tell(f"{checkpoint} is the end of the training; its weights are taken as they are")
        return trainer.seconds
    # Again, so that neither the warm-up nor an evaluation before the training changes the order of its rows: a resumed
    # run and one with a selection file draw the same.
    set_seed(run.trainer.seed)
    trainer.args.resume_from_checkpoint = checkpoint  # For callbacks with a state of their own.
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except ScheduleError as error:
        # They decide what trains, so there is one at most.
        name = run.schedules[0].name
        raise ConfigError(f"{run.source.place(name)}: {name}: {error}") from error
    return trainer.seconds


def _state_of(checkpoint: str) -> TrainerState:
    try:
        return TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"resume_from_checkpoint: {checkpoint} has no readable {TRAINER_STATE_NAME} ({error}); name another "
            "checkpoint"
        ) from error


def measure(run: Run, prepared: Prepared, trainer: Trainer, label: str) -> dict[str, float]:
    """The measures of the task on the evaluation set, as far as the run asks for them."""
    if (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled) and trainer.state.global_step == 0:
        if prepared.eval_set is not None:
            tell(f"{label}: not measured, as the model is sharded when the training starts")
        return {}
    found = task_of(run).measure(run, prepared, trainer, label)
    if found:
        tell(f"{label}: " + ", ".join(f"{name} {value:.4g}" for name, value in found.items()))
    return found


def compare_lora(run: Run, prepared: Prepared, selection: BlockSelection) -> dict[str, Any]:
    """Train LoRA for as many steps on the same rows from a fresh copy of the base, and measure it."""
    config = lora_config(selection, run.smt.modules_to_save, run.smt.task_type, run.smt.lora_rank)
    rate = run.config.compare_lora_learning_rate or run.trainer.learning_rate
    set_seed(run.trainer.seed)
    prepared.model = task_of(run).load_model(run, prepared.data, run.trainer.device)
    directory = Path(run.trainer.output_dir) / outputs.LORA
    checkpoint = checkpoints.last_checkpoint(directory)
    checkpoints.clean(directory)
    # Its checkpoints are for going on, not for the Hub, where the run's own go.
    changed = {"learning_rate": rate, "output_dir": str(directory), "push_to_hub": False}
    trainer = make_trainer(run, prepared, config, **changed)
    trainable, _ = trainer.model.get_nb_trainable_parameters()
    tell(f"LoRA to compare with: rank {config.r}, {trainable:,} trainable weights, learning rate {rate:g}")
    seconds = fit(run, trainer, checkpoint and str(checkpoint))
    return {
        **measure(run, prepared, trainer, "LoRA"),
        "seconds": seconds,
        "trainable_parameters": trainable,
        "rank": config.r,
        "learning_rate": rate,
        "log_history": trainer.state.log_history,
    }


def _smt_config(run: Run, selection: BlockSelection) -> PeftConfig:
    config = run.smt.copy()
    config.selection = selection
    config.base_model_name_or_path = run.config.model_name_or_path
    return config


def _optimizer(run: Run, args: TrainingArguments) -> tuple[type[torch.optim.Optimizer], dict[str, Any]] | None:
    """None: the one that `args.optim` names. Clipping stays with the trainer, which logs the norm."""
    if run.forward_only:
        numbers = {"lr": args.learning_rate, "weight_decay": args.weight_decay, "seed": args.seed}
        return MeZO, {**numbers, "eps": run.config.mezo_eps, "samples": run.config.mezo_samples}
    if run.state_dtype is None:
        return None
    return SMTAdamW, {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        "weight_decay": args.weight_decay,
        "state_dtype": run.state_dtype,
        "seed": args.seed,
    }


def _verify(run: Run, prepared: Prepared, trainer: Trainer, directory: Path) -> dict[str, Any]:
    rows = prepared.eval_set if prepared.eval_set is not None else prepared.train_set
    sequences = task_of(run).probes(islice(rows, 4))
    final, first = directory / FINAL_SELECTION, trainer.is_world_process_zero()
    selection = final if final.exists() else directory / outputs.SELECTION
    with all_or_none(first):
        return verify_saved(trainer.model, sequences, run.config.model_name_or_path, selection, directory, first)


def _finish(directory: Path, selection: BlockSelection, metrics: dict[str, Any]) -> None:
    text = report(metrics, selection)
    outputs.write_text(directory / outputs.REPORT, text)
    draw_selection(selection, directory / outputs.PICTURE)
    # Served for nothing but to go on with the comparison.
    shutil.rmtree(directory / outputs.LORA, ignore_errors=True)
    outputs.write_metrics(directory, metrics, finished=True)
    try:
        write_report(directory)
    except Exception as error:
        # The run is finished and saved; its page can be made from its files at any time.
        tell(f"{HTML} could not be made ({type(error).__name__}: {error}); try again: smt report {directory}")
    tell("\n" + text)
    tell(
        f"saved in {directory}: adapter, {outputs.SELECTION}, {outputs.RUN}, {outputs.METRICS}, {outputs.REPORT}, "
        f"{outputs.PICTURE}, {HTML}"
    )


def _circumstances(trainer: Trainer) -> dict[str, Any]:
    device = trainer.args.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "command": command(sys.argv),
        "finished": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "device": f"{device.type} ({name})",
        "engine": trainer.accelerator.distributed_type.value,
        "processes": trainer.accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "backends": ops.served(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
    }


class _Clock:
    def __init__(self):
        self.start = self.last = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = round(now - self.last, 1)
        self.last = now

    def total(self) -> float:
        return round(time.perf_counter() - self.start, 1)


@contextmanager
def _blaming(key: str) -> Iterator[None]:
    """Turns a `ValueError` inside into a `ConfigError` that names the key at fault."""
    try:
        yield
    except ConfigError:
        raise
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(f"{key}: {error}") from error
