"""Turns of a conversation: what is wrong with them, and other spellings brought to role and content."""

from __future__ import annotations

from typing import Any

ROLES = ("system", "developer", "user", "assistant", "tool")
# How sets of shared conversations name the speakers.
SPELLINGS = {role: role for role in ROLES} | {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
# A system prompt or the answer of a tool may be empty; who says nothing as user or assistant was cut off.
MAY_BE_EMPTY = ("system", "developer", "tool")


def turns_fault(turns: Any, name: str, spelled: bool = False) -> str | None:
    """What is wrong with a list of turns, or None.

    Args:
        turns: what a row holds.
        name: of its column, for messages.
        spelled: whether `from` and `value` and the speakers' names of `SPELLINGS` are read too.
    """
    if not isinstance(turns, list):
        return f"{name} must be a list of messages, got {described(turns)}"
    if not turns:
        return f"{name} is empty"
    for number, turn in enumerate(turns):
        fault = _turn_fault(turn, spelled)
        if fault:
            return f"{name}[{number}] {fault}"
    return None


def _turn_fault(turn: Any, spelled: bool) -> str | None:
    if not isinstance(turn, dict):
        return f"must be an object with role and content, got {described(turn)}"
    role, content = _speaker(turn, spelled), _said(turn, spelled)
    if role is None:
        return f"has no role; its keys are {', '.join(turn) or 'none'}"
    known = SPELLINGS if spelled else ROLES
    if role not in known:
        hint = "; dataset_format: sharegpt reads it" if role in SPELLINGS else ""
        return f"has the role {role!r}, which is none of {', '.join(known)}{hint}"
    if content is None and turn.get("tool_calls"):
        return None
    if not isinstance(content, (str, list)):
        return f"({role}): content must be text, got {described(content)}"
    if not content and SPELLINGS[role] not in MAY_BE_EMPTY and not turn.get("tool_calls"):
        return f"({role}): content is empty"
    return None


def to_messages(turns: list[dict]) -> list[dict]:
    """Turns in any spelling as `{"role": ..., "content": ...}`."""
    return [{"role": SPELLINGS[_speaker(turn, True)], "content": _said(turn, True)} for turn in turns]


def without_nulls(turns: list[dict]) -> list[dict]:
    """Turns without the keys that are null: a table gives every turn the keys of all, and templates ask for keys."""
    return [{key: value for key, value in turn.items() if value is not None or key == "content"} for turn in turns]


def described(value: Any) -> str:
    """The type of a value, as messages name it."""
    return "nothing" if value is None else type(value).__name__


def _speaker(turn: dict, spelled: bool) -> Any:
    role = turn.get("from") if spelled and turn.get("role") is None else turn.get("role")
    return role.lower() if spelled and isinstance(role, str) else role


def _said(turn: dict, spelled: bool) -> Any:
    return turn.get("value") if spelled and turn.get("content") is None else turn.get("content")
