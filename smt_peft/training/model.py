"""Loading a base model and its tokenizer, the same way in a run and in the process that verifies it."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar, enable_progress_bar

from .errors import ConfigError


def load_model(name: str, dtype: str | None, device: torch.device | str) -> PreTrainedModel:
    """The base model on `device`, in evaluation mode.

    Args:
        name: a directory or a name on the Hub.
        dtype: a torch dtype by name, `"auto"` for the checkpoint's, or None: float32 on a CPU, else `"auto"`.
        device: where the weights go.
    """
    if dtype is None:
        dtype = "float32" if torch.device(device).type == "cpu" else "auto"
    disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"model_name_or_path: {name} cannot be loaded: {error}") from error
    finally:
        enable_progress_bar()
    return model.to(device).eval()


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer that lies with a model; one without a padding token pads with its end-of-text token."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"model_name_or_path: the tokenizer of {name} cannot be loaded: {error}") from error
    if tokenizer.eos_token is None:
        raise ConfigError(
            f"model_name_or_path: the tokenizer of {name} has no eos_token, so a model cannot learn to "
            "stop; set one in its tokenizer_config.json"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
