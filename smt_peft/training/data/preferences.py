"""Pairs of answers, the chosen one and the rejected one, as text or as conversations."""

from __future__ import annotations

import os
from itertools import takewhile
from typing import Any

from .forms import ANYTHING, TEXT_OR_TURNS, Form
from .turns import without_nulls

ANSWERS = ("chosen", "rejected")


def _fault(row: dict) -> str | None:
    """What is wrong with a row whose columns are each sound."""
    chosen, rejected, prompt = (row.get(name) for name in (*ANSWERS, "prompt"))
    if type(chosen) is not type(rejected):
        return "chosen and rejected must both be text or both be lists of messages"
    if "prompt" in row and not prompt:
        return "prompt is empty" if prompt is not None else "prompt is missing"
    if isinstance(chosen, str):
        if isinstance(prompt, list):
            return "prompt is a list of messages, so chosen and rejected must be, too"
    elif silent := next((name for name in ANSWERS if row[name][-1]["role"] not in ("assistant", "tool")), None):
        return f"{silent} must end with what the assistant says, got the role {row[silent][-1]['role']!r}"
    if prompt is None and chosen == rejected:
        return "chosen and rejected are the same, so nothing tells where the prompt ends and the answers begin"
    if isinstance(chosen, list):
        return _conversation_fault(prompt, chosen, rejected)
    return None


def _conversation_fault(prompt: Any, chosen: list[dict], rejected: list[dict]) -> str | None:
    if prompt is None and _shared(chosen, rejected) == 0:
        return "chosen and rejected have no message in common, so there is no prompt; add a prompt"
    if isinstance(prompt, str):
        for name, turns in zip(ANSWERS, (chosen, rejected), strict=True):
            if turns[0]["role"] == "user" and turns[0]["content"] != prompt:
                return f"{name} begins with a user's message that is not the prompt"
    return None


def _explicit(row: dict) -> dict:
    """A sound row with prompt, chosen and rejected of one type, the prompt in none of the answers."""
    chosen, rejected = (row[name] for name in ANSWERS)
    tools = {"tools": row["tools"]} if "tools" in row else {}
    prompt = row.get("prompt")
    if isinstance(chosen, str):
        if prompt is None:
            prompt = os.path.commonprefix([chosen, rejected])
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **tools}
    chosen, rejected = without_nulls(chosen), without_nulls(rejected)
    if prompt is None:
        prompt = chosen[: min(_shared(chosen, rejected), len(chosen) - 1, len(rejected) - 1)]
    elif isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    else:
        prompt = without_nulls(prompt)
    answers = {
        name: turns[len(prompt) :] if turns[: len(prompt)] == prompt and len(turns) > len(prompt) else turns
        for name, turns in zip(ANSWERS, (chosen, rejected), strict=True)
    }
    return {"prompt": prompt, **answers, **tools}


def _shared(one: list[dict], other: list[dict]) -> int:
    """How many messages both begin with."""
    return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))))


PREFERENCES = Form(
    "preference",
    dict.fromkeys(ANSWERS, TEXT_OR_TURNS),
    {"prompt": TEXT_OR_TURNS, "tools": ANYTHING},
    _explicit,
    _fault,
)
