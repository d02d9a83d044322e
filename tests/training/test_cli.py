"""The command line: only what works is offered, it starts fast, and errors come without a traceback."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from runs import ROOT, smt, write_jsonl
from transformers import AutoModelForCausalLM

from smt_peft import cli
from smt_peft.training.errors import ConfigError

# A new verb is a promise, as a new key is: tests/training/test_schema.py lists those.
VERBS = {"train", "select", "plan", "schema", "report", "merge", "export", "patch", "verify", "bench", "env"}


def test_the_verbs_are_these():
    (verbs,) = (action.choices for action in cli._parser()._actions if action.dest != "help")
    assert verbs.keys() == VERBS


@pytest.mark.parametrize(
    "words",
    [
        ["RUN", "max_steps=3", "seed=1"],
        ["--config", "RUN", "max_steps=3", "seed=1"],
        ["max_steps=3", "--config", "RUN", "seed=1"],
        ["RUN", "max_steps=3", "--dry-run", "seed=1"],
        ["--dry-run", "RUN", "max_steps=3", "--traceback", "seed=1"],
    ],
)
def test_settings_may_stand_anywhere_among_the_options(workshop, monkeypatch, words):
    path = str(workshop.write("anywhere"))
    runs = []
    for module, name in (("run", "train"), ("dry_run", "dry_run")):
        monkeypatch.setattr(f"smt_peft.training.{module}.{name}", lambda run, *_, **__: runs.append(run))
    assert cli.main(["train", *(path if word == "RUN" else word for word in words)]) == 0
    assert (runs[0].trainer.max_steps, runs[0].trainer.seed) == (3, 1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train"], "smt train needs a run: smt train RUN.yaml [key=value ...]"),
        (["train", "run.yaml", "--learning_rate", "1e-4"], "is given without dashes: learning_rate=VALUE"),
        (["select", "run.yaml", "--dry-run"], "unrecognized argument --dry-run"),
        (["patch", "apply", "a", "b", "c"], "unrecognized argument c"),
        (["select", "--union", "a"], "--union takes two selection files or more, got a alone"),
        (["select", "run.yaml", "--union", "a", "b"], "--union takes selection files and no run"),
        (["select", "run.yaml", "--out", "c"], "--out goes with --union, --intersection or --difference"),
    ],
)
def test_what_the_command_line_does_not_take(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def through_the_command(*words: str, after: str) -> subprocess.CompletedProcess:
    """What an installed `smt` runs, in a process of its own, and then a line of Python."""
    code = (
        f"import sys, smt_main\ntry: status = smt_main.main()\nexcept SystemExit as stop: status = stop.code\n{after}"
    )
    command = [sys.executable, "-c", code, *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["train"]])
def test_help_imports_nothing_heavy(words):
    heavy = "{'torch', 'transformers', 'peft', 'trl', 'pydantic', 'smt_peft'}"
    done = through_the_command(*words, after=f"assert not {heavy} & sys.modules.keys()")
    assert done.returncode == 0, done.stderr
    if words == ["--help"]:
        assert all(verb in done.stdout for verb in VERBS)


def test_the_command_runs_the_verbs_of_the_package():
    done = through_the_command("select", "nowhere.yaml", after="import smt_peft.cli as c; sys.exit(status + 10)")
    assert done.returncode == 12, done.stderr
    assert "smt select: there is no YAML file at nowhere.yaml" in done.stderr


def test_an_error_in_the_yaml_ends_with_status_2_and_no_traceback(workshop):
    process = smt("train", workshop.write("typo", learning_rat=1e-3))
    assert process.returncode == 2
    assert "did you mean 'learning_rate'?" in process.stderr
    assert "Traceback" not in process.stderr


def test_a_batch_that_the_model_refuses_is_told_without_a_traceback(workshop, capsys):
    rows = [{"input_ids": [1, 2, 9999], "labels": [1, 2, 9999]}] * 8
    data = write_jsonl(workshop.directory / "beyond.jsonl", rows)
    path = workshop.write("beyond", dataset_path=str(data), eval_dataset_path=None)
    assert cli.main(["select", str(path)]) == 2
    error = capsys.readouterr().err
    assert "batch 1: the model refused it (IndexError: index out of range" in error
    with pytest.raises(ConfigError, match="index out of range") as caught:
        cli.main(["select", "--traceback", str(path)])
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_merge_writes_the_model_that_was_evaluated(finished, workshop, tmp_path, capsys):
    assert cli.main(["merge", str(finished.directory), str(tmp_path / "merged")]) == 0
    assert "merged" in capsys.readouterr().out
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    base = AutoModelForCausalLM.from_pretrained(workshop.directory / "model")
    ids = torch.tensor([[1, 2, 3, 4]])
    assert not torch.equal(merged(ids).logits, base(ids).logits)
    assert (tmp_path / "merged" / "tokenizer.json").exists()
    assert cli.main(["merge", str(finished.directory), str(tmp_path / "merged")]) == 2
    assert "not empty" in capsys.readouterr().err
