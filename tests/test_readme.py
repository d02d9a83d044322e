"""What the README's Python gives is right, and its commands exist; tests/docs runs every block of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from helpers import batch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def test_the_python_example(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").symlink_to(ROOT / "quickstart")
    example, loading = blocks("python")
    assert len(example.strip().splitlines()) == 8
    names = {"batches": [batch(seed=seed) for seed in range(2)]}
    exec(example, names)
    model = names["model"].eval()
    assert model.base_model.get_nb_trainable_parameters()[0] > 0
    exec(loading, loaded := {})
    assert torch.equal(loaded["model"](**batch()).logits, model(**batch()).logits)


@pytest.mark.parametrize("command", ["demo", "test", "bench"])
def test_the_make_targets(command):
    assert f"make {command}" in README
    assert re.search(rf"^{command}: ", (ROOT / "Makefile").read_text(), re.M)
