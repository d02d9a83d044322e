"""`plan`: the memory of a run, of its rivals, and of the run with one thing changed, before any weight is loaded."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..blocks import BlockSelection
from ..config import SMTConfig
from ..training.errors import ConfigError
from . import methods
from .activations import Batch, Loss, Step, model_loss, step
from .device import Device
from .packed import Packing, stored_bytes
from .state import State, optimizer, state_of, trained_parameters
from .warmup import warm_up

if TYPE_CHECKING:
    # Not at run time: it loads TRL, which a plan of a model without a run has no use for.
    from ..training.schema import Run

# Assumed (2026-11): what the CUDA driver takes for a process outside of PyTorch's allocator, and cuBLAS as workspace.
CUDA_CONTEXT = 640 * 2**20


@dataclass(frozen=True)
class Setting:
    """What decides the memory of a step besides the model.

    Args:
        device: where it runs.
        sequences: in a batch of one process.
        tokens: in a sequence.
        optimizer: as in `optim` of a run.
        checkpointing: whether layers are recomputed in backward.
        accumulation: batches to one update.
        packing: how the frozen weights are packed; None: not.
        processes: that train together.
        sharded: whether each of them keeps its part of the weights only, as under FSDP2 or ZeRO-3.
        task: of the run.
    """

    device: Device = Device()
    sequences: int = 1
    tokens: int = 512
    optimizer: str = "adamw_torch"
    checkpointing: bool = False
    accumulation: int = 1
    packing: Packing | None = None
    processes: int = 1
    sharded: bool = False
    task: str = "sft"


@dataclass(frozen=True)
class Memory:
    """Bytes on one device while a method trains.

    Args:
        method: its name.
        trainable: parameters, padding counted.
        state: what lives from step to step.
        step: a step as the setting has it.
        other: one with checkpointing of activations where the setting has none, or without; None: not counted.
        setting: what both hold for.
        gathered: weights of other processes that are there for a time, and buffers to exchange gradients.
    """

    method: str
    trainable: int
    state: State
    step: Step
    other: Step | None
    setting: Setting
    gathered: int = 0

    @property
    def gradients(self) -> int:
        return self.step.gradients

    def peak(self, step: Step | None = None) -> int:
        """The most that is alive at once in a step, the one of the setting when none is given."""
        step = step or self.step
        kept = step.gradients if self.setting.accumulation > 1 else 0
        return self.state.total + self.gathered + kept + step.peak + runtime(self.setting)


@dataclass(frozen=True)
class Change:
    """One thing to change in a run.

    Args:
        keys: of the run, `key=value`.
        cost: what it costs, in words.
        peak: bytes the run would take then.
    """

    keys: str
    cost: str
    peak: int


@dataclass(frozen=True)
class Plan:
    """The memory of a run.

    Args:
        title: the model and the batch, in words.
        setting: what decides besides the model.
        selection: `BlockSelection.summary` of the blocks that were counted.
        methods: SMT first, then what else could train the model; the others with the run's setting.
        score: what chooses the blocks; empty when the run has its blocks already.
        warm_up: the most that choosing them takes, weights included; 0 when there is nothing to choose.
        limit: bytes there are; None when that is not known.
        changes: the cheapest first, where the run does not fit.
        assumed: what the figures rest on, in words.
    """

    title: str
    setting: Setting
    selection: str
    methods: tuple[Memory, ...]
    score: str
    warm_up: int
    limit: int | None
    changes: tuple[Change, ...]
    assumed: tuple[str, ...]

    @property
    def smt(self) -> Memory:
        return self.methods[0]

    @property
    def peak(self) -> int:
        """Of the whole run: of a step or of the warm-up."""
        return max(self.smt.peak(), self.warm_up)

    @property
    def fits(self) -> bool | None:
        return None if self.limit is None else self.peak <= self.limit


def runtime(setting: Setting) -> int:
    """What the device's own runtime takes; assumed."""
    return CUDA_CONTEXT if setting.device.type == "cuda" else 0


def plan(
    run: Run,
    *,
    limit: int | None = None,
    device: str | None = None,
    processes: int | None = None,
    sharded: bool | None = None,
) -> Plan:
    """Count what a run is going to take.

    Args:
        run: from `training.schema.load_run`.
        limit: bytes of memory on a device; None: those of the GPU, where the run has one.
        device: `"cpu"` or `"cuda"`; None: the one that the run would take here.
        processes: None: as many as the environment says that `accelerate launch` has started.
        sharded: whether they share the weights among them; None: as the environment says.

    Raises:
        ConfigError: the model has no config or its class no place in `AutoModelForCausalLM`, or the `smt:` block or the
            selection does not fit it.
    """
    from .source import base, setting_of, trainer_loss

    setting, assumed = setting_of(run, device, processes, sharded)
    build = partial(base, run, setting)
    with _quiet():
        try:
            model = build()
            if run.selection == "auto":
                selection = methods.assumed_selection(model, run.smt)
            else:
                selection = BlockSelection.load(run.selection)
            found = [
                memory("SMT", methods.smt(model, run.smt, selection), setting, trainer_loss, both=True),
                *_rivals(selection, run, setting),
            ]
        except (ValueError, FileNotFoundError) as error:
            raise error if isinstance(error, ConfigError) else ConfigError(f"smt: {error}") from error
        score = run.smt.score_name if run.selection == "auto" else ""
        choosing = _warm_up(build, run.smt, setting) if score else 0
        limit = _limit(setting) if limit is None else limit
        changes: list[Change] = []
        if limit is not None and max(found[0].peak(), choosing) > limit:
            changes = list(_changes(run, setting, selection, found[0], choosing))
    if run.selection == "auto":
        assumed.append(
            f"the blocks are still to be chosen: as many columns touched as spread={run.smt.spread!r} alone makes it"
        )
    assumed += sorted({each.state.assumed for each in found if each.state.assumed})
    return Plan(
        f"{run.config.model_name_or_path}: {setting.sequences} x {setting.tokens} tokens on {setting.device.type}",
        setting,
        selection.summary(),
        tuple(found),
        score,
        choosing,
        limit,
        tuple(sorted(changes, key=lambda change: change.peak > limit)[:3]) if changes else (),
        tuple(assumed),
    )


def memory(
    method: str,
    model: nn.Module,
    setting: Setting,
    prepare: Callable[[nn.Module], Loss] | None = None,
    both: bool = False,
) -> Memory:
    """Count one method.

    Args:
        method: its name.
        model: on the meta device, with something to train in it; see `methods`.
        setting: what decides besides.
        prepare: makes the loss of a model; None: the one that it computes itself.
        both: whether to count a step with checkpointing and one without.
    """
    trained = trained_parameters(model)
    own = optimizer(setting.optimizer, setting.device.type)
    count = partial(
        step,
        model,
        token_batch(setting),
        setting.device,
        loss=model_loss if prepare is None else prepare(model),
        temporaries=own.temporaries(trained),
        accumulated=setting.accumulation > 1,
    )
    can_checkpoint = _checkpointing(model, setting.checkpointing)
    as_set, other = count(), None
    if both and can_checkpoint:
        _checkpointing(model, not setting.checkpointing)
        other = count()
    found = Memory(method, sum(p.numel() for p in trained), state_of(model, own), as_set, other, setting)
    return _among(found, model) if setting.processes > 1 else found


def token_batch(setting: Setting) -> Batch:
    """A full batch of token ids, without padding, and a label for each; of preferences, two answers to a sequence."""

    def make() -> dict[str, Tensor]:
        rows = setting.sequences * (2 if setting.task == "dpo" else 1)
        ids = torch.zeros(rows, setting.tokens, dtype=torch.int64, device="meta")
        return {"input_ids": ids, "labels": ids[:, 0].clone() if setting.task == "classification" else ids.clone()}

    return make


def _checkpointing(model: nn.Module, wanted: bool) -> bool:
    """Switch it; False when the model knows no such thing."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not getattr(base, "supports_gradient_checkpointing", False):
        return False
    word = "enable" if wanted else "disable"
    switch = getattr(base, f"activation_checkpointing_{word}", None) or getattr(base, f"gradient_checkpointing_{word}")
    switch({"use_reentrant": False}) if wanted else switch()
    return True


def _among(memory: Memory, model: nn.Module) -> Memory:
    """One of several processes: with its part of everything and the layer that is gathered, or with a copy of all."""
    setting, state = memory.setting, memory.state
    if not setting.sharded:
        # DDP keeps gradients in buckets of its own besides.
        return replace(memory, gathered=memory.gradients)

    def part(size: int) -> int:
        return -(-size // setting.processes)

    def with_part(step: Step | None) -> Step | None:
        if step is None:
            return None
        # Reduced as they come: what is whole is one layer's, as much as its weights, which are counted as gathered.
        there = 0 if step.phase == "forward" or setting.accumulation > 1 else step.gradients - part(step.gradients)
        return replace(step, peak=max(step.saved, step.peak - there), gradients=part(step.gradients))

    shared = {name: part(size) for name, size in state.weights.items()}
    state = replace(state, weights=shared, trained=part(state.trained), moments=part(state.moments))
    whole, layer = _units(model)
    return replace(
        memory,
        state=state,
        step=with_part(memory.step),
        other=with_part(memory.other),
        # The parts outside of the layers stay, of the layers there is one at work and the next on its way.
        gathered=whole + 2 * layer,
    )


def _units(model: nn.Module) -> tuple[int, int]:
    """Bytes of the weights outside of all layers, and of the largest layer, as engines gather them."""
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) > 0]
    stack = max(stacks, key=stored_bytes, default=None)
    if stack is None:
        return stored_bytes(model), 0
    return stored_bytes(model) - stored_bytes(stack), max(map(stored_bytes, stack))


def _rivals(selection: BlockSelection, run: Run, setting: Setting) -> Iterator[Memory]:
    from .source import base, trainer_loss

    for name, put_on in methods.rivals(selection, run.smt.modules_to_save, run.smt.task_type).items():
        # Packed weights cannot be trained.
        own = replace(setting, packing=None) if name == "full" else setting
        yield memory(name, put_on(base(run, own)), own, trainer_loss)


def _warm_up(build: methods.Build, config: SMTConfig, setting: Setting) -> int:
    model = build()
    weights = state_of(model, optimizer(setting.optimizer)).total
    # Before the training: without autocast, and with the loss of the model itself.
    _checkpointing(model, setting.checkpointing)
    device = replace(setting.device, autocast=None)
    above = warm_up(model, config, token_batch(setting), device)
    if setting.sharded and setting.processes > 1:
        whole, layer = _units(model)
        weights = -(-weights // setting.processes) + whole + 2 * layer
    return weights + above + runtime(setting)


def _limit(setting: Setting) -> int | None:
    if setting.device.type != "cuda" or not torch.cuda.is_available():
        return None
    return torch.cuda.mem_get_info()[1]


def _changes(run: Run, setting: Setting, selection: BlockSelection, now: Memory, choosing: int) -> Iterator[Change]:
    """What can be changed, by the step time it costs; `choosing`: what the warm-up takes as it is."""
    from .source import base, trainer_loss

    def of(changed: Setting, choosing: int | None = None) -> int:
        build = partial(base, run, changed)
        if choosing is None:
            choosing = _warm_up(build, run.smt, changed) if run.selection == "auto" else 0
        model = methods.smt(build(), run.smt, selection)
        return max(memory("SMT", model, changed, trainer_loss).peak(), choosing)

    if setting.optimizer != "smt_adamw_8bit" and not setting.sharded:
        peak = of(replace(setting, optimizer="smt_adamw_8bit"), choosing)
        yield Change("optim=smt_adamw_8bit", "no time; moments in 8 bits", peak)
    if setting.sequences > 1:
        half = setting.sequences // 2
        more = setting.accumulation * -(-setting.sequences // half)
        yield Change(
            f"per_device_train_batch_size={half} gradient_accumulation_steps={more}",
            "little time: as many tokens to an update, in smaller products",
            of(replace(setting, sequences=half, accumulation=more)),
        )
    if setting.packing is None:
        yield Change(
            "load_in_4bit=true",
            "the time to dequantise every weight twice in a step, and a base that is rounded to 4 bits",
            of(replace(setting, packing=Packing("nf4", 4))),
        )
    if not setting.checkpointing and now.other is not None:
        there = replace(setting, checkpointing=True)
        choosing = choosing and _warm_up(partial(base, run, setting), run.smt, there)
        peak = max(now.peak(now.other), choosing)
        yield Change("gradient_checkpointing=true", "one more forward pass in a step", peak)
    if setting.tokens > 1:
        half = setting.tokens // 2
        peak = of(replace(setting, tokens=half))
        yield Change(f"max_length={half}", "no time, but what lies behind is not learnt", peak)


@contextmanager
def _quiet() -> Iterator[None]:
    """A plan puts adapters on several models, none of which is the one to speak of."""
    loggers = [logging.getLogger(name) for name in ("smt_peft", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def from_environment() -> tuple[int, bool]:
    """How many processes `accelerate launch` or `torchrun` has started, and whether they share the weights."""
    sharded = (
        os.environ.get("ACCELERATE_USE_FSDP") == "true" or os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3"
    )
    return int(os.environ.get("WORLD_SIZE", "1")), sharded
