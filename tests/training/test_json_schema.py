"""The JSON schema of a run: it knows every key, takes what `smt train` takes, and refuses what it would refuse."""

from __future__ import annotations

import json

import pytest
from omegaconf import OmegaConf
from runs import ROOT

from smt_peft import cli
from smt_peft.training.yaml.aliases import ALIASES, REFUSED
from smt_peft.training.yaml.json_schema import documented, json_schema
from smt_peft.training.yaml.keys import BLOCKS, TRAINERS, RunConfig, Warmup, known_keys

SHIPPED = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.fixture(scope="module")
def schema() -> dict:
    return json_schema()


@pytest.fixture(scope="module")
def validate(schema):
    validator = pytest.importorskip("jsonschema").Draft202012Validator
    validator.check_schema(schema)
    return validator(schema).validate


@pytest.fixture
def settings() -> dict:
    """As read from a shipped file: OmegaConf reads 2e-4 as a number, as YAML 1.2 and so editors do."""
    return OmegaConf.to_container(OmegaConf.load(ROOT / "configs" / "quickstart.yaml"))


def test_the_verb_prints_it(schema, capsys):
    assert cli.main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == schema
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"


def test_it_has_every_key_and_alias_and_no_other(schema):
    flat, block = schema["properties"], schema["properties"]["smt"]
    keys = {key for task in TRAINERS for key in known_keys(task) if "." not in key} | ALIASES.keys() | BLOCKS.keys()
    assert flat.keys() == keys
    nested = {f"{name}.{key}" for name in BLOCKS for key in flat[name]["properties"]}
    assert nested == {key for key in known_keys() if "." in key}
    assert schema["additionalProperties"] is block["additionalProperties"] is False
    assert not flat.keys() & REFUSED.keys()


def test_every_reference_leads_somewhere(schema):
    wanted = {part.split('"')[0] for part in json.dumps(schema).split('"#/$defs/')[1:]}
    assert wanted == set(schema["$defs"])


def test_keys_are_described_with_their_defaults(schema):
    flat, block = schema["properties"], schema["properties"]["smt"]["properties"]
    assert all(entry["description"] for entry in (*flat.values(), *block.values()))
    assert flat["load_in_8bit"]["description"] == "the same to 8 bits."
    assert block["layers_to_transform"]["description"] == "indices of the layers to tune."
    assert (flat["verify"]["default"], block["seed"]["default"]) == (True, 0)
    assert block["warmup_batches"]["default"] == Warmup().warmup_batches
    assert flat["load_in_4bit"]["default"] is False


def test_an_alias_is_deprecated_and_names_its_key(schema):
    for name, alias in ALIASES.items():
        entry = schema["properties"][name]
        assert entry["deprecated"] is True and f"`{alias.key}`" in entry["description"]
    assert not any(entry.get("deprecated") for name, entry in schema["properties"].items() if name not in ALIASES)


def test_docstrings_are_read_to_the_end_of_their_entries():
    entries = documented(RunConfig)
    assert entries.keys() == RunConfig.__dataclass_fields__.keys()
    assert entries["eval_exact_match"].startswith("complete the prompts")
    assert entries["eval_exact_match"].endswith("surrounding blanks aside.")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_shipped_files_fit(validate, path):
    validate(OmegaConf.to_container(OmegaConf.load(path)))


@pytest.mark.parametrize(
    "changed",
    [
        {"smt": None},
        {"run_name": "r", "learning_rate": "${smt.density}"},
        {"learning_rate": None, "lr": 1e-3},
        {"train_on_inputs": False},
        {"eval_strategy": False},
        {"optim": "smt_adamw_bf16"},
        {"smt": {"budget": {"q_proj": 0.5}, "block_size": [8, -1], "target_modules": ["q_proj"]}},
        {"model_name_or_path": None, "base_model": "org/model"},
    ],
)
def test_what_train_takes_fits(validate, settings, changed):
    validate({key: value for key, value in (settings | changed).items() if value is not None or key == "smt"})


@pytest.mark.parametrize(
    "changed",
    [
        {"learning_rat": 1e-3},
        {"learning_rate": "fast"},
        {"max_steps": 1.5},
        {"lr_scheduler_type": "spiral"},
        {"optim": "smt_adam"},
        {"lora_r": 8},
        {"lr": "fast"},
        {"train_on_inputs": 3},
        {"smt": {"score": "grad_abz"}},
        {"smt": {"blok_size": 8}},
        {"smt": {"spread": "even"}},
        {"smt": 3},
        {"output_dir": None},
        {"dataset_path": None},
    ],
)
def test_what_is_wrong_is_refused(validate, settings, changed):
    from jsonschema import ValidationError

    with pytest.raises(ValidationError):
        validate({key: value for key, value in (settings | changed).items() if value is not None})
