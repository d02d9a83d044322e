"""Whole runs: what they save, that they are verified, and that they resume."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from runs import losses, write_jsonl
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from smt_peft import BlockSelection, cli, select_blocks
from smt_peft.report.html import HTML
from smt_peft.training import outputs
from smt_peft.training.errors import ConfigError, VerificationError
from smt_peft.training.run import select, train
from smt_peft.training.verify import verify_saved
from smt_peft.training.yaml.schema import load_run


def test_a_run_saves_everything_and_verifies_it(finished):
    names = {
        "adapter_model.safetensors",
        "adapter_config.json",
        outputs.SELECTION,
        outputs.RUN,
        outputs.METRICS,
        outputs.REPORT,
        outputs.PICTURE,
        HTML,
        "tokenizer.json",
    }
    assert names <= {path.name for path in finished.directory.iterdir()}
    assert not list(finished.directory.glob("*.part"))
    assert not (finished.directory / outputs.UNFINISHED).exists()
    lines = [line for line in finished.process.stdout.splitlines() if line.startswith("verified")]
    assert len(lines) == 4
    metrics = json.loads((finished.directory / outputs.METRICS).read_text())
    assert set(metrics["verified"]["passed"].values()) == {True}
    assert metrics["verified"]["reload_difference"] == 0


def test_the_metrics_hold_before_after_and_lora(finished):
    metrics = json.loads((finished.directory / outputs.METRICS).read_text())
    assert metrics["after"]["eval_loss"] < metrics["before"]["eval_loss"]
    assert 0 <= metrics["before"]["exact_match"] <= 1
    selection = BlockSelection.load(finished.directory / outputs.SELECTION)
    assert metrics["trainable_parameters"] == selection.effective_numel
    per_rank = sum(grid.rows + grid.cols for grid in selection.grids.values())
    assert abs(metrics["lora"]["trainable_parameters"] - selection.effective_numel) <= per_rank / 2
    assert metrics["lora"]["eval_loss"] < metrics["before"]["eval_loss"]
    assert {"torch", "peft", "trl"} <= metrics["versions"].keys()
    text = (finished.directory / outputs.REPORT).read_text()
    assert "LoRA, rank" in text and "down_proj" in text
    assert text in finished.process.stdout


def test_before_and_after_agree_with_plain_pytorch(finished, workshop):
    """The losses in the metrics are those of the base, and of base + adapter, on the rows of the file."""
    metrics = json.loads((finished.directory / outputs.METRICS).read_text())
    model = AutoModelForCausalLM.from_pretrained(workshop.directory / "model")
    tokenizer = AutoTokenizer.from_pretrained(workshop.directory / "model")
    rows = [json.loads(line) for line in (workshop.directory / "test.jsonl").read_text().splitlines()]

    @torch.no_grad()
    def loss(model) -> float:
        """Mean over the tokens of all completions, the closing end-of-text token among them."""
        total, count = 0.0, 0
        for row in rows:
            prompt, completion = (tokenizer(row[part])["input_ids"] for part in ("prompt", "completion"))
            target = torch.tensor([*completion, tokenizer.eos_token_id])
            logits = model(input_ids=torch.tensor([[*prompt, *target]])).logits[0, len(prompt) - 1 : -1]
            total += torch.nn.functional.cross_entropy(logits, target, reduction="sum").item()
            count += len(target)
        return total / count

    assert loss(model) == pytest.approx(metrics["before"]["eval_loss"], rel=1e-5)
    adapted = PeftModel.from_pretrained(model, finished.directory).eval()
    assert loss(adapted) == pytest.approx(metrics["after"]["eval_loss"], rel=1e-5)


def test_the_resolved_yaml_is_a_run_and_shows_the_override(finished):
    run = load_run(finished.directory / outputs.RUN)
    assert run.trainer.max_steps == 6
    assert run.resolved == load_run(finished.yaml, ["max_steps=6"]).resolved


def test_a_finished_run_is_not_overwritten(finished):
    before = (finished.directory / outputs.METRICS).read_bytes()
    with pytest.raises(ConfigError, match="output_dir.*finished"):
        train(load_run(finished.yaml, ["max_steps=6"]))
    with pytest.raises(ConfigError, match="output_dir.*another run.*learning_rate"):
        train(load_run(finished.yaml, ["max_steps=6", "learning_rate=0.5"]))
    assert (finished.directory / outputs.METRICS).read_bytes() == before


def test_a_directory_with_a_foreign_model_is_refused(workshop):
    with pytest.raises(ConfigError, match="output_dir.*belongs to something else"):
        train(load_run(workshop.write("foreign", output_dir=str(workshop.directory / "model"))))


def test_a_resumed_run_has_the_losses_of_one_that_never_stopped(workshop):
    path = workshop.write("resumed", save_strategy="steps", save_steps=4)
    directory = workshop.directory / "resumed"
    straight = train(load_run(path))
    weights = load_file(directory / "adapter_model.safetensors")
    chosen = (directory / outputs.SELECTION).read_bytes()
    # What a run killed between its steps 4 and 8 leaves behind.
    shutil.rmtree(directory / "checkpoint-8")
    for name in (outputs.METRICS, outputs.REPORT, outputs.PICTURE, "adapter_model.safetensors", "adapter_config.json"):
        (directory / name).unlink()
    with pytest.raises(ConfigError, match="half way; leave the key out"):
        train(load_run(path, ["resume_from_checkpoint=false"]))
    with pytest.raises(ConfigError, match=r"differs \(smt.density: 0.1 there, 0.2 now"):
        train(load_run(path, ["resume_from_checkpoint=true", "smt.density=0.2"]))

    resumed = train(load_run(path))

    assert sorted(losses(resumed)) == list(range(1, 9))
    assert losses(resumed) == losses(straight)
    assert resumed["after"]["eval_loss"] == straight["after"]["eval_loss"]
    assert (directory / outputs.SELECTION).read_bytes() == chosen
    again = load_file(directory / "adapter_model.safetensors")
    assert all(torch.equal(again[key], weights[key]) for key in weights)


@pytest.mark.parametrize("failing", ["verify_saved", "compare_lora"])
def test_a_run_is_finished_only_when_verified_and_compared(workshop, monkeypatch, failing):
    """One whose comparison is killed keeps its numbers, is not taken for finished, and can be brought to its end."""
    path = workshop.write(
        f"failed_{failing}", max_steps=2, verify=True, compare_lora=True, save_strategy="steps", save_steps=1
    )
    directory = workshop.directory / f"failed_{failing}"

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(f"smt_peft.training.run.{failing}", killed)
        with pytest.raises(KeyboardInterrupt):
            train(load_run(path))
    assert not (directory / outputs.METRICS).exists()
    numbers = json.loads((directory / outputs.UNFINISHED).read_text())
    assert numbers["after"]["eval_loss"] > 0 and ("verified" in numbers) == (failing == "compare_lora")
    weights = load_file(directory / "adapter_model.safetensors")

    metrics = train(load_run(path))

    again = load_file(directory / "adapter_model.safetensors")
    assert all(torch.equal(again[key], weights[key]) for key in weights)
    assert metrics["after"] == numbers["after"] and losses(metrics) == losses(numbers)
    assert metrics["verified"] and metrics["lora"]
    assert json.loads((directory / outputs.METRICS).read_text()) == metrics
    assert not (directory / outputs.UNFINISHED).exists() and not (directory / "checkpoint-3").exists()
    with pytest.raises(ConfigError, match="this very run, finished"):
        train(load_run(path))


def test_a_finished_run_that_goes_on_is_finished_no_longer(workshop, monkeypatch):
    path = workshop.write("longer", max_steps=2, save_strategy="steps", save_steps=1)
    train(load_run(path))

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("smt_peft.training.run.fit", killed)
    with pytest.raises(KeyboardInterrupt):
        train(load_run(path, ["resume_from_checkpoint=true", "max_steps=4"]))
    assert not (workshop.directory / "longer" / outputs.METRICS).exists()


def test_resuming_without_a_checkpoint_is_an_error(workshop):
    with pytest.raises(ConfigError, match="resume_from_checkpoint: there is no checkpoint"):
        train(load_run(workshop.write("nothing_here"), ["resume_from_checkpoint=true"]))
    assert not (workshop.directory / "nothing_here").exists()


def test_a_selection_file_trains_as_the_same_selection_chosen_on_the_way(workshop):
    path = workshop.write("chosen", max_steps=4)
    chosen = select(load_run(path, [f"output_dir={workshop.directory / 'selected'}"]))
    file = workshop.directory / "selected" / outputs.SELECTION
    assert BlockSelection.load(file) == chosen
    on_the_way = train(load_run(path))
    from_file = train(load_run(path, [f"smt.selection={file}", f"output_dir={workshop.directory / 'from_file'}"]))
    assert losses(from_file) == losses(on_the_way)


def test_the_selection_checkpoints_activations_where_the_training_does(workshop, monkeypatch):
    found = []

    def spy(model, *args, **kwargs):
        recomputed = [0]
        layer = model.model.layers[0].mlp
        handle = layer.register_forward_pre_hook(lambda *_: recomputed.__setitem__(0, recomputed[0] + 1))
        found.append((select_blocks(model, *args, **kwargs), recomputed[0], model.is_activation_checkpointing))
        handle.remove()
        return found[-1][0]

    monkeypatch.setattr("smt_peft.training.run.select_blocks", spy)
    for wanted in (False, True):
        path = workshop.write(f"checkpointed_{wanted}", max_steps=1, gradient_checkpointing=wanted)
        select(load_run(path))
    (plain, calls, _), (again, calls_again, switched_on) = found
    assert again == plain and switched_on
    assert (calls, calls_again) == (2, 4), "each batch passes twice"


def test_targets_that_match_nothing_are_an_error_before_anything_is_written(workshop, capsys):
    path = workshop.write("no_targets", smt={"block_size": 8, "density": 0.1, "target_modules": ["query"]})
    assert cli.main(["train", str(path)]) == 2
    assert "smt: Target modules" in capsys.readouterr().err
    assert not (workshop.directory / "no_targets" / outputs.RUN).exists()


def test_modules_trained_in_full_are_saved_and_verified(workshop):
    path = workshop.write(
        "in_full",
        max_steps=2,
        verify=True,
        smt={"block_size": 8, "density": 0.1, "score": "random", "modules_to_save": ["embed_tokens"]},
    )
    metrics = train(load_run(path))
    assert set(metrics["verified"]["passed"].values()) == {True}
    selection = BlockSelection.load(workshop.directory / "in_full" / outputs.SELECTION)
    assert metrics["trainable_parameters"] == selection.effective_numel + 264 * 32


def test_messages_need_a_chat_template(workshop):
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    data = write_jsonl(workshop.directory / "messages.jsonl", rows)
    with pytest.raises(ConfigError, match="chat_template_path"):
        train(load_run(workshop.write("messages", dataset_path=str(data))))


@pytest.fixture
def adapted(finished, workshop, tmp_path):
    """The model of the finished run in memory, and a copy of its directory that may be spoilt."""
    base = AutoModelForCausalLM.from_pretrained(workshop.directory / "model")
    shutil.copytree(finished.directory, tmp_path / "copy")
    return PeftModel.from_pretrained(base, tmp_path / "copy").eval(), tmp_path / "copy"


def test_verification_fails_when_the_selection_file_is_another(adapted, workshop, capsys):
    model, directory = adapted
    file = directory / outputs.SELECTION
    selection = BlockSelection.load(file)
    name = next(iter(selection.blocks))
    every = torch.arange(selection.grids[name].num_blocks)
    BlockSelection({name: selection.grids[name].unflatten(every)}, selection.grids).save(file)
    with pytest.raises(VerificationError, match="blocks"):
        verify_saved(model, [[1, 2, 3, 4]], str(workshop.directory / "model"), file, directory)
    assert "verified: read back" in capsys.readouterr().out


def test_verification_fails_when_the_saved_weights_are_not_the_trained_ones(adapted, workshop, capsys):
    model, directory = adapted
    file = directory / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if key.endswith("weight"))
    save_file({**tensors, key: tensors[key] + 1e-3}, file)
    with pytest.raises(VerificationError, match="reload"):
        verify_saved(model, [[1, 2, 3, 4]], str(workshop.directory / "model"), directory / outputs.SELECTION, directory)
    assert "FAILED: read back" in capsys.readouterr().out


def test_the_saved_config_names_base_and_blocks(finished, workshop):
    config = json.loads((finished.directory / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(workshop.directory / "model")
    assert Path(finished.directory / "README.md").exists()
    assert "selection" not in config
