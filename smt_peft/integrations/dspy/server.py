"""An OpenAI-compatible server that somebody else started."""

from __future__ import annotations

import json
import urllib.request

import dspy


def check_server(lm: dspy.LM, name: str, timeout: float) -> None:
    """Ask the server of an LM whether it serves the model `name`.

    Args:
        lm: with its `api_base`.
        name: as the server knows the model.
        timeout: seconds.

    Raises:
        RuntimeError: it does not; the message says how to start one that does.
    """
    command = f"start one: vllm serve {name} --served-model-name {name}"
    url = lm.kwargs.get("api_base") or lm.kwargs.get("base_url")
    if url is None:
        raise RuntimeError(f"{lm.model} has no api_base, and no engine of this process; pass api_base, or take LocalLM")
    request = urllib.request.Request(f"{url.rstrip('/')}/models")
    if lm.kwargs.get("api_key"):
        request.add_header("Authorization", f"Bearer {lm.kwargs['api_key']}")
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            served = [entry["id"] for entry in json.load(answer)["data"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RuntimeError(f"the server at {url} does not say what it serves ({error}); {command}") from error
    if name not in served:
        raise RuntimeError(f"the server at {url} serves {', '.join(served) or 'nothing'}, not {name}; {command}")
