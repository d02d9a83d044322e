"""Runs with a low-rank pair beside the blocks: resumed alike, measured as what they are, refused by line."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from runs import Workshop, assert_resumed_alike
from safetensors.torch import load_file

from smt_peft.presets import preset
from smt_peft.training.errors import ConfigError
from smt_peft.training.run import train
from smt_peft.training.yaml.schema import load_run


@pytest.fixture(scope="module")
def workshop(workshop, tmp_path_factory) -> Workshop:
    """The same model and data in a place of its own, as a run refuses a directory that holds another's."""
    return replace(workshop, directory=tmp_path_factory.mktemp("low_rank_run"))


SMT = {"density": 0.05, "block_size": 8, "warmup_batches": 2, "lora_rank": 2, "lora_alpha": 6}


def test_a_resumed_run_ends_as_one_that_was_not_stopped(workshop):
    assert_resumed_alike(workshop, smt={**SMT, "lora_dropout": 0.2}, optim="smt_adamw", verify=True)


def test_what_a_run_measures_counts_the_pair(workshop):
    path = workshop.write("counted", smt=SMT, verify=True, compare_lora=True)
    metrics = train(load_run(path, ["max_steps=2"]))
    tensors = load_file(workshop.directory / "counted" / "adapter_model.safetensors")
    trained = sum(tensor.numel() for key, tensor in tensors.items() if not key.endswith("index"))
    assert metrics["trainable_parameters"] == trained
    assert metrics["memory"]["trained"] == 4 * trained and metrics["memory"]["moments"] >= 8 * trained
    # LoRA with as many: of the same modules, each with blocks and a pair here.
    assert metrics["lora"]["trainable_parameters"] == pytest.approx(trained, rel=0.15)
    assert metrics["verified"]["low_rank"] == len([key for key in tensors if key.endswith("lora_A")])
    found = metrics["effective_update"]
    assert found["entries"] > trained and 0 < found["changed"] <= found["entries"]
    config = json.loads((workshop.directory / "counted" / "adapter_config.json").read_text())
    assert config["lora_rank"] == 2


def test_a_selection_given_trains_from_the_pair_that_choosing_it_does(workshop):
    first = train(load_run(workshop.write("pair chosen", smt=SMT, verify=False), ["max_steps=2"]))
    given = {**SMT, "selection": str(workshop.directory / "pair chosen" / "selection.safetensors")}
    again = train(load_run(workshop.write("pair given", smt=given, verify=False), ["max_steps=2"]))
    assert [entry.get("loss") for entry in first["log_history"]] == [
        entry.get("loss") for entry in again["log_history"]
    ]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lora_alpha": 8}, "lora_alpha=8 has no effect without lora_rank"),
        ({"lora_rank": 8, "max_lora_rank": 8}, "leaves none of it to the blocks"),
        ({"lora_rank": 8, "target_parameters": ["experts.down_proj"]}, "names bare parameters"),
    ],
)
def test_what_contradicts_it_is_refused_with_its_line(workshop, settings, said):
    with pytest.raises(ConfigError, match=rf"refused\.yaml.*smt.*{said}"):
        load_run(workshop.write("refused", smt=settings))


def test_the_preset_has_the_papers_numbers():
    settings = preset("rosa")
    assert settings["learning_rate"] == 2e-4
    assert {key: settings["smt"][key] for key in ("lora_rank", "lora_alpha", "lora_dropout", "density", "score")} == {
        "lora_rank": 16,
        "lora_alpha": 16,
        "lora_dropout": 0.05,
        "density": 0.006,
        "score": "grad_sq",
    }
