"""`smt env` says which backend serves what, whatever is missing."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from smt_peft import cli
from smt_peft.bench import environment
from smt_peft.ops import native
from smt_peft.ops.dispatch import BACKENDS, FASTER


def table_of(printed: str) -> dict[str, list[str]]:
    """Per operation the words of its line in the table of the CPU."""
    lines = printed[printed.index("on cpu") :].split("\n\n")[0].splitlines()[1:]
    return {words[0]: words[1:] for words in map(str.split, lines)}


def test_every_operation_is_served_by_a_backend(capsys):
    assert cli.main(["env"]) == 0
    printed = capsys.readouterr().out
    table = table_of(printed)
    assert table.keys() == FASTER.keys()
    assert all(words[0] in BACKENDS for words in table.values())
    for name in ("torch", "peft", "transformers", "trl", "triton", "accelerate", "bitsandbytes", "SMT_BACKEND"):
        assert name in printed


def test_nothing_optional_there_and_the_reference_forced():
    """In a process of its own, as what is imported cannot be hidden."""
    hidden = ("triton", "trl", "bitsandbytes")
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({hidden}))\n"
        "from smt_peft.cli import main; sys.exit(main(['env']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"SMT_BACKEND": "reference", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "SMT_BACKEND=reference" in done.stdout
    for operation, words in table_of(done.stdout).items():
        assert words[0] == "reference" and "forced by SMT_BACKEND" in " ".join(words), operation
    shown = dict(
        line.split(maxsplit=1) for line in done.stdout.splitlines() if line.startswith("  ") and " " in line.strip()
    )
    assert all(shown[name] == "not there" for name in hidden)


@pytest.fixture
def no_libraries(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "_FOLDER", tmp_path)
    native._load.cache_clear()
    yield
    monkeypatch.undo()
    native._load.cache_clear()


def test_without_compiled_libraries_the_reason_is_told(no_libraries, capsys):
    assert cli.main(["env"]) == 0
    table = table_of(capsys.readouterr().out)
    for operation, words in table.items():
        assert words[0] == "reference"
        if "native" in FASTER[operation]:
            assert "native: not built" in " ".join(words)


@pytest.mark.parametrize("spec", ["block_grad=reference", "block_grad=native"])
def test_a_forced_operation_is_told_apart_from_the_others(spec, monkeypatch):
    rows = {operation: (name, why) for operation, name, why in environment.served("cpu", spec)}
    assert rows["block_grad"] == (spec.partition("=")[2], "forced by SMT_BACKEND")
    assert not any("forced" in why for operation, (_, why) in rows.items() if operation != "block_grad")


def test_a_forced_backend_that_cannot_run_says_why(no_libraries):
    rows = {operation: why for operation, _, why in environment.served("cpu", "native")}
    assert "forced by SMT_BACKEND, but it cannot run: not built" in rows["block_grad"]
