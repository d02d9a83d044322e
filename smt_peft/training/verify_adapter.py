"""Checks of a saved adapter by itself, after the run that made it is gone: its files, its base, what it merges into."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from ..export.adapter import SavedAdapter
from ..export.checkpoint import Checkpoint, NoShards, directory_of
from ..export.compare import compare_merged
from ..export.dequantised import quantization_config
from ..export.edits import Edits, NotInPlace
from ..export.head import head_of
from .errors import ConfigError, VerificationError
from .model import load_model
from .verify import PROBE_ROWS, compare_saved, largest_move

TOKENS = 64


@dataclass(frozen=True)
class Check:
    """One line of the table.

    Args:
        name: what was looked at.
        passed: None where there was nothing to look at.
        detail: what was seen.
    """

    name: str
    passed: bool | None
    detail: str

    def __str__(self) -> str:
        word = {True: "ok", False: "FAILED", None: "-"}[self.passed]
        return f"{self.name:<8}  {word:<6}  {self.detail}"


def verify_adapter(
    adapter_dir: str | Path, base: str | None = None, merged_dir: str | Path | None = None
) -> list[Check]:
    """Check a saved adapter, and what it was merged into.

    Args:
        adapter_dir: where the adapter was saved.
        base: directory or name of the base; the one that the adapter names when not given.
        merged_dir: the checkpoint that a merge wrote.

    Returns:
        The checks, in order; after one that failed, those that build on it are missing.
    """
    checks: list[Check] = []
    try:
        adapter = SavedAdapter.open(Path(adapter_dir))
        base = base or adapter.config.base_model_name_or_path
        if not base:
            raise ValueError("adapter_config.json names no base model; pass --base")
        checks.append(Check("files", True, f"{len(adapter.keys)} tensors, {len(adapter.modules)} modules with blocks"))
    except (ValueError, OSError) as error:
        return [Check("files", False, str(error))]
    edits = _static(adapter, base, checks)
    if any(check.passed is False for check in checks):
        return checks
    if adapter.config.task_type not in (None, "CAUSAL_LM", "SEQ_CLS"):
        checks.append(Check("reload", None, f"language models and classifiers only, not {adapter.config.task_type}"))
        return checks if merged_dir is None else [*checks, _merged(None, edits, Path(merged_dir), 0.0)]
    try:
        model, result = _loaded(adapter, base)
    except (ConfigError, VerificationError, ValueError, OSError) as error:
        return [*checks, Check("reload", False, str(error))]
    difference, moved, allowed = (
        result[what] for what in ("reload_difference", "merged_difference", "merged_tolerance")
    )
    text = f"logits of {result['rows']} rows in two processes: largest difference {difference:g}"
    checks.append(Check("reload", result["passed"]["reload"], text))
    text = f"merging in memory moves logits by {moved:.2g}, rounding allows {allowed:.2g}"
    checks.append(Check("merge", result["passed"]["merged"] and result["passed"]["weights"], text))
    return checks if merged_dir is None else [*checks, _merged(model, edits, Path(merged_dir), allowed)]


def _static(adapter: SavedAdapter, base: str, checks: list[Check]) -> Edits | None:
    """The checks that need no model; the edits, where the base can be merged into by its files."""
    try:
        edits = Edits(adapter, Checkpoint.open(directory_of(base)))
    except (NoShards, NotInPlace) as reason:
        checks += [Check(name, None, f"looked at when loaded, as {reason}") for name in ("blocks", "base")]
        return None
    except (ValueError, OSError) as error:
        checks.append(Check("base", False, str(error)))
        return None
    try:
        checks.append(Check("blocks", True, f"{edits.check_values():,} blocks: sorted, in range, unique, finite"))
    except ValueError as error:
        checks.append(Check("blocks", False, str(error)))
    try:
        edits.check_base()
        checks.append(Check("base", True, f"{base} has the weights that the adapter was trained on"))
    except ValueError as error:
        checks.append(Check("base", False, str(error)))
    return edits


def _loaded(adapter: SavedAdapter, base: str) -> tuple[PeftModel, dict[str, Any]]:
    record = adapter.config.base_quantization
    quantization, dtype = quantization_config(record) if record else (None, "auto")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inner = load_model(base, dtype, device, quantization, head_of(adapter.directory, adapter.config.task_type))
    model = PeftModel.from_pretrained(inner, adapter.directory).eval()
    return model, compare_saved(model, _sequences(inner), base, None, adapter.directory)


def _sequences(model: Any) -> list[list[int]]:
    """Any tokens will do: two computations are compared, not a text judged."""
    config = model.config.get_text_config()
    length = min(TOKENS, getattr(config, "max_position_embeddings", TOKENS))
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, config.vocab_size, (PROBE_ROWS, length), generator=generator).tolist()


def _merged(model: PeftModel | None, edits: Edits | None, directory: Path, allowed: float) -> Check:
    """Byte for byte where the base's files can be compared, else by logits."""
    why = "the base's files cannot be compared with it"
    try:
        if edits is not None:
            report = compare_merged(edits, Checkpoint.open(directory))
            return Check("merged", True, f"{directory} is base + delta, rounded once: {report}")
    except (ValueError, OSError) as error:
        # Merged onto the weights of a quantised base it has other bytes, and the logits that were trained.
        if edits.adapter.config.base_quantization is None:
            return Check("merged", False, str(error))
        why = str(error)
    if model is None:
        return Check("merged", None, why)
    try:
        plain = type(model.get_base_model()).from_pretrained(directory, dtype="auto").to(model.device).eval()
    except (OSError, ValueError) as error:
        return Check("merged", False, str(error))
    moved = largest_move(plain, model, _sequences(plain))
    text = f"logits of {directory} differ from the adapter's by {moved:.2g}, rounding allows {allowed:.2g} ({why})"
    return Check("merged", moved <= allowed, text)
