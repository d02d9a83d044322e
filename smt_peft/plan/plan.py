"""`plan`: the memory of a run, of its rivals, and of the run with one thing changed, before any weight is loaded."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..blocks import BlockSelection
from ..config import SMTConfig
from ..schedules import LayerSampling
from ..training.errors import ConfigError
from . import methods
from .changes import Case, Change, cheapest, dials
from .layers import Layers, abridge
from .memory import Memory, choosing, memory
from .resting import Turn
from .setting import Setting
from .source import base, setting_of, trainer_loss

if TYPE_CHECKING:
    # Not at run time: it loads TRL, which a plan of a model without a run has no use for.
    from ..training.yaml.schema import Run


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
        changes: the cheapest first, where the run does not fit; one that does not fit either, where none does.
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
        run: from `training.yaml.schema.load_run`.
        limit: bytes of memory on a device; None: those of the GPU, where the run has one.
        device: `"cpu"` or `"cuda"`; None: the one that the run would take here.
        processes: None: as many as the environment says that `accelerate launch` has started.
        sharded: whether they share the weights among them; None: as the environment says.

    Raises:
        ConfigError: the model has no config or its class no place in `AutoModelForCausalLM`, or the `smt:` block or the
            selection does not fit it.
    """
    setting, assumed = setting_of(run, device, processes, sharded)
    planned = _Planned(run)
    case = Case(setting)
    with _quiet(), _as_config_errors():
        selection = planned.selection(case)
        found = [planned.memory(case, both=True), *planned.rivals(case)]
        warm_up = planned.warm_up(case)
        limit = _limit(setting) if limit is None else limit
        changes: tuple[Change, ...] = ()
        if limit is not None and max(found[0].peak(), warm_up) > limit:
            offered = dials(setting, run.smt, planned.chosen, found[0].other is not None)
            changes = cheapest(case, offered, limit, (planned.warm_up, planned.step))
    if not planned.chosen:
        assumed.append(
            f"the blocks are still to be chosen: as many columns touched as spread={run.smt.spread!r} alone makes it"
        )
    assumed += [planned.turn.assumed] if planned.turn else []
    assumed += sorted({each.state.assumed for each in found if each.state.assumed})
    assumed += [schedule.uncounted for schedule in run.schedules if schedule.uncounted]
    return Plan(
        f"{run.config.model_name_or_path}: {setting.sequences} x {setting.tokens} tokens on {setting.device.type}",
        setting,
        selection.summary(),
        tuple(found),
        "" if planned.chosen else run.smt.score_name,
        warm_up,
        limit,
        changes,
        tuple(assumed),
    )


class _Planned:
    """A run, counted with one thing or another changed; what two cases have in common is made once."""

    def __init__(self, run: Run):
        self.run, self.chosen = run, run.selection != "auto"
        sampling = next((schedule for schedule in run.schedules if isinstance(schedule, LayerSampling)), None)
        self.turn = sampling and Turn(sampling)
        self._known: dict[Any, Any] = {}

    def selection(self, case: Case) -> BlockSelection:
        """Of the whole model."""
        return self._once(("selection", case.smt), lambda: self._select(case))

    def memory(self, case: Case, both: bool = False) -> Memory:
        def put_on(model: nn.Module, rest: BlockSelection) -> nn.Module:
            return methods.smt(model, self._config(case), rest)

        return self._once(("step", case), lambda: self._memory("SMT", case, put_on, both, self._settle(case)))

    def rivals(self, case: Case) -> Iterator[Memory]:
        for name, put_on in methods.rivals(
            self.selection(case), self.run.smt.modules_to_save, self.run.smt.task_type
        ).items():
            # Packed weights cannot be trained.
            own = replace(case, setting=replace(case.setting, packing=None)) if name == "full" else case
            yield self._memory(name, own, put_on)

    def warm_up(self, case: Case) -> int:
        if self.chosen:
            return 0
        # It is over before there is an optimizer.
        setting = replace(case.setting, optimizer="sgd", accumulation=1)
        before = replace(case, setting=setting)
        return self._once(("warm-up", before), lambda: self._warm_up(before))

    def step(self, case: Case) -> int:
        return self.memory(case).peak()

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]

    def _config(self, case: Case) -> SMTConfig:
        config = self.run.smt.copy()
        for name, value in case.smt:
            setattr(config, name, value)
        return config

    def _select(self, case: Case) -> BlockSelection:
        if self.chosen:
            return BlockSelection.load(self.run.selection)
        return methods.assumed_selection(base(self.run, case.setting), self._config(case))

    def _warm_up(self, case: Case) -> int:
        model, layers, _ = self._abridged(case)
        return choosing(model, self._config(case), case.setting, layers)

    def _settle(self, case: Case) -> Callable[[nn.Module], None]:
        return partial(self.turn.settle, selection=self.selection(case)) if self.turn else lambda model: None

    def _memory(
        self,
        name: str,
        case: Case,
        put_on: methods.PutOn,
        both: bool = False,
        settle: Callable[[nn.Module], None] = lambda model: None,
    ) -> Memory:
        model, layers, rest = self._abridged(case)
        return memory(name, put_on(model, rest), case.setting, trainer_loss, both, layers, settle)

    def _abridged(self, case: Case) -> tuple[nn.Module, Layers, BlockSelection]:
        """A model of one's own, as it cannot have an adapter twice."""

        def make() -> tuple[nn.Module, Layers, BlockSelection]:
            model, selection = base(self.run, case.setting), self.selection(case)
            return model, *abridge(model, selection, self.turn.layers(selection) if self.turn else ())

        *model, rest = self._once(("model", case.setting.packing, case.smt), make)
        return *copy.deepcopy(model), rest


def _limit(setting: Setting) -> int | None:
    if setting.device.type != "cuda" or not torch.cuda.is_available():
        return None
    return torch.cuda.mem_get_info()[1]


@contextmanager
def _as_config_errors() -> Iterator[None]:
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        raise error if isinstance(error, ConfigError) else ConfigError(f"smt: {error}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """A plan puts adapters on several models, none of which is the one to speak of."""
    loggers = [logging.getLogger(name) for name in ("smt_peft", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # Transformers asks models of PEFT by a name that it has given up itself.
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.* is deprecated", FutureWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
