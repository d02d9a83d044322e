"""What choosing the blocks costs, and what a whole run costs with it.

A batch of the warm-up pass costs what lies between it and the next; the rest of the pass is done once.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from statistics import mean, median
from typing import Any

import torch
from torch import nn

from smt_peft import SMTConfig, select_blocks
from smt_peft.bench.measure import ratios, spread

from . import methods
from .memory import step_memory, trace
from .methods import Method, equal_rank, lora, smt
from .model import Case, random_batch
from .result import Result
from .step import interleaved, row
from .training import Note

# With data, all in one pass; `random` stands for what needs none.
SCORES = ("grad_abs", "mean_abs", "grad_sum_abs", "taylor", "activation", "low_rank_magnitude", "random")
# Two whole ones are seen.
BATCHES = 3


def suite(result: Result, case: Case, rounds: int, warmup: int) -> None:
    if not result.has("warm-up"):
        result.add("warm-up", measured(case, rounds, warmup))


def measured(case: Case, rounds: int, warmup: int) -> Iterator[dict[str, Any]]:
    """A row for each method, and for each score one of its warm-up pass."""
    rank = equal_rank(case.build(), case.density, case.targets)
    chosen = {
        "frozen": methods.frozen(),
        "smt matched": smt(case.density, case.targets),
        f"lora r{rank}, equal parameters": lora(rank, case.targets),
        "full": methods.full(),
    }
    memory = {
        name: step_memory(lambda note, m=m: m.started(case.build, note), case.batch) for name, m in chosen.items()
    }
    built = {name: method.started(case.build) for name, method in chosen.items()}
    base = built["frozen"].model
    steps = {name: lambda t=training: t.step(case.batch) for name, training in built.items()}
    for score in SCORES:
        steps[score] = lambda s=score: choice_seconds(base, config(case, s), random_batches(base, case, BATCHES))
    seconds = interleaved(steps, rounds, warmup)
    for name, training in built.items():
        yield {
            **row(name, case, training, seconds[name], seconds["frozen"]),
            **memory[name],
            "peak_ratio": memory[name]["peak_bytes"] / memory["frozen"]["peak_bytes"],
        }
    limit = backward_memory(chosen["full"], case)
    for score in SCORES:
        span = trace(lambda note, s=score: choose_traced(case, s, note))[-1]
        yield {
            **warm_up_row(score, case, seconds),
            "peak_bytes": span.peak,
            "weights_bytes": span.start,
            "transient_bytes": span.peak - span.start,
            "peak_ratio": span.peak / memory["frozen"]["peak_bytes"],
            "peak_to_full_backward": span.peak / limit,
        }


def warm_up_row(score: str, case: Case, seconds: Mapping[str, list]) -> dict[str, Any]:
    """A batch as the time of the row, and what is done once beside it; both also in training steps of SMT.

    Args:
        seconds: of every step, and as `choice_seconds` of every warm-up pass, round by round.
    """
    batches, once = zip(*seconds[score], strict=True)
    per_batch, choosing = median(batches), median(once)
    ratio, percentiles = spread(ratios(batches, seconds["frozen"]))
    step = median(seconds["smt matched"])
    return {
        "method": f"warm-up, {score}",
        "score": score,
        **vars(case),
        "seconds": per_batch,
        "choice_seconds": choosing,
        "ratio": ratio,
        "ratio_p20_p80": percentiles,
        "batch_in_steps": per_batch / step,
        "choice_in_steps": choosing / step,
    }


def config(case: Case, score: str) -> SMTConfig:
    return SMTConfig(target_modules=case.targets, density=case.density, score=score)


def random_batches(base: nn.Module, case: Case, count: int) -> list[dict[str, Any]]:
    return [random_batch(base, case.batch, frozen=False) for _ in range(count)]


def choice_seconds(base: nn.Module, config: SMTConfig, batches: Sequence[Any]) -> tuple[float, float]:
    """Seconds of `select_blocks`: of a batch, 0 for a score that needs none, and of all that is done once.

    Args:
        batches: at least two, as a batch ends where the next is asked for.
    """
    asked = []

    def clocked() -> Iterator[Any]:
        for batch in batches:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            asked.append(time.perf_counter())
            yield batch

    start = time.perf_counter()
    select_blocks(base, config, clocked(), num_batches=len(batches), keep_scores=False, progress=False)
    whole = time.perf_counter() - start
    batch = mean(after - before for before, after in pairwise(asked)) if asked else 0.0
    return batch, max(0.0, whole - batch * len(asked))


def choose_traced(case: Case, score: str, note: Note) -> None:
    """Two batches, as something may be kept from one to the next."""
    base = case.build()
    note("warm-up")
    choice_seconds(base, config(case, score), random_batches(base, case, 2))


def backward_memory(full: Method, case: Case) -> int:
    """Peak bytes of forward and backward of full training, without optimizer: what a warm-up must stay below."""

    def run(note: Note) -> None:
        training = full.started(case.build, note)
        batch = random_batch(training.model, case.batch, frozen=False)
        note("pass")
        training.model(**batch, use_cache=False).loss.backward()

    return trace(run)[-1].peak
