"""Merging: base + adapter as a plain checkpoint that anything loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal

import transformers
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..bases.packed import quantization_of
from ..say import say
from .dequantised import dequantise_, quantization_config, round_to

ONTO = ("checkpoint", "dequantised", "quantised")


def merge_adapter(
    adapter_dir: str | Path,
    out_dir: str | Path,
    onto: Literal["checkpoint", "dequantised", "quantised"] = "checkpoint",
) -> None:
    """Write the base model with the adapter merged, and its tokenizer if there is one, as a Transformers checkpoint.

    The base comes from `base_model_name_or_path` in the adapter's `adapter_config.json`. Merged weights are
    base + delta, rounded once. Everything is written aside and renamed at the end.

    Args:
        adapter_dir: where the adapter was saved.
        out_dir: new or empty.
        onto: what the blocks are added to. `"checkpoint"`: the base's own weights, in their own dtype. For an adapter
            that was trained on a quantised base also `"dequantised"`: the weights it was trained on, in the dtype they
            were loaded in, so that the merged model computes what was trained; `"quantised"`: those, quantised anew,
            which rounds: a line says by how much, and how much of the update is left.

    Raises:
        FileNotFoundError: there is no adapter in `adapter_dir`.
        FileExistsError: `out_dir` exists and is not empty.
        ValueError: the adapter names no base, or does not fit it; its base cannot be had in the way `onto` asks for.
    """
    if onto not in ONTO:
        raise ValueError(f"onto must be one of {', '.join(ONTO)}, got {onto!r}")
    adapter_dir, out_dir = Path(adapter_dir), Path(out_dir)
    settings = _settings_of(adapter_dir)
    base, record = settings["base_model_name_or_path"], settings.get("base_quantization")
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise FileExistsError(f"{out_dir} exists and is not empty; choose a new directory for the merged model")
    if onto == "checkpoint":
        merged = _onto_checkpoint(adapter_dir, base, record)
    else:
        merged = _onto_quantised(adapter_dir, base, record, plain=onto == "dequantised")
    aside = out_dir.with_name(out_dir.name + ".part")
    shutil.rmtree(aside, ignore_errors=True)
    merged.save_pretrained(aside)
    tokenizer = _tokenizer(adapter_dir, base)
    if tokenizer is not None:
        tokenizer.save_pretrained(aside)
    if out_dir.exists():
        out_dir.rmdir()
    aside.rename(out_dir)


def load_adapter(adapter_dir: str | Path) -> PeftModel:
    """A saved adapter on the base that it names, in the floats of its checkpoint.

    Raises:
        FileNotFoundError: there is no adapter in `adapter_dir`.
        ValueError: the adapter names no base, or does not fit it.
    """
    base = _settings_of(Path(adapter_dir))["base_model_name_or_path"]
    return PeftModel.from_pretrained(_load_base(base), adapter_dir)


def _onto_checkpoint(adapter_dir: Path, base: str, record: dict[str, Any] | None) -> PreTrainedModel:
    model = _load_base(base)
    if quantization_of(model) is not None:
        raise ValueError(
            f"the base model {base} is stored quantised, so there are no floats of its own to merge into; use "
            "onto='dequantised' (--onto dequantised) or onto='quantised'"
        )
    if record is not None:
        say(
            "the adapter was trained on a quantised base and is merged into the weights that base was made from; "
            "onto='dequantised' gives exactly the model that was trained"
        )
    return PeftModel.from_pretrained(model, adapter_dir).merge_and_unload(safe_merge=True)


def _onto_quantised(adapter_dir: Path, base: str, record: dict[str, Any] | None, plain: bool) -> PreTrainedModel:
    if record is None:
        raise ValueError(
            "the adapter's config has no base_quantization: it was trained on a base of floats; use onto='checkpoint'"
        )
    quantization, dtype = quantization_config(record)
    model = _load_base(base, quantization_config=quantization, dtype=dtype)
    dtype = model.config.dtype
    layers = dequantise_(model) if plain else []
    merged = PeftModel.from_pretrained(model, adapter_dir).merge_and_unload(safe_merge=True)
    # After merging, so that base + delta is rounded to the dtype it was trained in, as it was in training.
    round_to(layers, dtype)
    return merged


def _settings_of(adapter_dir: Path) -> dict[str, Any]:
    file = adapter_dir / "adapter_config.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"there is no adapter in {adapter_dir}: it has no adapter_config.json; pass the output_dir of a run"
        )
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        base = settings.get("base_model_name_or_path")
    except (json.JSONDecodeError, AttributeError) as error:
        raise ValueError(f"{file} is damaged ({error}); restore it, or save the adapter again") from error
    if not base:
        raise ValueError(f"{file} names no base model; set base_model_name_or_path in it")
    return settings


def _load_base(base: str, **settings: Any) -> PreTrainedModel:
    try:
        names = AutoConfig.from_pretrained(base).architectures or []
        # The class the checkpoint was saved from: an Auto class would drop a head it does not know.
        loader = getattr(transformers, names[0], AutoModelForCausalLM) if names else AutoModelForCausalLM
        return loader.from_pretrained(base, **{"dtype": "auto", **settings})
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(
            f"the base model {base}, named in the adapter's base_model_name_or_path, cannot be loaded: {error}"
        ) from error


def _tokenizer(adapter_dir: Path, base: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer saved with the adapter, else the base's; None for a model without one."""
    own = (adapter_dir / "tokenizer_config.json").is_file()
    try:
        return AutoTokenizer.from_pretrained(adapter_dir if own else base)
    except (OSError, ValueError, KeyError):
        return None
