"""What freezing by training dynamics saves, and inputs kept in 8 bits: a decoder, an encoder of text, one of images.

Each share of frozen modules is measured over one round in which every module trains once: how much a step keeps hangs
on which modules train, above all on the lowest of them, where backward ends. Moments are dropped with what is frozen;
kept, as the paper does, they are those of the row without freezing. Ratios are to SMT without freezing, inputs whole.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from smt_peft.bench.measure import ratios, spread
from smt_peft.schedules import Freezing
from smt_peft.schedules.trained import trained_blocks

from . import methods
from .memory import Span, trace
from .model import default_dtype
from .result import Result
from .step import interleaved
from .training import Note

SHARES = (0.0, 0.5, 0.9, 0.95)
SAVED = ("full", "int8")


@dataclass(frozen=True)
class Models:
    """The three models of one size, in bf16.

    Args:
        hidden: width, a multiple of 64.
        layers: of each.
        tokens: in a batch of the decoder; encoders get about as many, in four texts or two images.
        density: trained share of the targeted weights.
        device: where they are.
    """

    hidden: int = 256
    layers: int = 6
    tokens: int = 512
    density: float = 0.0084
    device: str = "cpu"

    @property
    def kinds(self) -> dict[str, Callable[[], nn.Module]]:
        return {"decoder": self.decoder, "encoder": self.encoder, "images": self.images}

    @property
    def _shape(self) -> dict[str, int]:
        return {
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.hidden // 64,
            "intermediate_size": 4 * self.hidden,
        }

    def decoder(self) -> nn.Module:
        return LlamaForCausalLM(LlamaConfig(**self._shape, vocab_size=2048, max_position_embeddings=self.tokens))

    def encoder(self) -> nn.Module:
        settings = {"vocab_size": 2048, "max_position_embeddings": max(8, self.tokens // 4)}
        return BertForSequenceClassification(BertConfig(**self._shape, **settings))

    def images(self) -> nn.Module:
        return ViTForImageClassification(ViTConfig(**self._shape, image_size=self._side, patch_size=16))

    @property
    def _side(self) -> int:
        return 16 * max(1, math.isqrt(self.tokens // 2))

    def build(self, kind: str) -> nn.Module:
        torch.manual_seed(0)
        with torch.device(self.device), default_dtype(torch.bfloat16):
            model = self.kinds[kind]()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                # It would keep masks in some kinds and not in others.
                module.p = 0.0
        return model.requires_grad_(False).train()

    def batch(self, kind: str) -> dict[str, Any]:
        with torch.device(self.device):
            if kind == "decoder":
                ids = torch.randint(2048, (1, self.tokens))
                return {"input_ids": ids, "labels": ids, "use_cache": False}
            if kind == "encoder":
                ids = torch.randint(2048, (4, max(8, self.tokens // 4)))
                return {"input_ids": ids, "labels": torch.randint(2, (4,))}
            pixels = torch.randn(2, 3, self._side, self._side, dtype=torch.bfloat16)
            return {"pixel_values": pixels, "labels": torch.randint(2, (2,))}


class Scheduled:
    """A training and the schedule that it has, if any; each step is one of both."""

    def __init__(self, models: Models, kind: str, share: float, saved: str, note: Note = lambda phase: None):
        base = models.build(kind)
        note("method")
        method = methods.smt(models.density, saved_activations=saved)
        self.training = method.on(base)
        self.training.inputs = lambda: models.batch(kind)
        # Makes index tables that layers keep.
        self.training.step((0, 0))
        self.schedule = Freezing(share=share, moments="drop") if share else None
        self.turns, self.steps = 1, 0
        if self.schedule:
            modules = trained_blocks(self.training.model).values()
            self.schedule.begin(self.training.model, self.training.optimizer, 0)
            self.turns = math.ceil(len(modules) / sum(blocks.weight.requires_grad for blocks in modules))

    def step(self, note: Note = lambda phase: None) -> float:
        """Seconds of one step."""
        seconds = self.training.step((0, 0), note)
        self.steps += 1
        start = time.perf_counter()
        if self.schedule:
            self.schedule.after_update(self.steps)
        return seconds + time.perf_counter() - start


def memory(models: Models, kind: str, share: float, saved: str) -> dict[str, float]:
    """Bytes over one round, the mean of its steps, and the most of any step's peak."""
    gradients: list[int] = []

    def run(note: Note) -> None:
        note("weights")
        scheduled = Scheduled(models, kind, share, saved, note)

        def noted(phase: str) -> None:
            if phase == "update":
                parameters = scheduled.training.model.parameters()
                gradients.append(sum(p.grad.nbytes for p in parameters if p.grad is not None))
            note(phase)

        for _ in range(scheduled.turns):
            gc.collect()
            note("settled")
            scheduled.step(noted)
            note("end")

    return figures(trace(run, models.device), gradients)


def figures(spans: list[Span], gradients: list[int]) -> dict[str, float]:
    weights = next(span.start for span in spans if span.name == "method")
    starts = [number for number, span in enumerate(spans) if span.name == "settled"]
    # settled, forward, backward, update, end
    steps = [spans[number : number + 4] for number in starts]
    return {
        "peak_bytes": max(span.peak for step in steps for span in step),
        "weights_bytes": weights,
        "training_bytes": fmean(settled.start - weights for settled, *_ in steps),
        "gradient_bytes": fmean(gradients),
        "saved_bytes": fmean(backward.start - settled.start for settled, _, backward, _ in steps),
        "most_saved_bytes": max(backward.start - settled.start for settled, _, backward, _ in steps),
    }


def suite(result: Result, models: Models, rounds: int, warmup: int) -> None:
    for kind in models.kinds:
        if not result.has(kind):
            result.add(kind, compare(models, kind, rounds, warmup))


def compare(models: Models, kind: str, rounds: int, warmup: int) -> Iterator[dict[str, Any]]:
    """A row for each share and each way to keep inputs; the first is what ratios are taken to."""
    cases = {f"{share:.0%} frozen, inputs {saved}": (share, saved) for share in SHARES for saved in SAVED}
    held = {name: memory(models, kind, *case) for name, case in cases.items()}
    built = {name: Scheduled(models, kind, *case) for name, case in cases.items()}
    trained = {name: each.training.trainable for name, each in built.items()}
    seconds = interleaved({name: each.step for name, each in built.items()}, rounds, warmup)
    first = next(iter(cases))
    for name, (share, saved) in cases.items():
        median, percentiles = spread(seconds[name])
        ratio, ratio_percentiles = spread(ratios(seconds[name], seconds[first]))
        yield {
            "method": name,
            "kind": kind,
            "share": share,
            "saved_activations": saved,
            "trainable": trained[name],
            "seconds": median,
            "seconds_p20_p80": percentiles,
            "ratio": ratio,
            "ratio_p20_p80": ratio_percentiles,
            **held[name],
            "peak_ratio": held[name]["peak_bytes"] / held[first]["peak_bytes"],
            "saved_ratio": held[name]["saved_bytes"] / held[first]["saved_bytes"],
        }
