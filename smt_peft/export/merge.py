"""Merging: base + adapter as a plain checkpoint that anything loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import transformers
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


def merge_adapter(adapter_dir: str | Path, out_dir: str | Path) -> None:
    """Write the base model with the adapter merged, and its tokenizer if there is one, as a Transformers checkpoint.

    The base comes from `base_model_name_or_path` in the adapter's `adapter_config.json`, in the checkpoint's own dtype.
    Merged weights are base + delta, rounded once. Everything is written aside and renamed at the end.

    Raises:
        FileNotFoundError: there is no adapter in `adapter_dir`.
        FileExistsError: `out_dir` exists and is not empty.
        ValueError: the adapter names no base, or does not fit it.
    """
    adapter_dir, out_dir = Path(adapter_dir), Path(out_dir)
    base = _base_of(adapter_dir)
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise FileExistsError(f"{out_dir} exists and is not empty; choose a new directory for the merged model")
    model = PeftModel.from_pretrained(_load_base(base), adapter_dir)
    merged = model.merge_and_unload(safe_merge=True)
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
    """A saved adapter on the base that it names.

    Raises:
        FileNotFoundError: there is no adapter in `adapter_dir`.
        ValueError: the adapter names no base, or does not fit it.
    """
    return PeftModel.from_pretrained(_load_base(_base_of(Path(adapter_dir))), adapter_dir)


def _base_of(adapter_dir: Path) -> str:
    file = adapter_dir / "adapter_config.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"there is no adapter in {adapter_dir}: it has no adapter_config.json; pass the output_dir of a run"
        )
    try:
        base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (json.JSONDecodeError, AttributeError) as error:
        raise ValueError(f"{file} is damaged ({error}); restore it, or save the adapter again") from error
    if not base:
        raise ValueError(f"{file} names no base model; set base_model_name_or_path in it")
    return base


def _load_base(base: str) -> PreTrainedModel:
    try:
        names = AutoConfig.from_pretrained(base).architectures or []
        # The class the checkpoint was saved from: an Auto class would drop a head it does not know.
        loader = getattr(transformers, names[0], AutoModelForCausalLM) if names else AutoModelForCausalLM
        return loader.from_pretrained(base, dtype="auto")
    except (OSError, ValueError) as error:
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
