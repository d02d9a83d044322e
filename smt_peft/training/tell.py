"""What a run prints: once, however many processes take part."""

from __future__ import annotations

import os


def tell(text: str) -> None:
    """Print in the first process only; `torchrun` and its kin number them in `RANK`."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)
