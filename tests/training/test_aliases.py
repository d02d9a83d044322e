"""Names of other trainers: what they are read as, what is said, and what has no counterpart here."""

from __future__ import annotations

import pytest
from runs import ROOT, write_jsonl
from test_schema import errors_of

from smt_peft.training.yaml.aliases import ALIASES, REFUSED
from smt_peft.training.yaml.keys import known_keys
from smt_peft.training.yaml.schema import load_run


def test_an_alias_is_no_key_and_stands_for_one():
    known = known_keys()
    assert not known.keys() & (ALIASES.keys() | REFUSED.keys())
    assert not ALIASES.keys() & REFUSED.keys()
    assert {alias.key for alias in ALIASES.values()} <= known.keys() | known_keys("dpo").keys()


def test_every_alias_is_documented():
    told = (ROOT / "docs" / "yaml.md").read_text()
    assert not [name for name in ALIASES if f"`{name}" not in told and name != "calculate_strategy"]


def test_a_yaml_in_the_words_of_another_trainer(workshop, capsys):
    path = workshop.directory / "foreign_words.yaml"
    path.write_text(
        f"""\
base_model: {workshop.directory / "model"}
datasets:
  - path: {workshop.directory / "train.jsonl"}
    type: completion
sequence_len: 48
micro_batch_size: 3
num_epochs: 2
lr: 2e-4
lr_scheduler: cosine
warmup_ratio: 0.1
torch_dtype: torch.bfloat16
train_on_inputs: false
sample_packing: false
gradient_checkpointing: false
evaluation_strategy: no
output_dir: out
"""
    )
    run = load_run(path)
    trainer = run.trainer
    assert run.config.model_name_or_path == str(workshop.directory / "model")
    assert run.config.dataset_path == [str(workshop.directory / "train.jsonl")]
    assert run.config.dtype == "bfloat16"
    assert (trainer.max_length, trainer.per_device_train_batch_size, trainer.num_train_epochs) == (48, 3, 2)
    assert (trainer.learning_rate, trainer.lr_scheduler_type, trainer.warmup_steps) == (2e-4, "cosine", 0.1)
    assert trainer.completion_only_loss is True
    assert (trainer.packing, trainer.eval_strategy) == (False, "no")
    notices = capsys.readouterr().out.splitlines()
    assert len(notices) == 12
    assert notices[2] == f"{path}, line 5: sequence_len: 48 is read as max_length: 48"
    assert f"{path}, line 12: train_on_inputs: false is read as completion_only_loss: true" in notices
    assert run.source.origin("max_length") == "line 5, as sequence_len"
    assert run.resolved.keys().isdisjoint(ALIASES)


@pytest.mark.parametrize(
    ("given", "key", "value"),
    [
        ({"precision": "bf16-true"}, "dtype", "bfloat16"),
        ({"precision": 32}, "dtype", "float32"),
        ({"train_on_completions": True}, "completion_only_loss", True),
        ({"group_by_length": True}, "train_sampling_strategy", "group_by_length"),
        ({"group_by_length": False}, "train_sampling_strategy", "random"),
        ({"activation_checkpointing": True, "gradient_checkpointing": None}, "gradient_checkpointing", True),
        ({"optimizer": "smt_adamw_8bit"}, "optim", "smt_adamw_8bit"),
    ],
)
def test_values_are_converted_where_they_differ(workshop, given, key, value):
    assert load_run(workshop.write("converted", **given)).resolved[key] == value


@pytest.mark.parametrize(("theirs", "ours"), [("mean_abs", "mean_abs"), ("abs_mean", "grad_sum_abs")])
def test_the_scores_of_the_paper(workshop, theirs, ours):
    assert load_run(workshop.write("scores", calculation_strategy=theirs)).smt.score == ours


def line_of(path, key: str) -> str:
    """`line 3` for the line of the file that begins with a key."""
    lines = [line.strip(" -") for line in path.read_text().splitlines()]
    return f"line {next(number for number, line in enumerate(lines, start=1) if line.startswith(key))}"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lr": 1e-3}, ") both set learning_rate; keep one of them"),
        ({"num_epochs": 2, "epochs": 1}, ") both set num_train_epochs; keep one of them"),
        ({"activation_checkpointing": True}, ") both set gradient_checkpointing"),
        ({"cutoff_len": "long"}, " (cutoff_len): max_length must be a whole number or null, got 'long'"),
        ({"warmup_ratio": 3}, "warmup_ratio: 3 has no counterpart; a ratio is at least 0 and below 1"),
        ({"train_on_inputs": "no"}, "train_on_inputs must be true or false, got 'no'"),
        ({"precision": "bf16-mixed"}, "precision: bf16-mixed has no counterpart; for mixed precision write"),
        ({"torch_dtype": "int8"}, " (torch_dtype): dtype must be 'auto' or 'float32'"),
        ({"calculation_strategy": "L2"}, "calculation_strategy: L2 has no counterpart"),
        ({"num_submatrix_attn": 890}, "num_blocks: 890, budget: global, spread: free}"),
        ({"full_ft_steps": 100}, "smt: {warmup_batches: 100}"),
        ({"val_set_size": 0.1}, "write eval_dataset_path: FILE"),
        ({"lora_r": 16}, "lora_r is no key of a run; blocks have no rank; write smt: {density: 0.01}"),
    ],
)
def test_what_has_no_counterpart_says_what_to_write(workshop, changed, message):
    path = workshop.write("no_counterpart", **changed)
    (line,) = errors_of(path)
    assert message in line and f", {line_of(path, list(changed)[-1])}" in line


def test_a_key_given_twice_names_both_lines(workshop):
    path = workshop.write("twice", lr=1e-3)
    places = f"learning_rate ({line_of(path, 'learning_rate')}) and lr ({line_of(path, 'lr:')})"
    assert errors_of(path) == [f"{path}, {line_of(path, 'lr:')}: {places} both set learning_rate; keep one of them"]


@pytest.mark.parametrize(
    ("entry", "key", "message"),
    [
        (
            {"path": "org/set", "type": "alpaca"},
            "path: org",
            "there is no file org/set; for a data set on the Hub write",
        ),
        ({"path": "FILE", "type": "pygmalion"}, "type", "the type 'pygmalion' is not understood"),
        ({"path": "FILE", "split": "train[:10]"}, "split", "split is not understood; prepare the rows"),
        ({"type": "alpaca"}, "type", "an entry needs the path of a local file"),
        (7, "7", "datasets.0 must be a map, got 7 (a whole number)"),
    ],
)
def test_a_list_of_data_sets_that_is_more_than_local_files(workshop, entry, key, message):
    if isinstance(entry, dict) and entry.get("path") == "FILE":
        entry["path"] = str(workshop.directory / "train.jsonl")
    path = workshop.write("sets", dataset_path=None, datasets=[entry])
    (line,) = errors_of(path)
    assert message in line and f", {line_of(path, key)}:" in line


def test_two_local_files(workshop):
    more = write_jsonl(workshop.directory / "more.jsonl", [{"prompt": "a", "completion": "b"}])
    files = [workshop.settings["dataset_path"], str(more)]
    path = workshop.write("two", dataset_path=None, datasets=[{"path": file} for file in files])
    assert load_run(path).config.dataset_path == files


def test_the_command_line_wins_by_whichever_name(workshop, capsys):
    assert load_run(workshop.write("named"), ["lr=0.5"]).trainer.learning_rate == 0.5
    assert "command line: lr: 0.5 is read as learning_rate: 0.5" in capsys.readouterr().out
    path = workshop.write("aliased", learning_rate=None, lr=0.1)
    assert load_run(path, ["learning_rate=0.5"]).trainer.learning_rate == 0.5
    assert "lr" not in capsys.readouterr().out
    (line,) = errors_of(path, "lr=0.1", "learning_rate=0.2")
    assert "lr (command line) and learning_rate (command line) both set learning_rate" in line


def test_a_mistyped_alias_leads_to_its_key(workshop):
    (line,) = errors_of(workshop.write("mistyped", sequence_length=48))
    assert "unknown key 'sequence_length'; did you mean 'max_length'?" in line
    (line,) = errors_of(workshop.write("inside", smt={"calculation_strategy": "mean_abs"}))
    assert "unknown key 'smt.calculation_strategy'; did you mean 'smt.score'?" in line
