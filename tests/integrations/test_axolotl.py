"""`adapter: smt` in axolotl's own command line; `make integrations` installs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from helpers import save_tiny_model
from host_runs import (
    WORDS,
    assert_blocks_alone_trained,
    assert_merged,
    assert_reloads,
    assert_same_adapter,
    host,
    losses,
    succeeded,
)

from smt_peft import BlockSelection

pytest.importorskip("axolotl")

COMPLETION = {"field_instruction": "prompt", "field_output": "completion", "format": "{instruction}"}


class Workshop:
    def __init__(self, directory: Path):
        self.directory, self.base = directory, directory / "base"
        save_tiny_model(self.base)
        rows = [{"prompt": prompt, "completion": completion} for prompt, completion in WORDS]
        self.settings = {
            "base_model": str(self.base),
            "plugins": ["smt_peft.integrations.axolotl.SMTPlugin"],
            "adapter": "smt",
            "smt": {"density": 0.1, "block_size": 8, "warmup_batches": 2},
            "datasets": [self.rows("train", rows, {**COMPLETION, "no_input_format": "{instruction}"})],
            "dataset_prepared_path": str(directory / "prepared"),
            "sequence_len": 64,
            "micro_batch_size": 4,
            "gradient_accumulation_steps": 1,
            "max_steps": 4,
            "learning_rate": 0.01,
            "lr_scheduler": "constant",
            "optimizer": "adamw_torch",
            "bf16": False,
            "logging_steps": 1,
            "save_steps": 2,
        }

    def rows(self, name: str, rows: list[dict], kind: dict) -> dict:
        path = self.directory / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return {"path": str(path), "ds_type": "json", "split": "train", "type": kind}

    def write(self, name: str, **changes) -> Path:
        path = self.directory / f"{name}.yaml"
        settings = {**self.settings, "output_dir": str(self.directory / name), **changes}
        path.write_text(yaml.safe_dump(settings))
        return path

    def train(self, name: str, **changes) -> Path:
        """The directory of a finished run."""
        succeeded(host("axolotl.cli.main", "train", self.write(name, **changes), "--launcher", "python"))
        return self.directory / name


@pytest.fixture(scope="module")
def workshop(tmp_path_factory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("axolotl"))


@pytest.fixture(scope="module")
def trained(workshop) -> Path:
    return workshop.train("trained")


@pytest.fixture(scope="module")
def selection(trained) -> BlockSelection:
    return BlockSelection.load(trained / "selection.safetensors")


def test_blocks_are_chosen_by_axolotls_own_batches(selection):
    assert selection.provenance["score"] == "grad_abs"
    # Four rows a batch, which axolotl pads to 64 tokens.
    assert (selection.provenance["num_batches"], selection.provenance["num_tokens"]) == (2, 2 * 4 * 64)


def test_the_chosen_blocks_alone_train_and_the_loss_falls(trained, selection):
    assert_blocks_alone_trained(trained / "checkpoint-4", selection)
    assert_same_adapter(trained, trained / "checkpoint-4")
    seen = losses(trained / "checkpoint-4")
    assert len(seen) == 4 and seen[-1] < seen[0]


def test_the_adapter_reloads_in_a_fresh_process_without_axolotl(workshop, trained, tmp_path):
    assert_reloads(workshop.base, trained, tmp_path)


def test_merge_lora_merges_the_blocks_exactly(workshop, trained):
    succeeded(host("axolotl.cli.main", "merge-lora", workshop.directory / "trained.yaml"))
    assert_merged(workshop.base, trained, trained / "merged")


def test_a_resumed_run_ends_as_one_that_was_never_interrupted(workshop, trained):
    resumed = workshop.train("resumed", resume_from_checkpoint=str(trained / "checkpoint-2"))
    assert_same_adapter(trained / "checkpoint-4", resumed / "checkpoint-4")
    assert losses(resumed / "checkpoint-4") == losses(trained / "checkpoint-4")


def test_packed_rows_choose_and_train_blocks(workshop):
    packed = workshop.train("packed", sample_packing=True, attn_implementation="sdpa", pad_to_sequence_len=True)
    chosen = BlockSelection.load(packed / "selection.safetensors")
    assert_blocks_alone_trained(packed / "checkpoint-4", chosen)


def test_a_base_of_four_bits_is_scored_and_trained(workshop):
    pytest.importorskip("bitsandbytes")
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_compute_dtype": "float32"}
    run = workshop.train("quantised", overrides_of_model_kwargs={"quantization_config": quantization})
    assert_blocks_alone_trained(run / "checkpoint-4", BlockSelection.load(run / "selection.safetensors"))
    assert json.loads((run / "adapter_config.json").read_text())["base_quantization"]["load_in_4bit"] is True


def test_preferences_train_the_blocks_of_a_selection_file(workshop, trained, selection):
    kind = {
        **{f"field_{part}": part for part in ("prompt", "chosen", "rejected")},
        **{f"{part}_format": f"{{{part}}}" for part in ("prompt", "chosen", "rejected")},
    }
    rows = [{"prompt": prompt, "chosen": answer, "rejected": answer.lower()} for prompt, answer in WORDS[:16]]
    run = workshop.train(
        "preferences",
        rl="dpo",
        datasets=[workshop.rows("preferences", rows, kind)],
        smt={"density": 0.1, "block_size": 8, "selection": str(trained / "selection.safetensors")},
    )
    assert_blocks_alone_trained(run / "checkpoint-4", selection)
    seen = losses(run / "checkpoint-4")
    assert seen[-1] < seen[0]


def settings_of(**changes):
    """The `smt` keys after the plugin's check, in a whole that axolotl would check further."""
    from smt_peft.integrations.axolotl import SMTArgs

    return SMTArgs.check_smt({"adapter": "smt", **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"smt": {"densty": 0.1}}, "smt.densty: unknown setting; did you mean 'density'?"),
        ({"smt": {"density": 2}}, "smt: density must be above 0"),
        ({"lora_r": 8}, "lora_r belongs to LoRA"),
        ({"load_in_4bit": True}, "load_in_4bit is followed for `adapter: lora`"),
        ({"rl": "dpo"}, "rl: dpo has no batches"),
        ({"adapter": "lora", "smt": {"density": 0.1}}, "has an effect with `adapter: smt` only"),
    ],
)
def test_a_wrong_setting_is_refused_with_its_repair(changes, message):
    with pytest.raises(ValueError, match=message.replace("(", "\\(").replace("?", "\\?")):
        settings_of(**changes)


def test_the_command_line_shows_the_refusal_before_a_model_is_loaded(workshop):
    done = host("axolotl.cli.main", "train", workshop.write("wrong", smt={"densty": 0.1}), "--launcher", "python")
    assert done.returncode != 0 and "did you mean 'density'?" in done.stdout + done.stderr
    assert "Loading weights" not in done.stderr


def test_keys_that_every_adapter_shares_are_followed(workshop):
    from smt_peft.integrations.axolotl import _settings

    given = {"lora_target_modules": ["q_proj"], "lora_modules_to_save": ["lm_head"], "smt": {"density": 0.1}}
    config = _settings(given).config
    assert config.target_modules == {"q_proj"} and config.modules_to_save == ["lm_head"]
    own = _settings({**given, "smt": {"target_modules": ["v_proj"]}}).config
    assert own.target_modules == {"v_proj"}
