"""Llama-3-8B's shape with random weights, on a GPU: step time and peak memory of every method.

One model, as two have no room; every method is put on it, measured and taken off, with the frozen pass measured right
before and after: the ratio is that of each round to the median of both. Full training, and the released layer, leave
other weights behind, which change no cost. Where the time for all of it ends, the methods left are told so.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import LlamaForCausalLM

from smt_peft import SMTConfig, select_blocks
from smt_peft.bench.measure import spread

from . import methods, released, warmup
from .memory import NotedStep, trace
from .methods import Method
from .model import LLAMA_3_8B, checkpointed, llama, random_batch
from .result import Result
from .training import Note, Training

Batch = tuple[int, int]


@dataclass(frozen=True)
class Plan:
    """How the model is measured.

    Args:
        layers: decoder layers; `shrink` divides every width, for a dry run.
        batches: (sequences, tokens) of each batch.
        seconds: after which no further method is begun, without checkpointing after 0.7 of them; None: no limit.
    """

    device: str
    dtype: torch.dtype
    layers: int
    shrink: int
    batches: list[Batch]
    rounds: int
    warmup: int
    seconds: float | None

    @property
    def side(self) -> int:
        """Of the clustered blocks: the paper's 256."""
        return max(1, 256 // self.shrink)

    def build(self) -> LlamaForCausalLM:
        shape = {**LLAMA_3_8B, "num_hidden_layers": self.layers}
        for width in ("vocab_size", "hidden_size", "intermediate_size"):
            shape[width] //= self.shrink
        for heads in ("num_attention_heads", "num_key_value_heads"):
            shape[heads] = max(1, shape[heads] // self.shrink)
        return llama(shape, self.device, self.dtype)


def default_batches(device: str) -> list[Batch]:
    """Where 16 sequences are likely not to fit beside an adapter, 8 as well."""
    small = device == "cuda" and torch.cuda.get_device_properties(0).total_memory < 100 << 30
    return [(16, 512), (8, 512), (1, 2048)] if small else [(16, 512), (1, 2048)]


def suite(result: Result, plan: Plan) -> None:
    if result.has("checkpointed"):
        return
    start, seconds = time.perf_counter(), float("inf") if plan.seconds is None else plan.seconds
    end = start + seconds
    base = plan.build()
    # The rest is few methods, and tells more than the last of these.
    result.add("plain", one_by_one(base, methods.large(plan.side), plan, plan.batches, start + 0.7 * seconds))
    result.add("warm-up", warm_up(base, plan, end))
    checkpointed(base)
    result.add("checkpointed", one_by_one(base, methods.large_checkpointed(plan.side), plan, plan.batches[:1], end))


def one_by_one(
    base: LlamaForCausalLM, chosen: Mapping[str, Method], plan: Plan, batches: list[Batch], end: float
) -> Iterator[dict[str, Any]]:
    """A row for each method and batch, the frozen pass first. `base` is handed back with nothing on it."""
    weights = held(Training(base))
    before = {batch: timed(Training(base), batch, plan, weights) for batch in batches}
    first = before
    for batch, taken in first.items():
        yield row("frozen", batch, taken, taken["seconds"], first[batch])
    fitting = [batch for batch in batches if not before[batch].get("reason")]
    for name, method in chosen.items():
        if time.perf_counter() > end:
            yield {"method": name, "reason": too_late(plan)}
            continue
        training = method.on(base)
        count = training.trainable
        mine = {batch: timed(training, batch, plan, weights) for batch in fitting}
        taken_off(training.model, base)
        del training
        after = {batch: timed(Training(base), batch, plan) for batch in fitting}
        for batch in fitting:
            around = before[batch]["seconds"] + after[batch]["seconds"]
            yield row(name, batch, mine[batch], around, first[batch]) | {"trainable": count}
        before = after


def warm_up(base: LlamaForCausalLM, plan: Plan, end: float) -> Iterator[dict[str, Any]]:
    """The warm-up pass of the default score, measured once."""
    batch, config = plan.batches[-1], SMTConfig(target_modules="all-linear", density=0.0084)
    name = f"warm-up, {config.score}"
    if time.perf_counter() > end:
        yield {"method": name, "reason": too_late(plan)}
        return
    frozen = timed(Training(base), batch, plan)
    if frozen.get("reason"):
        yield {"method": name, "reason": frozen["reason"]}
        return
    weights, data = held(Training(base)), [random_batch(base, batch, frozen=False) for _ in range(warmup.BATCHES)]

    def run(note: Note) -> None:
        note("warm-up")
        select_blocks(base, config, data[:2], keep_scores=False, progress=False)

    peak = trace(run, plan.device)[-1].peak
    per_batch, once = warmup.choice_seconds(base, config, data)
    ratio = per_batch / statistics.median(frozen["seconds"])
    yield {
        "method": name,
        "batch": f"{batch[0]}x{batch[1]}",
        "seconds": per_batch,
        "choice_seconds": once,
        "ratio": ratio,
        "ratio_p20_p80": [ratio, ratio],
        "peak_bytes": weights + peak,
        "weights_bytes": weights,
        "transient_bytes": peak,
    }


def too_late(plan: Plan) -> str:
    return f"left out: of {plan.seconds:.0f} seconds for all its share was over"


def timed(training: Training, batch: Batch, plan: Plan, weights: int | None = None) -> dict[str, Any]:
    """Seconds of each round, where memory goes if `weights` says what of it is the base's, or why it does not fit."""
    release()
    taken: dict[str, Any] = {"seconds": []}
    try:
        taken["seconds"] = [training.step(batch) for _ in range(plan.warmup + plan.rounds)][plan.warmup :]
        if weights is not None:
            taken["memory"] = memory_of(training, batch, weights)
    except torch.OutOfMemoryError:
        size = torch.cuda.get_device_properties(0).total_memory >> 30
        taken = {"seconds": [], "reason": f"does not fit in the memory of this GPU ({size} GiB)"}
        training.model.zero_grad(set_to_none=True)
    # Not before the error is forgotten, whose frames hold what filled the memory.
    release()
    return taken


def memory_of(training: Training, batch: Batch, weights: int) -> dict[str, Any]:
    """As `memory.step_memory`, but of a model that is there already."""
    noted, there = NotedStep(), held(training)
    spans = trace(lambda note: noted.run(training, batch, note), training.device)
    return noted.figures(spans, weights, untraced=there)


def held(training: Training) -> int:
    """Bytes of a model and its optimizer's state: of all there is on a GPU; on a CPU of what their tensors hold."""
    release()
    if training.device.type == "cuda":
        return torch.cuda.memory_allocated()
    tensors = [*training.model.parameters(), *training.model.buffers()]
    if training.optimizer is not None:
        states = training.optimizer.state.values()
        tensors += [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def taken_off(model: nn.Module, base: LlamaForCausalLM) -> None:
    """Leave the base model, frozen, with everything of the method gone."""
    if hasattr(model, "peft_config") and model is not base:
        model.unload()
    released.take_off(base)
    if hasattr(base, "peft_config"):
        del base.peft_config
    base.zero_grad(set_to_none=True)
    base.requires_grad_(False).train()


def release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def row(name: str, batch: Batch, taken: dict[str, Any], around: list[float], first: dict[str, Any]) -> dict[str, Any]:
    """A row of what was taken.

    Args:
        around: seconds of the frozen passes before and after.
        first: what the first frozen pass took.
    """
    facts = {"method": name, "batch": f"{batch[0]}x{batch[1]}"}
    if not taken["seconds"] or not around:
        return facts | {"reason": taken.get("reason") or "the frozen pass does not fit"}
    seconds, percentiles = spread(taken["seconds"])
    ratio, ratio_percentiles = spread([time / statistics.median(around) for time in taken["seconds"]])
    times = {"seconds": seconds, "seconds_p20_p80": percentiles, "ratio": ratio, "ratio_p20_p80": ratio_percentiles}
    peak = taken["memory"]["peak_bytes"] / first["memory"]["peak_bytes"]
    return facts | times | taken["memory"] | {"peak_ratio": peak}
