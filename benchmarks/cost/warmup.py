"""What choosing the blocks costs, and what a whole run costs with it.

The warm-up pass is timed with one batch and with more: the difference is what a batch costs, the rest is choosing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from statistics import median
from typing import Any

from torch import nn

from smt_peft import SMTConfig, select_blocks
from smt_peft.bench.measure import spread

from . import methods
from .memory import step_memory, trace
from .methods import Method, equal_rank, lora, smt
from .model import Case, random_batch
from .result import Result
from .step import interleaved, row
from .training import Note

# With data, all in one pass; `random` stands for what needs none.
SCORES = ("grad_abs", "mean_abs", "grad_sum_abs", "taylor", "activation", "low_rank_magnitude", "random")
MORE = 2


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
        for batches in (1, MORE):
            steps[f"{score} {batches}"] = lambda s=score, n=batches: choose(base, config(case, s), case, n)
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


def warm_up_row(score: str, case: Case, seconds: Mapping[str, list[float]]) -> dict[str, Any]:
    """A batch as the time of the row, and what is done once beside it; both also in training steps of SMT.

    Args:
        seconds: of every step and warm-up pass, round by round.
    """
    one, more, frozen = seconds[f"{score} 1"], seconds[f"{score} {MORE}"], seconds["frozen"]
    per_batch, choosing = choice_seconds(one, more)
    ratio, percentiles = spread([(m - o) / (MORE - 1) / f for o, m, f in zip(one, more, frozen, strict=True)])
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


def choose(base: nn.Module, config: SMTConfig, case: Case, batches: int) -> float:
    """Seconds of `select_blocks` on that many batches, which are there before."""
    data = [random_batch(base, case.batch, frozen=False) for _ in range(batches)]
    start = time.perf_counter()
    select_blocks(base, config, data, num_batches=batches, keep_scores=False, progress=False)
    return time.perf_counter() - start


def choose_traced(case: Case, score: str, note: Note) -> None:
    """Two batches, as something may be kept from one to the next."""
    base = case.build()
    note("warm-up")
    choose(base, config(case, score), case, 2)


def choice_seconds(one: list[float], more: list[float]) -> tuple[float, float]:
    """Median seconds of a batch, and of all that is done once."""
    batch = median((m - o) / (MORE - 1) for o, m in zip(one, more, strict=True))
    return batch, max(0.0, median(one) - batch)


def backward_memory(full: Method, case: Case) -> int:
    """Peak bytes of forward and backward of full training, without optimizer: what a warm-up must stay below."""

    def run(note: Note) -> None:
        training = full.started(case.build, note)
        batch = random_batch(training.model, case.batch, frozen=False)
        note("pass")
        training.model(**batch, use_cache=False).loss.backward()

    return trace(run)[-1].peak
