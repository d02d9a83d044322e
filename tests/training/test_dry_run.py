"""A dry run: what it prints, what it refuses, and that it reads no weights and writes nothing."""

from __future__ import annotations

import pytest
from helpers import byte_tokenizer
from runs import write_jsonl

from smt_peft import cli
from smt_peft.training.dry_run import dry_run
from smt_peft.training.errors import ConfigError
from smt_peft.training.sample import marked
from smt_peft.training.yaml.schema import load_run


@pytest.fixture
def plain(monkeypatch):
    for name in ("FORCE_COLOR", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)


def test_it_tells_settings_data_targets_and_a_sample(workshop, capsys, plain):
    path = workshop.write("dry", learning_rate=None, lr=1e-3)
    before = {entry: entry.stat().st_mtime_ns for entry in workshop.directory.rglob("*")}
    assert cli.main(["train", "--dry-run", str(path), "max_steps=3"]) == 0
    out = capsys.readouterr().out
    lines = {line.split(":")[0].strip(): line.split("#")[-1].strip() for line in out.splitlines() if "  #" in line}
    assert lines["model_name_or_path"] == "line 1"
    assert lines["learning_rate"].endswith(", as lr")
    assert lines["max_steps"] == "command line"
    assert lines["max_length"] == lines["spread"] == lines["dtype"] == "default"
    assert path.read_text().splitlines()[int(lines["density"].removeprefix("line ")) - 1].strip() == "density: 0.1"
    assert "train set: " in out and "prompt/completion, 48 rows" in out
    assert "smt: 14 matrices of 15,360 weights (q_proj 2, k_proj 2, " in out
    assert out.index("smt: 14 matrices") < out.index("peak of a step") < out.index("one sample, ")
    assert (
        "one sample, 19 tokens, 6 of them learned; the others are inside [-  -]:\n[-upper: word0\n-]WORD0<eos>" in out
    )
    assert {entry: entry.stat().st_mtime_ns for entry in workshop.directory.rglob("*")} == before


def test_what_it_prints_of_the_settings_is_a_run(workshop, capsys, tmp_path, plain):
    path = workshop.write("printed", learning_rate=None, lr=2e-5, warmup_steps=0.1)
    run = load_run(path, ["smt.num_blocks=3", "smt.density=null"])
    capsys.readouterr()
    dry_run(run)
    text = capsys.readouterr().out
    (tmp_path / "again.yaml").write_text(text[: text.index("train set: ")])
    again = load_run(tmp_path / "again.yaml")
    assert again.smt == run.smt
    assert again.config == run.config
    ours, theirs = again.trainer.to_dict(), run.trainer.to_dict()
    assert {key for key in ours if ours[key] != theirs[key]} <= {"logging_dir"}


def test_a_plan_that_cannot_be_made_does_not_fail_it(workshop, capsys, plain, monkeypatch):
    def fails(*args):
        raise RuntimeError("no shape for aten::unknown\nmore of it")

    monkeypatch.setattr("smt_peft.plan.table.make_plan", fails)
    assert cli.main(["train", "--dry-run", str(workshop.write("unplanned"))]) == 0
    out = capsys.readouterr().out
    assert "memory: cannot be told beforehand: RuntimeError: no shape for aten::unknown\n" in out
    assert "one sample, " in out


def test_it_reads_no_weights(workshop, capsys, tmp_path):
    """A directory with a config and a tokenizer is enough."""
    for file in (workshop.directory / "model").iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    dry_run(load_run(workshop.write("no_weights", model_name_or_path=str(tmp_path))))
    assert "one sample" in capsys.readouterr().out


def test_unlearned_tokens_are_dimmed_where_colour_is_wanted(workshop, capsys, monkeypatch, plain):
    monkeypatch.setenv("FORCE_COLOR", "1")
    dry_run(load_run(workshop.write("coloured")))
    assert "the others are dimmed:\n\x1b[2mupper: word0\n\x1b[22mWORD0<eos>" in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    dry_run(load_run(workshop.write("coloured")))
    assert "\x1b" not in capsys.readouterr().out


def test_a_run_that_evaluates_as_it_trains_passes(workshop, capsys):
    assert cli.main(["train", "--dry-run", str(workshop.write("evaluates", eval_strategy="steps", eval_steps=4))]) == 0
    path = workshop.write("evaluates_nothing", eval_strategy="epoch", eval_dataset_path=None)
    assert cli.main(["train", "--dry-run", str(path)]) == 2
    assert "eval_strategy needs an evaluation set" in capsys.readouterr().err


def test_marks_follow_the_labels():
    tokenizer = byte_tokenizer()
    ids = tokenizer("abcd")["input_ids"]
    assert marked(tokenizer, ids, [-100, ids[1], -100, -100], colour=False) == "[-a-]b[-cd-]"
    assert marked(tokenizer, ids, ids, colour=True) == "abcd"


def test_the_sample_is_the_first_row_that_holds_something_to_learn(workshop, capsys, plain):
    rows = [{"prompt": "x" * 60, "completion": "cut off"}] * 70 + [{"prompt": "p", "completion": "kept"}]
    data = write_jsonl(workshop.directory / "late.jsonl", rows)
    path = workshop.write("late", dataset_path=str(data), eval_dataset_path=None, max_length=16)
    dry_run(load_run(path))
    assert "[-p-]kept<eos>" in capsys.readouterr().out
    write_jsonl(data, rows[:70])
    with pytest.raises(ConfigError, match="no row keeps a token to learn from within 16 tokens"):
        dry_run(load_run(path))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"smt": {"target_modules": ["query"]}}, "smt: Target modules {'query'} not found in the base model"),
        ({"smt": {"num_blocks": 10**6, "block_size": 8}}, "lower num_blocks"),
        ({"output_dir": "MODEL"}, "belongs to something else"),
        ({"learning_rat": 1}, "did you mean 'learning_rate'?"),
    ],
)
def test_what_train_would_refuse_ends_with_status_2(workshop, capsys, changed, message):
    if "output_dir" in changed:
        changed = {"output_dir": str(workshop.directory / "model")}
    assert cli.main(["train", "--dry-run", str(workshop.write("refused", **changed))]) == 2
    assert message in capsys.readouterr().err


def test_completions_are_not_looked_for_where_there_are_none(workshop, capsys):
    """TRL would train on every token."""
    data = write_jsonl(workshop.directory / "texts.jsonl", [{"text": "abc"}] * 8)
    path = workshop.write("texts", dataset_path=str(data), eval_dataset_path=None, train_on_inputs=False)
    assert cli.main(["train", "--dry-run", str(path)]) == 2
    assert "completion_only_loss: the training set holds plain text" in capsys.readouterr().err
