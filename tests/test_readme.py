"""The README's Python is run, its YAML is read, and its commands exist."""

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


def test_the_yaml_example(tmp_path, monkeypatch):
    from smt_peft.training.schema import load_run

    monkeypatch.chdir(ROOT)
    (example,) = blocks("yaml")
    (tmp_path / "run.yaml").write_text(example)
    run = load_run(tmp_path / "run.yaml", [])
    assert run.smt.density == 0.04


@pytest.mark.parametrize("command", ["demo", "test", "bench"])
def test_the_make_targets(command):
    assert f"make {command}" in README
    assert re.search(rf"^{command}: ", (ROOT / "Makefile").read_text(), re.M)


def test_links_lead_somewhere():
    for link in re.findall(r"\]\((?!http)([^)#]+)", README):
        assert (ROOT / link).exists(), link
