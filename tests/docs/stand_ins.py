"""What a page takes for granted: names and files that its reader has, small ones here."""

from __future__ import annotations

from collections.abc import Callable

import yaml
from desk import Desk
from helpers import batch
from pages import ROOT, fences


def batches(desk: Desk) -> None:
    """What a DataLoader yields."""
    desk.names["batches"] = [batch(seed=seed) for seed in range(2)]


def run_yaml(desk: Desk) -> None:
    """The run of the README."""
    (text,) = (fence.text for fence in fences(ROOT / "README.md") if fence.language == "yaml")
    (desk.directory / "run.yaml").write_text(yaml.safe_dump(yaml.safe_load(text)))


STAND_INS: dict[str, tuple[Callable[[Desk], None], ...]] = {
    "README.md": (batches,),
    "plan.md": (run_yaml,),
}
