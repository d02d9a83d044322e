"""`--tuner_type smt` in ms-swift's own command line; `make integrations` installs it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
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

pytest.importorskip("swift")

PLUGIN = """
from smt_peft.integrations.ms_swift import register

register({settings})
"""


class Workshop:
    def __init__(self, directory: Path):
        self.directory, self.base = directory, directory / "base"
        save_tiny_model(self.base)
        rows = [
            {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}
            for prompt, answer in WORDS
        ]
        (directory / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def plugin(self, settings: str) -> Path:
        path = self.directory / f"plugin{len(list(self.directory.glob('plugin*.py')))}.py"
        path.write_text(PLUGIN.format(settings=settings))
        return path

    def train(self, name: str, *more: str | Path, settings: str = "density=0.1, block_size=8, warmup_batches=2"):
        flags = {
            "model": self.base,
            "model_type": "llama",
            "template": "dummy",
            "dataset": self.directory / "train.jsonl",
            "external_plugins": self.plugin(settings),
            "tuner_type": "smt",
            "output_dir": self.directory / name,
            "add_version": False,
            "use_hf": True,
            "torch_dtype": "float32",
            "max_length": 64,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 1,
            "max_steps": 4,
            "learning_rate": 0.01,
            "logging_steps": 1,
            "save_steps": 2,
            "split_dataset_ratio": 0,
            "report_to": "none",
        }
        words = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
        return host("swift.cli.main", "sft", *words, *more)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("swift"))


@pytest.fixture(scope="module")
def trained(workshop) -> Path:
    succeeded(workshop.train("trained"))
    return workshop.directory / "trained"


@pytest.fixture(scope="module")
def selection(trained) -> BlockSelection:
    return BlockSelection.load(trained / "selection.safetensors")


def test_blocks_are_chosen_by_ms_swifts_own_batches(selection):
    assert selection.provenance["score"] == "grad_abs" and selection.provenance["num_batches"] == 2
    longest = max(len(prompt + answer) for prompt, answer in WORDS)
    assert 2 * 4 * longest <= selection.provenance["num_tokens"] <= 2 * 4 * 64


def test_the_chosen_blocks_alone_train_and_the_loss_falls(trained, selection):
    assert_blocks_alone_trained(trained / "checkpoint-4", selection)
    seen = losses(trained / "checkpoint-4")
    assert len(seen) == 4 and seen[-1] < seen[0]


def test_the_adapter_reloads_in_a_fresh_process_without_ms_swift(workshop, trained, tmp_path):
    assert_reloads(workshop.base, trained / "checkpoint-4", tmp_path)


def test_export_merges_the_blocks_exactly(workshop, trained, tmp_path):
    flags = ["--adapters", trained / "checkpoint-4", "--merge_lora", "true", "--use_hf", "true"]
    succeeded(host("swift.cli.main", "export", *flags, "--output_dir", tmp_path / "merged"))
    assert_merged(workshop.base, trained / "checkpoint-4", tmp_path / "merged")


def test_a_resumed_run_ends_as_one_that_was_never_interrupted(workshop, trained):
    succeeded(workshop.train("resumed", "--resume_from_checkpoint", trained / "checkpoint-2"))
    resumed = workshop.directory / "resumed"
    assert_same_adapter(trained / "checkpoint-4", resumed / "checkpoint-4")
    assert losses(resumed / "checkpoint-4") == losses(trained / "checkpoint-4")


def test_a_streamed_set_and_named_modules_are_followed(workshop):
    succeeded(workshop.train("streamed", "--streaming", "true", "--target_modules", "q_proj", "down_proj"))
    chosen = BlockSelection.load(workshop.directory / "streamed" / "selection.safetensors")
    assert {name.rpartition(".")[2] for name in chosen.blocks} == {"q_proj", "down_proj"}
    assert_blocks_alone_trained(workshop.directory / "streamed" / "checkpoint-4", chosen)


def test_a_wrong_setting_stops_the_command_line_before_a_model_is_loaded(workshop):
    done = workshop.train("wrong", settings="densty=0.1")
    assert done.returncode != 0 and "did you mean 'density'?" in done.stderr
    assert "Loading weights" not in done.stderr


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rlhf_type": "dpo"}, "rlhf_type=dpo does not train on labelled text"),
        ({"task_type": "embedding"}, "task_type=embedding has a loss of ms-swift's own"),
        ({"model_meta": SimpleNamespace(is_multimodal=True)}, "qwen2_vl embeds pictures"),
        ({"dataset": []}, "the data come tokenised"),
        ({}, None),
    ],
)
def test_what_has_no_batches_to_choose_by_is_told(changes, reason):
    from smt_peft.integrations.ms_swift import _why_no_batches

    plain = {"task_type": "causal_lm", "dataset": ["rows"], "model_type": "qwen2_vl"}
    args = SimpleNamespace(**{**plain, "model_meta": SimpleNamespace(is_multimodal=False), **changes})
    found = _why_no_batches(args)
    assert found is None if reason is None else found.startswith(reason)


def test_rows_that_are_too_long_are_left_out_and_each_process_has_its_own():
    from smt_peft.integrations import ms_swift

    class Template:
        def set_mode(self, mode):
            assert mode == "train"

        def encode(self, row):
            if row == 3:
                raise ms_swift.MaxLengthError
            return [{"row": row}, {"row": -row}] if row == 4 else {"row": row}

        def data_collator(self, batch):
            return [item["row"] for item in batch]

    def args(rank, world):
        return SimpleNamespace(
            get_template=Template,
            load_dataset=lambda: (range(1, 8), None),
            rank=rank,
            global_world_size=world,
            per_device_train_batch_size=2,
        )

    assert list(ms_swift._batches(args(-1, 1))) == [[1, 2], [4, -4], [5, 6], [7]]
    assert list(ms_swift._batches(args(1, 2))) == [[2, 4], [-4, 6]]
