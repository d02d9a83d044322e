"""The YAML of a run: its keys, and what is said about wrong ones."""

from __future__ import annotations

import textwrap
from typing import get_args

import pytest

from smt_peft.training.data.forms import FORMS
from smt_peft.training.errors import ConfigError
from smt_peft.training.yaml.keys import TASK_FORMS, RunConfig, known_keys
from smt_peft.training.yaml.schema import load_run


def errors_of(path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_run(path, overrides)
    return str(caught.value).splitlines()


def test_our_own_keys_are_these():
    """A new key is a promise: it belongs here only when neither TRL nor SMTConfig has one for it."""
    assert set(RunConfig.__dataclass_fields__) == {
        "preset",
        "task",
        "model_name_or_path",
        "dtype",
        "load_in_4bit",
        "load_in_8bit",
        "bnb_4bit_quant_type",
        "bnb_4bit_use_double_quant",
        "dataset_path",
        "dataset_name",
        "dataset_config",
        "dataset_train_split",
        "dataset_test_split",
        "eval_dataset_path",
        "dataset_mixture",
        "dataset_mixture_stopping_strategy",
        "dataset_format",
        "dataset_streaming",
        "on_broken_row",
        "eval_exact_match",
        "generation_max_new_tokens",
        "generation_batch_size",
        "compare_lora",
        "compare_lora_learning_rate",
        "verify",
        "mezo_eps",
        "mezo_samples",
    }
    assert {key for key in known_keys() if key.startswith("smt.")} == {
        "smt." + name
        for name in (
            "target_modules",
            "target_parameters",
            "exclude_modules",
            "block_size",
            "density",
            "density_pattern",
            "num_blocks",
            "score",
            "budget",
            "spread",
            "max_column_share",
            "max_lora_rank",
            "lora_rank",
            "lora_alpha",
            "lora_dropout",
            "coupled",
            "avoid",
            "selection",
            "forward",
            "saved_activations",
            "init_weights",
            "modules_to_save",
            "layers_to_transform",
            "layers_pattern",
            "trainable_token_indices",
            "seed",
            "warmup_batches",
        )
    }
    assert {"learning_rate", "max_steps", "packing", "completion_only_loss"} <= known_keys().keys()


def test_values_reach_the_configs(workshop):
    run = load_run(
        workshop.write("values"),
        ["learning_rate=2e-4", "smt.density=0.02", "smt.block_size=[8, 16]", "eval_strategy=no", "warmup_steps=0.1"],
    )
    assert run.trainer.learning_rate == 2e-4
    assert run.trainer.eval_strategy == "no"
    assert run.trainer.warmup_steps == 0.1
    assert run.smt.density == 0.02
    assert run.smt.block_size == [8, 16]
    assert (run.selection, run.warmup_batches) == ("auto", 2)
    assert run.resolved["smt"]["density"] == 0.02


def test_the_forms_of_the_schema_are_those_that_are_read():
    forms = get_args(known_keys()["dataset_format"])
    assert forms == ("auto", *(form for forms in TASK_FORMS.values() for form in forms))
    assert TASK_FORMS["sft"] == tuple(FORMS)


def test_interpolation_and_yaml_floats(workshop):
    path = workshop.write("interpolated", run_name="r", output_dir=str(workshop.directory) + "/${run_name}")
    path.write_text(path.read_text() + "weight_decay: 1e-3\n")
    run = load_run(path)
    assert run.trainer.output_dir == str(workshop.directory / "r")
    assert run.trainer.weight_decay == 1e-3


def test_all_errors_come_at_once_with_line_and_hint(workshop):
    path = workshop.directory / "wrong.yaml"
    path.write_text(
        textwrap.dedent(f"""\
        model_name_or_path: {workshop.directory / "model"}
        dataset_path: {workshop.directory / "train.jsonl"}
        learning_rat: 2e-4
        max_steps: ten
        sequence_lenn: 8
        density: 0.1
        output_dir: out
        smt:
          blok_size: 8
          density: "much"
        """)
    )
    lines = errors_of(path, "num_train_epoch=3")
    expected = [
        ("command line", "unknown key 'num_train_epoch'; did you mean 'num_train_epochs'?"),
        ("line 3", "unknown key 'learning_rat'; did you mean 'learning_rate'?"),
        ("line 4", "max_steps must be a whole number, got 'ten' (text)"),
        ("line 5", "unknown key 'sequence_lenn'; did you mean 'max_length'?"),
        ("line 6", "unknown key 'density'; did you mean 'smt.density'? It belongs in the smt: block"),
        ("line 9", "unknown key 'smt.blok_size'; did you mean 'smt.block_size'?"),
        ("line 10", "smt.density must be a number or null, got 'much' (text)"),
    ]
    assert len(lines) == len(expected)
    for line, (place, message) in zip(lines, expected, strict=True):
        assert place in line and message in line


@pytest.mark.parametrize(
    ("changed", "place", "message"),
    [
        ({"model_name_or_path": None}, "", "model_name_or_path is missing"),
        ({"model_name_or_path": "./no/such"}, "line 1", "the directory ./no/such does not exist"),
        ({"dataset_path": "no.jsonl"}, "line 2", "dataset_path: there is no file no.jsonl"),
        ({"dataset_path": None}, "", "exactly one of dataset_path, dataset_name and dataset_mixture is needed, none"),
        ({"dataset_name": "org/set"}, "", "needed, dataset_path and dataset_name are set"),
        (
            {"dataset_mixture": [{"path": "pyproject.toml"}], "dataset_path": None},
            "line",
            "source 1: pyproject.toml is",
        ),
        ({"dataset_mixture": [{"name": "a", "wait": 1}], "dataset_path": None}, "line", "did you mean 'weight'?"),
        ({"dataset_mixture": [{"weight": 1}], "dataset_path": None}, "line", "exactly one of path (local files) and"),
        ({"dataset_mixture": [{"name": "a", "weight": 0}], "dataset_path": None}, "line", "a number above 0, got 0"),
        (
            {"dataset_mixture": [{"name": "a", "weight": 1}, {"name": "b"}], "dataset_path": None},
            "line",
            "source 2 has no weight, others have",
        ),
        ({"dataset_mixture": [], "dataset_path": None}, "line", "dataset_mixture is empty"),
        ({"dataset_format": "jsonl"}, "line", "dataset_format must be 'auto' or 'tokenised' or 'messages'"),
        ({"dataset_streaming": True, "max_steps": None}, "line", "dataset_streaming needs max_steps"),
        ({"eval_dataset_path": "pyproject.toml"}, "line 3", "none of .jsonl, .json, .csv, .parquet"),
        ({"eval_dataset_path": None, "eval_exact_match": True}, "line", "eval_exact_match needs an evaluation set"),
        ({"output_dir": None}, "", "output_dir is missing"),
        ({"trust_remote_code": True}, "line", "'trust_remote_code'; it has no effect here"),
        ({"lr_scheduler_type": "spiral"}, "line", "lr_scheduler_type: spiral is not a valid SchedulerType"),
        ({"smt": {"density": 0.1, "num_blocks": 4}}, "line", "both density=0.1 and num_blocks=4 are set"),
        ({"smt": {"density": 0}}, "line", "density must be above 0"),
        ({"smt": {"score": "grad_abz"}}, "line", "did you mean 'grad_abs'?"),
        ({"smt": {"spread": "even"}}, "line", "smt.spread must be 'free' or 'capped' or 'assignment'"),
        ({"smt": {"selection": "no.safetensors"}}, "line", "smt.selection: there is no file no.safetensors"),
        ({"smt": {"warmup_batches": 0}}, "line", "smt.warmup_batches must be at least 1"),
        ({"smt": 3}, "line", "smt is a block of settings"),
    ],
)
def test_one_wrong_thing_is_one_error(workshop, changed, place, message):
    lines = errors_of(workshop.write("one_wrong", **changed))
    assert len(lines) == 1
    assert message in lines[0] and place in lines[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1, 2", "line 1: no valid YAML"),
        ("- a\n- b\n", "mapping"),
        ("output_dir: ${nothing}\n", "nothing"),
        ("max_steps: 1\nmax_steps: 2\n", "max_steps"),
    ],
)
def test_what_is_no_run_at_all(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert message in errors_of(path)[0]


def test_a_missing_yaml_and_a_bad_override(workshop):
    assert "there is no YAML file at nowhere.yaml" in errors_of("nowhere.yaml")[0]
    assert "'learning_rate' is no override" in errors_of(workshop.write("plain"), "learning_rate")[0]


def test_a_wrong_value_inside_another_is_laid_to_its_own_line(workshop):
    path = workshop.write("nested", smt=None)
    begin = path.read_text()
    first = begin.count("\n") + 1
    path.write_text(
        begin
        + textwrap.dedent("""\
        smt:
          target_modules:
            - q_proj
            - 3
          budget:
            q_proj: 0.5
            'layers\\.0': all
          block_size: [8, wide]
          trainable_token_indices: {embed_tokens: [1, two]}
          density: 0.1
        """)
    )
    expected = [
        (3, "smt.target_modules.1 must be text, got 3 (a whole number)"),
        (6, "smt.budget.layers\\.0 must be a number, got 'all' (text)"),
        (7, "smt.block_size.1 must be a whole number, got 'wide' (text)"),
        (8, "smt.trainable_token_indices.embed_tokens.1 must be a whole number, got 'two' (text)"),
    ]
    lines = errors_of(path)
    assert lines == [f"{path}, line {first + offset}: {message}" for offset, message in expected]
    (line,) = errors_of(workshop.write("names", optim="adamw_torch", gradient_checkpointing_kwargs={1: True}))
    assert "gradient_checkpointing_kwargs.1: the name 1 must be text; put it in quotes" in line
    assert any("command line: smt.block_size.1" in line for line in errors_of(path, "smt.block_size=[8, far]"))


def test_what_the_config_refuses_inside_a_map_is_laid_to_its_own_line(workshop):
    path = workshop.write("shares", smt={"density": 0.1, "budget": {"q_proj": 0.5, "v_proj": 2.0}})
    (line,) = errors_of(path)
    number = path.read_text().splitlines().index("    v_proj: 2.0") + 1
    assert f"line {number}: smt.budget.v_proj: budget['v_proj'] must be above 0 and at most 1" in line


def test_a_missing_file_of_several_is_laid_to_its_own_line(workshop):
    path = workshop.write("files", dataset_path=[workshop.settings["dataset_path"], "no.jsonl"])
    (line,) = errors_of(path)
    assert "line 4: dataset_path: there is no file no.jsonl" in line


def test_bf16_on_a_cpu_needs_no_further_key(workshop):
    assert load_run(workshop.write("half"), ["bf16=true", "use_cpu=true"]).trainer.bf16
    assert not load_run(workshop.write("half"), ["use_cpu=true"]).trainer.bf16
