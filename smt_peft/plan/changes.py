"""What to change in a run that does not fit: the cheapest changes with which it does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..config import SMTConfig
from .packed import Packing
from .setting import Setting
from .state import optimizer

SUGGESTIONS = 3
# Each of these has half of what the one before it has.
_HALVES = 3
# Below this, a row is hardly one to learn from.
_FEWEST_TOKENS = 64


@dataclass(frozen=True)
class Case:
    """What the memory of a run hangs on, as far as a change can reach it.

    Args:
        setting: of a step.
        smt: fields of the `smt:` block that are others than in the run, and their values.
    """

    setting: Setting
    smt: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Level:
    """How far a change goes.

    Args:
        keys: of the run, `key=value`, one after the other.
        setting: fields of the setting that are others then.
        smt: fields of the `smt:` block that are.
    """

    keys: str
    setting: Mapping[str, Any] = field(default_factory=dict)
    smt: Mapping[str, Any] = field(default_factory=dict)

    def of(self, case: Case) -> Case:
        return Case(replace(case.setting, **self.setting), (*case.smt, *self.smt.items()))


@dataclass(frozen=True)
class Dial:
    """One thing to change in a run.

    Args:
        cost: what it costs, in words.
        levels: how far it can go, the mildest first.
    """

    cost: str
    levels: tuple[Level, ...]


@dataclass(frozen=True)
class Change:
    """What to change in a run.

    Args:
        keys: of the run, `key=value`.
        cost: what it costs, in words.
        peak: bytes that the run takes then.
    """

    keys: str
    cost: str
    peak: int


def dials(setting: Setting, smt: SMTConfig, chosen: bool, checkpoints: bool) -> list[Dial]:
    """All that can be changed in a run, from what costs least: see docs/plan.md.

    Args:
        setting: of the run as it is.
        smt: its `smt:` block.
        chosen: whether its blocks are in a file already.
        checkpoints: whether its model can recompute layers in backward.
    """
    found = [
        Dial("a like score, without sums that are kept", () if chosen else _scores(smt)),
        Dial("moments in fewer bits", tuple(_optimizers(setting))),
        Dial("a little time: as many tokens to an update, in smaller products", tuple(_batches(setting))),
        Dial(
            "one more forward pass in a step",
            (Level("gradient_checkpointing=true", {"checkpointing": True}),)
            if checkpoints and not setting.checkpointing
            else (),
        ),
        Dial(
            "the time to dequantise weights, and a base that is rounded to 4 bits",
            (Level("load_in_4bit=true", {"packing": Packing("nf4", 4)}),)
            if setting.packing is None and not setting.sharded
            else (),
        ),
        Dial("fewer trained weights", () if chosen else tuple(_densities(smt))),
        Dial("what lies behind in a row is not learnt", tuple(_lengths(setting))),
    ]
    return [dial for dial in found if dial.levels]


def _scores(smt: SMTConfig) -> tuple[Level, ...]:
    return (Level("smt.score=mean_abs", smt={"score": "mean_abs"}),) if smt.score == "grad_sum_abs" else ()


def _optimizers(setting: Setting) -> Iterator[Level]:
    # It refuses sharded tensors.
    weight = torch.empty(1024, 1024, device="meta")
    for name in () if setting.sharded else ("smt_adamw_bf16", "smt_adamw_8bit"):
        if optimizer(name).moments(weight) < optimizer(setting.optimizer).moments(weight):
            yield Level(f"optim={name}", {"optimizer": name})


def _batches(setting: Setting) -> Iterator[Level]:
    for sequences in range(setting.sequences // 2, 0, -1):
        if setting.sequences % sequences == 0:
            more = setting.accumulation * (setting.sequences // sequences)
            yield Level(
                f"per_device_train_batch_size={sequences} gradient_accumulation_steps={more}",
                {"sequences": sequences, "accumulation": more},
            )


def _densities(smt: SMTConfig) -> Iterator[Level]:
    for halves in range(1, _HALVES + 1):
        if isinstance(smt.density, float):
            value = float(f"{smt.density / 2**halves:.3g}")
            yield Level(f"smt.density={value:g}", smt={"density": value})
        elif isinstance(smt.num_blocks, int) and (number := smt.num_blocks >> halves):
            yield Level(f"smt.num_blocks={number}", smt={"num_blocks": number})


def _lengths(setting: Setting) -> Iterator[Level]:
    for halves in range(1, _HALVES + 1):
        if (tokens := setting.tokens >> halves) >= _FEWEST_TOKENS:
            yield Level(f"max_length={tokens}", {"tokens": tokens})


Chosen = dict[int, int]


def cheapest(case: Case, dials: list[Dial], limit: int, peaks: Sequence[Callable[[Case], int]]) -> tuple[Change, ...]:
    """Up to three changes that fit, the cheapest first; or the one that takes least, when none fits.

    A dial costs more than all before it together, so of two sets the one that does without the dearer dial is cheaper.

    Args:
        case: the run as it is, which does not fit.
        dials: by their cost; see `dials`.
        limit: bytes there are.
        peaks: bytes that a case takes, phase by phase.
    """
    search = _Search(case, dials, limit, peaks)
    found: dict[frozenset[int], Change] = {}
    # Without the dearest of one that fits, the next cheapest comes out: alone, or with cheaper ones.
    left, without = list(range(len(dials))), set()
    while left and len(found) < SUGGESTIONS:
        chosen = search.least([dial for dial in left if dial not in without])
        if chosen is None:
            break
        found.setdefault(frozenset(chosen), search.change(chosen))
        without.add(max(chosen))
    if not found:
        return (search.change({dial: len(dials[dial].levels) - 1 for dial in left}),) if left else ()
    return tuple(found.values())


@dataclass
class _Search:
    case: Case
    dials: list[Dial]
    limit: int
    peaks: Sequence[Callable[[Case], int]]

    def least(self, allowed: list[int]) -> Chosen | None:
        """The cheapest set of these dials that fits, each as mild as it can be; None when all together do not."""
        chosen: Chosen = {}
        for dial in allowed:
            # No milder level of a dial can make a set fit that its last one does not.
            chosen[dial] = len(self.dials[dial].levels) - 1
            if self.fits(chosen):
                return self._milder(chosen)
        return None

    def _milder(self, chosen: Chosen) -> Chosen:
        """Without what is not needed, the dearest first, and each dial turned back as far as it can be."""
        for dial in sorted(chosen, reverse=True)[1:]:
            fewer = {other: level for other, level in chosen.items() if other != dial}
            if self.fits(fewer):
                chosen = fewer
        for dial in sorted(chosen, reverse=True):
            while chosen[dial] > 0 and self.fits(milder := chosen | {dial: chosen[dial] - 1}):
                chosen = milder
        return chosen

    def fits(self, chosen: Chosen) -> bool:
        case = self._changed(chosen)
        return all(peak(case) <= self.limit for peak in self.peaks)

    def _changed(self, chosen: Chosen) -> Case:
        case = self.case
        for dial, level in sorted(chosen.items()):
            case = self.dials[dial].levels[level].of(case)
        return case

    def change(self, chosen: Chosen) -> Change:
        numbers = sorted(chosen)
        keys = " ".join(self.dials[number].levels[chosen[number]].keys for number in numbers)
        peak = max(peak(self._changed(chosen)) for peak in self.peaks)
        return Change(keys, "; ".join(self.dials[number].cost for number in numbers), peak)
