"""Skills for the project's own pre-trained byte-level Llama: short text to text, scored by exact match.

The model knows the sources of Python's standard library and none of these; each is a new circuit of another kind:
`reverse` moves letters by position, `sort` by content, `shift` maps each letter. A row is `(prompt, answer)`; an answer
is right when the model prefers every byte of it, and its end, to all others, which is what greedy decoding needs to
write exactly that.
"""

from __future__ import annotations

import json
import random
import sys
import zlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from .task import Score, Split, parted, shuffled

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "quickstart" / "model"
BOS, EOS, PAD = 256, 257, 258
IGNORED = -100
Pair = tuple[str, str]


def words(alphabet: str, length: int, count: int, *, distinct: bool = False) -> list[str]:
    """`count` different words of random letters, always the same."""
    rng, found = random.Random(0), {}
    draw = rng.sample if distinct else rng.choices
    while len(found) < count:
        found["".join(draw(alphabet, k=length))] = None
    return list(found)


def reverse() -> list[Pair]:
    return [(f"{w}<", w[::-1]) for w in words("abcdefghij", 6, 8000)]


def sort() -> list[Pair]:
    return [(f"{w}>", "".join(sorted(w))) for w in words("abcdefghijkl", 8, 8000, distinct=True)]


def shift() -> list[Pair]:
    return [(f"{w}+", "".join(chr(ord(c) + 1) for c in w)) for w in words("abcdefghijklmnop", 4, 8000)]


SKILLS = {"reverse": reverse, "sort": sort, "shift": shift}


class Skill:
    """A task of this file; see `task.Task`.

    Args:
        name: of the task.
        steps: optimizer steps of a run.
        batch: rows of a step.
        skill: of `SKILLS`, where it is not the name.
        windows: of 128 bytes of held-out text, to tell what is remembered.
    """

    autocast = False
    head: list[str] = []
    kind = "CAUSAL_LM"

    def __init__(
        self,
        name: str,
        steps: int,
        batch: int = 32,
        *,
        skill: str | None = None,
        validation: int = 200,
        test: int = 500,
        windows: int = 32,
    ):
        self.name, self.steps, self.batch, self.windows = name, steps, batch, windows
        pairs = SKILLS[skill or name]()
        self.rows: Split = parted(pairs, [prompt for prompt, _ in pairs], validation, test)

    @cached_property
    def _base(self) -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).requires_grad_(False)

    def base(self) -> nn.Module:
        model = AutoModelForCausalLM.from_config(self._base.config).requires_grad_(False)
        model.load_state_dict(self._base.state_dict())
        return model

    def batches(self, seed: int) -> Iterator[dict[str, Tensor]]:
        for chosen in shuffled(len(self.rows.train), self.batch, seed):
            yield encoded([self.rows.train[i] for i in chosen])

    @torch.no_grad()
    def score(self, model: nn.Module, split: str) -> Score:
        model.eval()
        rows, right, losses = getattr(self.rows, split), 0, []
        for start in range(0, len(rows), 100):
            batch = encoded(rows[start : start + 100])
            labels = batch.pop("labels")[:, 1:]
            logits = model(**batch).logits[:, :-1]
            answer = labels != IGNORED
            right += int(((logits.argmax(-1) == labels) | ~answer).all(1).sum())
            losses.append(nn.functional.cross_entropy(logits[answer], labels[answer], reduction="none"))
        return Score(right / len(rows), torch.cat(losses).mean().item())

    @torch.no_grad()
    def remembered(self, model: nn.Module) -> float:
        model.eval()
        tokens = self._held_out
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()

    @cached_property
    def _held_out(self) -> Tensor:
        """`[windows, 128]` evenly spaced windows of the files that pre-training held out."""
        sys.path.insert(0, str(ROOT / "quickstart"))
        try:
            from pretrain import read_corpus, windows
        finally:
            sys.path.pop(0)
        _, stream = read_corpus()
        return windows(stream, np.linspace(0, len(stream) - 128, self.windows).astype(np.int64), 128)

    def describe(self) -> dict[str, Any]:
        text = json.dumps([self.rows.train, self.rows.validation, self.rows.test])
        return {
            "base": "quickstart/model",
            "rows": [len(self.rows.train), len(self.rows.validation), len(self.rows.test)],
            "checksum": zlib.crc32(text.encode()),
            "steps": self.steps,
            "batch": self.batch,
        }


def encoded(rows: list[Pair]) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and `labels`, int64 `(rows, longest)`; only the answer and its end are learned."""
    width = max(len(prompt) + len(answer) for prompt, answer in rows) + 2
    tokens = torch.full((len(rows), width), PAD)
    labels = torch.full((len(rows), width), IGNORED)
    for i, (prompt, answer) in enumerate(rows):
        start, row = 1 + len(prompt), [BOS, *prompt.encode(), *answer.encode(), EOS]
        tokens[i, : len(row)] = torch.tensor(row)
        labels[i, start : len(row)] = tokens[i, start : len(row)]
    batch = {"input_ids": tokens, "labels": labels}
    if bool((tokens == PAD).any()):
        batch["attention_mask"] = (tokens != PAD).long()
    return batch
