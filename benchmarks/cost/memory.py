"""Peak memory of a training step, to the byte and the same in every run.

On a CPU every allocation and release of PyTorch's allocator is traced (the memory events of the autograd profiler):
weights, gradients, moments, what autograd saves, and the temporaries inside operators, those of this package's C++
included. What does not pass through that allocator is not seen: see `UNSEEN`, which goes into every result. On a GPU
the caching allocator's own counters are read, which see everything that PyTorch puts there.

Both count bytes asked for, not the pages or segments that were taken for them.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.profiler import record_function

from smt_peft.tuner.linear import Linear

from .training import Note, Training

# Read when the profiler is first used, which prints a line whenever it starts.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
MARK = "smt_cost::"
UNSEEN = {
    "cpu": "scratch of oneDNN and MKL inside GEMMs, alike for all methods; what threads other than the one that trains "
    "allocate for themselves; in this package's C++, for the length of a GEMM the replaced blocks of one layer (see "
    "unseen_bytes), and up to half a MiB of panels of block_grad per thread",
    "cuda": "workspaces that cuBLAS takes outside of PyTorch's allocator, alike for all methods",
}


@dataclass
class Span:
    """From one note to the next: its name, and bytes alive at its start, at most, and at its end."""

    name: str
    start: int
    peak: int
    end: int


def trace(run: Callable[[Note], None], device: str = "cpu") -> list[Span]:
    """Call `run(note)` and say what memory it held between its notes, in bytes above what there was before.

    Memory that was there before and is released inside is not seen on a CPU; everything is to be made inside.
    """
    with _no_collection():
        return (_traced_on_cuda if torch.device(device).type == "cuda" else _traced_on_cpu)(run)


def step_memory(start: Callable[[Note], Training], size: tuple[int, int], device: str = "cpu") -> dict[str, int | str]:
    """Where the memory of a training step goes, in bytes.

    Args:
        start: makes the model and what trains it; calls its argument with `"method"` between the two.
        size: (sequences, tokens) of the batch.

    Returns:
        `peak_bytes`, the most that is alive in a step, and `peak_phase`, when. `weights_bytes`: of the base model.
        `training_bytes`: all else that lives from step to step, as trained parameters, moments and index tables.
        `gradient_bytes`: of the trained parameters. `saved_bytes`: the batch, the loss and what autograd has saved,
        when backward begins. `transient_bytes`: peak less weights less training, so activations, gradients and
        temporaries. `unseen_bytes`: see `unseen`.
    """
    noted = NotedStep()

    def run(note: Note) -> None:
        note("weights")
        training = start(note)
        # The first step makes the optimizer's moments, and tables that layers keep.
        training.step(size)
        noted.run(training, size, note)

    spans = trace(run, device)
    weights = next(span.start for span in spans if span.name == "method")
    return noted.figures(spans, weights=weights)


class NotedStep:
    """A step whose phases are noted, and what the notes do not tell."""

    gradients = outside = 0

    def run(self, training: Training, size: tuple[int, int], note: Note) -> None:
        def noted(phase: str) -> None:
            if phase == "update":
                self.gradients = sum(p.grad.nbytes for p in training.model.parameters() if p.grad is not None)
                self.outside = unseen(training.model)
            note(phase)

        gc.collect()
        note("settled")
        training.step(size, noted)
        note("end")

    def figures(self, spans: list[Span], weights: int, untraced: int = 0) -> dict[str, int | str]:
        """See `step_memory`.

        Args:
            weights: bytes of the base model.
            untraced: bytes that were there before the trace began.
        """
        span = {span.name: span for span in spans}
        static = span["settled"].start
        phase = max(("forward", "backward", "update"), key=lambda name: span[name].peak)
        return {
            "peak_bytes": untraced + span[phase].peak,
            "peak_phase": phase,
            "weights_bytes": weights,
            "training_bytes": untraced + static - weights,
            "gradient_bytes": self.gradients,
            "saved_bytes": span["backward"].start - static,
            "transient_bytes": span[phase].peak - static,
            "unseen_bytes": self.outside,
        }


def unseen(model: nn.Module) -> int:
    """What this package's C++ may hold beside the traced bytes: a copy of the blocks of the layer that has most."""
    layers = [module for module in model.modules() if isinstance(module, Linear)]
    sizes = [sum(blocks.weight.numel() for blocks in layer.smt_blocks.values()) for layer in layers]
    on_cpu = [size * layer.stored_weight().itemsize for size, layer in zip(sizes, layers, strict=True)]
    return max(on_cpu, default=0) if next(model.parameters()).device.type == "cpu" else 0


@contextmanager
def _no_collection() -> Iterator[None]:
    """Garbage is collected before, and then only where it is asked for, so that a peak does not hang on chance."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _traced_on_cpu(run: Callable[[Note], None]) -> list[Span]:
    def note(name: str) -> None:
        with record_function(MARK + name):
            pass

    with torch.autograd.profiler.profile(profile_memory=True) as profiler:
        run(note)
    events = [
        (event.start_ns(), event.name(), event.nbytes())
        for event in profiler.kineto_results.events()
        if event.name() == "[memory]" or event.name().startswith(MARK)
    ]
    spans, alive = [], 0
    for _, name, size in sorted(events, key=lambda event: event[0]):
        if name != "[memory]":
            spans.append(Span(name.removeprefix(MARK), alive, alive, alive))
        alive += size
        if spans:
            spans[-1].peak, spans[-1].end = max(spans[-1].peak, alive), alive
    return spans


def _traced_on_cuda(run: Callable[[Note], None]) -> list[Span]:
    spans: list[Span] = []
    before = torch.cuda.memory_allocated()

    def close() -> None:
        torch.cuda.synchronize()
        if spans:
            spans[-1].peak = torch.cuda.max_memory_allocated() - before
            spans[-1].end = torch.cuda.memory_allocated() - before

    def note(name: str) -> None:
        close()
        alive = torch.cuda.memory_allocated() - before
        spans.append(Span(name, alive, alive, alive))
        torch.cuda.reset_peak_memory_stats()

    run(note)
    close()
    return spans
