"""What the options of docs/neighbours.md cost, beside SMT without them and LoRA, at as many trained weights.

Layers in turn are measured while the lowest trains, which takes most, and while the highest does: a step of the others
lies between. Who trains next is decided once in many updates, which is no part of a step. A step with drop and regrow
is the mean over a period, its reselection included.
"""

from __future__ import annotations

import math
from dataclasses import replace

from smt_peft.bases.targets import find_targets
from smt_peft.optim import MeZO
from smt_peft.schedules import LayerSampling

from .methods import Method, equal_rank, frozen, lora, smt, smt_config, targeted
from .model import Case
from .regrown import regrown
from .result import Result
from .step import compare


def suite(result: Result, case: Case, rounds: int, warmup: int) -> None:
    """Without and with activation checkpointing."""
    for point, variant in (("plain", case), ("checkpointed", replace(case, checkpointing=True))):
        if not result.has(point):
            result.add(point, compare(neighbours(variant), variant, rounds, warmup))


def neighbours(case: Case) -> dict[str, Method]:
    density, targets = case.density, case.targets
    matched, rank = smt(density, targets), equal_rank(case.build(), density, targets)
    return {
        "frozen": frozen(),
        "inference": inference(),
        "smt matched": matched,
        f"lora r{rank}, equal parameters": lora(rank, targets),
        "layers in turn, the lowest": replace(matched, schedule=lambda: LayerSampling(layers=1, order="ascending")),
        "layers in turn, the highest": replace(matched, schedule=lambda: LayerSampling(layers=1, order="descending")),
        "drop and regrow": regrown(matched),
        "inputs in 8 bits": smt(density, targets, saved_activations="int8"),
        "paca": smt(density, targets, block_size=(-1, 1), spread="free"),
        "s2ft": channels(case, "consumers"),
        "s2ft, both sides": channels(case, "both"),
        **rosa(case, rank),
        "rank 64 at most": smt(density, targets, max_lora_rank=64, block_size=16, spread="free"),
        "mezo": replace(matched, optimizer=MeZO, backward=False),
    }


def inference() -> Method:
    """Forward alone, nothing saved for a backward pass."""
    return Method(lambda base: base, optimizer=None, backward=False)


def rosa(case: Case, rank: int) -> dict[str, Method]:
    """Blocks beside low-rank pairs of half that rank; none where they would have no parameters left."""
    half = rank // 2
    if half < 1:
        return {}
    return {"rosa": smt(case.density * (rank - half) / rank, case.targets, lora_rank=half)}


def channels(case: Case, coupled: str) -> Method:
    """Channels of S2FT, as many weights as `case.density` of all targets; of one budget, as in the paper."""
    base, settings = case.build(), {"coupled": coupled, "budget": "global"}
    found = find_targets(base, smt_config(0.01, case.targets, **settings)).values()
    share = targeted(base, case.targets) / sum(math.prod(target.shape) for target in found)
    return smt(min(1.0, case.density * share), case.targets, **settings)
