"""Loading a base model and its tokenizer, the same way in a run and in the process that verifies it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar, enable_progress_bar

from ..export.head import Head
from .errors import ConfigError

if TYPE_CHECKING:
    # Not at run time: it loads TRL, which the process that verifies has no use for.
    from .yaml.keys import RunConfig


def load_model(
    name: str,
    dtype: str | None,
    device: torch.device | str,
    quantization: Any | None = None,
    head: Head | None = None,
) -> PreTrainedModel:
    """The base model on `device`, in evaluation mode.

    Args:
        name: a directory or a name on the Hub.
        dtype: a torch dtype by name, `"auto"` for the checkpoint's, or None: float32 on a CPU, else `"auto"`.
        device: where the weights go.
        quantization: a `quantization_config` of Transformers; None loads the weights as they are.
        head: what it ends in; None: a causal language model.
    """
    return _load(name, dtype, device, quantization, head or Head())[0]


def load_base(
    config: RunConfig, device: torch.device | str, head: Head | None = None
) -> tuple[PreTrainedModel, set[str]]:
    """The base model of a run, quantised if the run says so, and the names of weights that are new and random."""
    return _load(config.model_name_or_path, config.dtype, device, _quantization(config, device), head or Head())


def _load(
    name: str, dtype: str | None, device: torch.device | str, quantization: Any | None, head: Head
) -> tuple[PreTrainedModel, set[str]]:
    if dtype is None:
        dtype = "float32" if torch.device(device).type == "cpu" else "auto"
    settings = {"dtype": dtype, "output_loading_info": True, **head.settings()}
    if quantization is not None:
        settings |= {"quantization_config": quantization, "device_map": {"": torch.device(device)}}
    disable_progress_bar()
    try:
        model, info = head.auto_class.from_pretrained(name, **settings)
        if quantization is None:
            return model.to(device).eval(), set(info["missing_keys"])
        # TRL would cast what is trainable in a quantised model to bf16, norms and embeddings too.
        return model.requires_grad_(False).eval(), set(info["missing_keys"])
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ConfigError(f"model_name_or_path: {name} cannot be loaded: {error}") from error
    finally:
        enable_progress_bar()


def weightless(config: RunConfig, head: Head | None = None) -> PreTrainedModel:
    """The base model of a run on the meta device, in floats: its modules and shapes, and no weight read."""
    name, head = config.model_name_or_path, head or Head()
    try:
        with torch.device("meta"):
            return head.auto_class.from_config(AutoConfig.from_pretrained(name, **head.settings())).eval()
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ConfigError(f"model_name_or_path: {name} cannot be built: {error}") from error


def _quantization(config: RunConfig, device: torch.device | str) -> BitsAndBytesConfig | None:
    if config.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    if not config.load_in_4bit:
        return None
    dtype = config.dtype or ("float32" if torch.device(device).type == "cpu" else "auto")
    if dtype == "auto":
        # Computing in another dtype than the rest of the model's would only cast back and forth.
        dtype = AutoConfig.from_pretrained(config.model_name_or_path).dtype or torch.float32
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=config.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=dtype,
    )


@contextmanager
def passes_as_adapted(model: nn.Module) -> Iterator[None]:
    """A trainer refuses a quantised model without an adapter, also one that is to tokenise only."""
    before = getattr(model, "_hf_peft_config_loaded", False)
    model._hf_peft_config_loaded = True
    try:
        yield
    finally:
        model._hf_peft_config_loaded = before


@contextmanager
def checkpointed(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Activation checkpointing before the trainer switches it on, where it is wanted and the model has it."""
    if not wanted or not getattr(model, "supports_gradient_checkpointing", False):
        yield
        return
    # Two names of one switch; where there are both, the older one warns.
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{kind}_checkpointing_enable")({"use_reentrant": False})
    try:
        yield
    finally:
        getattr(model, f"{kind}_checkpointing_disable")()


def load_tokenizer(name: str, generates: bool = True) -> PreTrainedTokenizerBase:
    """The tokenizer that lies with a model; one without a padding token pads with its end-of-text token.

    Args:
        name: a directory or a name on the Hub.
        generates: whether the model is to write, and so must know how to stop.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"model_name_or_path: the tokenizer of {name} cannot be loaded: {error}") from error
    if tokenizer.eos_token is None and (generates or tokenizer.pad_token is None):
        raise ConfigError(
            f"model_name_or_path: the tokenizer of {name} has no eos_token, so a model cannot learn to "
            "stop; set one in its tokenizer_config.json"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
