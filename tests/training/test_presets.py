"""Presets: each is a run that the schema takes, and what is given changes it."""

from __future__ import annotations

import pytest
from runs import write_jsonl

from smt_peft import SMTConfig
from smt_peft.presets import preset, presets
from smt_peft.training.errors import ConfigError
from smt_peft.training.yaml import beneath
from smt_peft.training.yaml.schema import load_run


@pytest.fixture
def run(tmp_path):
    """Writes a YAML with these lines over a model and data, and loads it."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    rows = write_jsonl(tmp_path / "train.jsonl", [{"text": "a"}])

    def load(*lines: str, overrides: tuple[str, ...] = ()):
        path = tmp_path / "run.yaml"
        common = (
            f"model_name_or_path: {tmp_path / 'model'}",
            f"dataset_path: {rows}",
            f"output_dir: {tmp_path / 'out'}",
        )
        path.write_text("\n".join((*common, *lines)) + "\n")
        return load_run(path, overrides)

    return load


@pytest.mark.parametrize("name", presets())
def test_every_preset_is_a_run_and_a_config(name, run):
    loaded = run(f"preset: {name}")
    settings = preset(name)
    python = SMTConfig(**settings.get("smt", {}))
    assert {key: getattr(loaded.smt, key) for key in settings.get("smt", {})} == {
        key: getattr(python, key) for key in settings.get("smt", {})
    }
    for key in settings.get("smt", {}):
        assert loaded.source.origin(f"smt.{key}") == f"preset {name}"


def test_what_is_given_changes_a_preset(run):
    loaded = run("preset: diablo", "smt:", "  density: 0.05", overrides=("learning_rate=1e-3",))
    assert (loaded.smt.score, loaded.smt.density, loaded.trainer.learning_rate) == ("diagonal", 0.05, 1e-3)
    assert loaded.source.origin("learning_rate") == "command line"


def test_another_name_of_a_key_changes_it_too(run):
    assert run("preset: diablo", "lr: 1e-3").trainer.learning_rate == 1e-3


def test_the_number_of_blocks_takes_the_place_of_a_density(run):
    assert run("preset: diablo", "smt: {num_blocks: 3, block_size: 8}").smt.density is None


def test_the_settings_in_a_run_directory_stand_for_themselves(run):
    first = run("preset: diablo")
    assert first.resolved["smt"]["score"] == "diagonal"
    assert first.resolved["preset"] == "diablo"


def test_an_unknown_preset_is_refused_with_the_nearest(run):
    with pytest.raises(ConfigError, match=r"line 4: unknown preset 'diabolo'; did you mean 'diablo'"):
        run("preset: diabolo")


def test_what_does_not_go_with_a_preset_is_laid_to_it(run, monkeypatch):
    monkeypatch.setattr(beneath, "preset", lambda name: {"smt": {"density": 7.0}})
    with pytest.raises(ConfigError, match=r"run.yaml, preset wrong: smt.density: density must be"):
        run("preset: wrong")
