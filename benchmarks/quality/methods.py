"""Every method that is compared: PEFT's by their configs, SMT's scores and shapes by `SMTConfig`, and full fine-tuning.

A budget is the rank of the LoRA that has as many trainable weights, so that LoRA meets it exactly; it may be a
fraction. SMT comes within one percent of it; the other rivals get what their own knob lets them have from there on, so
that none has less than 0.99 of it. The number they end up with is recorded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import peft
import torch
from peft import PeftConfig, get_peft_model
from torch import nn

from smt_peft import BlockSelection, SMTConfig, select_blocks
from smt_peft.bases.targets import find_targets
from smt_peft.schedules import SCHEDULES, Schedule

from .task import Task

MODULES = {
    "all": "all-linear",
    "attention": r".*\.(q_proj|k_proj|v_proj|o_proj|query|key|value|attention\.output\.dense)",
    "qvo": r".*\.(q_proj|v_proj|o_proj)",
    "mlp": r".*\.(gate_proj|up_proj|down_proj|intermediate\.dense|layer\.\d+\.output\.dense)",
}


@dataclass(frozen=True)
class Rival:
    """A method of PEFT whose size follows one whole number.

    Args:
        config: that number to a config.
        rate: where the search for a learning rate starts.
        largest: of that number; 1 for a method without a knob.
    """

    config: Callable[[int, dict[str, Any]], PeftConfig]
    rate: float
    largest: int = 1 << 16


def _lora(**settings: Any) -> Callable[[int, dict[str, Any]], PeftConfig]:
    return lambda r, common: peft.LoraConfig(r=r, lora_alpha=2 * r, **settings, **common)


def _sized(kind: str, knob: str, **settings: Any) -> Callable[[int, dict[str, Any]], PeftConfig]:
    return lambda size, common: getattr(peft, kind)(**{knob: size}, **settings, **common)


RIVALS: dict[str, Rival] = {
    "lora": Rival(_lora(), 8e-3, 256),
    "dora": Rival(_lora(use_dora=True), 8e-3, 256),
    "rslora": Rival(_lora(use_rslora=True), 4e-3, 256),
    "pissa": Rival(_lora(init_lora_weights="pissa"), 2e-3, 256),
    "shira": Rival(_sized("ShiraConfig", "r", random_seed=0), 3.2e-2, 256),
    "miss": Rival(_sized("MissConfig", "r"), 8e-3, 512),
    "loha": Rival(lambda r, common: peft.LoHaConfig(r=r, alpha=2 * r, **common), 1.6e-2, 256),
    "hra": Rival(_sized("HRAConfig", "r"), 8e-3, 256),
    "oft": Rival(lambda size, common: peft.OFTConfig(r=0, oft_block_size=size, **common), 8e-3, 256),
    "gralora": Rival(lambda k, common: peft.GraloraConfig(r=2 * k, alpha=4 * k, gralora_k=2, **common), 8e-3, 128),
    "delora": Rival(_sized("DeloraConfig", "r"), 8e-3, 256),
    "hira": Rival(_sized("HiraConfig", "r"), 1.6e-2, 256),
    "fourierft": Rival(_sized("FourierFTConfig", "n_frequency"), 3.2e-2),
    "waveft": Rival(_sized("WaveFTConfig", "n_frequency"), 1.6e-2),
    "ia3": Rival(lambda _, common: peft.IA3Config(feedforward_modules=[], **common), 6.4e-2, 1),
}
FULL, SMT = "full", "smt"
START = {FULL: 2e-3, SMT: 3.2e-2} | {name: rival.rate for name, rival in RIVALS.items()}


@dataclass
class Prepared:
    """A model that is ready to train; the selection and the schedules where there are any."""

    model: nn.Module
    trainable: int
    selection: BlockSelection | None = None
    schedules: tuple[Schedule, ...] = ()


def per_rank(model: nn.Module, modules: str = "all") -> tuple[int, int]:
    """Weights of a rank-1 LoRA on those linear layers, and their own weights."""
    shapes = [target.shape for target in find_targets(model, SMTConfig(target_modules=MODULES[modules])).values()]
    return sum(rows + cols for rows, cols in shapes), sum(rows * cols for rows, cols in shapes)


def prepare(task: Task, method: str, budget: float, settings: dict[str, Any], seed: int) -> Prepared:
    """The task's base with a method on it.

    Args:
        method: `"full"`, `"smt"` or a name of `RIVALS`.
        budget: rank of the LoRA of all linear layers that has as many trainable weights; ignored by `"full"`.
        settings: `modules` (of `MODULES`); for SMT further fields of `SMTConfig`, `warmup_batches`, `warmup_task` (a
            task whose rows choose the blocks) and `schedules` (settings by name); for a rival, fields of its config.
        seed: of all that is random.

    Raises:
        ValueError: the method's knob cannot come near the budget.
    """
    torch.manual_seed(seed)
    model = task.base()
    if method == FULL:
        model.requires_grad_(True)
        return Prepared(model, trained(model, task.head))
    common = {"task_type": task.kind, "modules_to_save": task.head or None}
    if method == SMT:
        return _smt(task, model, budget, dict(settings), seed, common)
    rival, wanted = RIVALS[method], budget * per_rank(model)[0]
    settings = dict(settings)
    common |= {"target_modules": MODULES[settings.pop("modules", "all")]} | settings
    size = rival.largest if rival.largest == 1 else _enough(task, rival, common, wanted)
    torch.manual_seed(seed)
    model = get_peft_model(model, rival.config(size, common))
    return Prepared(model, trained(model, task.head))


def _smt(
    task: Task, model: nn.Module, budget: float, settings: dict[str, Any], seed: int, common: dict[str, Any]
) -> Prepared:
    modules, count = settings.pop("modules", "all"), settings.pop("warmup_batches", 16)
    teacher = settings.pop("warmup_task", task)
    schedules = tuple(SCHEDULES[name](**values) for name, values in settings.pop("schedules", {}).items())
    density = budget * per_rank(model)[0] / per_rank(model, modules)[1]
    config = SMTConfig(target_modules=MODULES[modules], density=min(1.0, density), seed=seed, **common, **settings)
    rows = None
    if config.needs_data:
        rows = _limited(teacher.batches(seed + 1000), count)
    selection = select_blocks(model, config, rows, count, progress=False)
    config.selection = selection
    model = get_peft_model(model, config)
    return Prepared(model, selection.effective_numel, selection, schedules)


def _limited(batches: Iterator[dict], count: int) -> Iterator[dict]:
    for _ in range(count):
        yield next(batches)


def trained(model: nn.Module, head: list[str]) -> int:
    """Weights that are trained, without those of the task's head."""
    return sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and not of_head(name, head))


def of_head(name: str, head: list[str]) -> bool:
    return any(part in head for part in name.split("."))


def _enough(task: Task, rival: Rival, common: dict[str, Any], wanted: float) -> int:
    """The least knob with as many trained weights as wanted, or one in a hundred fewer; their number grows with it."""

    def count(size: int) -> float:
        try:
            return trained(get_peft_model(task.base(), rival.config(size, common)), task.head)
        except (ValueError, AssertionError, RuntimeError):
            return math.inf

    low, high = 0, 1
    while high < rival.largest and count(high) < 0.99 * wanted:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) < 0.99 * wanted else (low, middle)
    if count(high) == math.inf:
        raise ValueError(f"no size of this method comes near {wanted:.0f} trained weights on this model")
    return high
