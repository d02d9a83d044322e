"""The chat template of a run: which conversations it refuses, and whether it can mark what the assistant says."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl import SFTConfig
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from ..errors import ConfigError


def chat_template(tokenizer: PreTrainedTokenizerBase, path: str | None) -> str | None:
    """The template that a run renders conversations with: of `chat_template_path`, else the tokenizer's own.

    Args:
        tokenizer: of the base model.
        path: a `.jinja` file, or a directory or name on the Hub of a tokenizer; None: the tokenizer's own.
    """
    if path is None:
        template = tokenizer.chat_template
        return template.get("default") if isinstance(template, dict) else template
    try:
        if path.endswith((".jinja", ".j2")):
            return Path(path).read_text(encoding="utf-8")
        return AutoTokenizer.from_pretrained(path).get_chat_template()
    except (OSError, ValueError) as error:
        raise ConfigError(f"chat_template_path: {path} cannot be read: {error}") from error


def conversation_check(trainer: SFTConfig, tokenizer: PreTrainedTokenizerBase) -> Callable[[dict], str | None] | None:
    """What else may be wrong with a conversation that is sound by its form; None: nothing.

    A template that never refuses anything is not asked.
    """
    template = chat_template(tokenizer, trainer.chat_template_path)
    refuses = template is not None and "raise_exception" in template
    if not refuses and not trainer.assistant_only_loss:
        return None

    def check(row: dict) -> str | None:
        prompt, turns = row.get("prompt", []), row.get("messages") or row.get("completion")
        if not isinstance(turns, list):
            return None
        if trainer.assistant_only_loss and not any(turn["role"] == "assistant" for turn in turns):
            return "the assistant says nothing, so assistant_only_loss leaves nothing to learn"
        return refusal(tokenizer, template, [*prompt, *turns], row.get("tools")) if refuses else None

    return check


def refusal(tokenizer: PreTrainedTokenizerBase, template: str, turns: list[dict], tools) -> str | None:
    """Why a template cannot render a conversation, or None."""
    try:
        tools = json.loads(tools) if isinstance(tools, str) else tools
        tokenizer.apply_chat_template(turns, chat_template=template, tools=tools, tokenize=False)
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        return f"the chat template refuses it: {error}"
    return None


def check_markers(tokenizer: PreTrainedTokenizerBase, path: str | None) -> None:
    """Whether the template can say which tokens are the assistant's.

    Raises:
        ConfigError: it marks none, and TRL knows no marked version of it.
    """
    template = chat_template(tokenizer, path)
    if has_generation_markers(template):
        return
    other = copy.copy(tokenizer)
    other.chat_template = template
    try:
        get_training_chat_template(other)
    except ValueError as error:
        raise ConfigError(
            "assistant_only_loss: the chat template marks nothing as the assistant's, and TRL has no marked version of "
            "it. Copy it to a .jinja file, put {% generation %} ... {% endgeneration %} around what the assistant says "
            "with the token that ends its turn, and name the file in chat_template_path; or say "
            "assistant_only_loss: false"
        ) from error
