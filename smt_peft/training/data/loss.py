"""Which tokens a run asks to learn from, and whether its rows can say which those are."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase
from trl import SFTConfig

from ..errors import ConfigError
from .template import chat_template, check_markers


def kind_of(row: dict) -> str:
    """What a row is to a trainer.

    `tokens`, `messages`, `pairs` (of text), `chat pairs` (of messages), or `text`; `preferences` or `chat preferences`;
    `labelled`.
    """
    if "label" in row:
        return "labelled"
    if "chosen" in row:
        return "preferences" if isinstance(row["chosen"], str) else "chat preferences"
    if "input_ids" in row:
        return "tokens"
    if "messages" in row:
        return "messages"
    if "prompt" in row:
        return "pairs" if isinstance(row["prompt"], str) else "chat pairs"
    return "text"


def check_loss(row: dict, key: str, trainer: SFTConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Whether rows like `row` have the masks that the run asks for.

    TRL itself trains on every token where a mask that was asked for does not exist.

    Raises:
        ConfigError: they do not; the message says what to set instead.
    """
    kind = kind_of(row)
    if kind in ("messages", "chat pairs") and chat_template(tokenizer, trainer.chat_template_path) is None:
        raise ConfigError(
            f"{key} holds messages, but the tokenizer has no chat template; name one in chat_template_path"
        )
    if trainer.assistant_only_loss:
        if kind not in ("messages", "chat pairs"):
            instead = {
                "pairs": "learns from completions alone anyway (completion_only_loss)",
                "tokens": "says with its labels what to learn from",
                "text": "knows no speakers",
            }[kind]
            raise ConfigError(
                f"assistant_only_loss: {key} holds {_HELD[kind]}, which {instead}; leave assistant_only_loss out, or "
                "bring the rows into the form of messages"
            )
        check_markers(tokenizer, trainer.chat_template_path)
    masked = kind in ("pairs", "chat pairs") or kind == "tokens" and not {"labels", "completion_mask"}.isdisjoint(row)
    if trainer.completion_only_loss and not masked:
        instead = {
            "messages": "has no completion; say assistant_only_loss: true instead",
            "tokens": "has no labels; add them, with -100 for every token that is not to be learned",
            "text": "has no completion; say completion_only_loss: false, or split the rows into prompt and completion",
        }[kind]
        raise ConfigError(f"completion_only_loss: {key} holds {_HELD[kind]}, which {instead}")


_HELD = {
    "tokens": "token ids",
    "messages": "conversations",
    "pairs": "prompts and completions",
    "chat pairs": "prompts and completions",
    "text": "plain text",
}
