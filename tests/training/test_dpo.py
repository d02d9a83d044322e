"""Runs of `task: dpo`: chosen before rejected, with the base as the reference."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import trl
from helpers import byte_tokenizer
from peft import PeftModel
from runs import Workshop, assert_resumed_alike, losses, smt, write_jsonl
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoTokenizer

from smt_peft import cli, select_blocks
from smt_peft.training import outputs
from smt_peft.training.run import choose, prepare, train
from smt_peft.training.yaml.schema import load_run

PAIRS = [
    {"prompt": f"upper: word{i % 7}\n", "chosen": f"WORD{i % 7}", "rejected": f"word{i % 7}, lower"} for i in range(32)
]
CHAT = {
    "chosen": [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Good day."}],
    "rejected": [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "What?"}],
}


@pytest.fixture(scope="module")
def preferences(workshop, tmp_path_factory) -> Workshop:
    directory = tmp_path_factory.mktemp("preferences")
    model = directory / "model"
    shutil.copytree(workshop.settings["model_name_or_path"], model)
    # Reference and policy are both in training mode, where its attention would make noise.
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.0}))
    settings = {
        **workshop.settings,
        "model_name_or_path": str(model),
        "task": "dpo",
        "dataset_path": str(write_jsonl(directory / "train.jsonl", PAIRS)),
        "eval_dataset_path": str(write_jsonl(directory / "test.jsonl", PAIRS[:6])),
        "learning_rate": 1e-2,
        "max_length": 64,
    }
    return Workshop(directory, settings)


@pytest.fixture(scope="module")
def whole(preferences):
    """One run through the command line, with everything."""
    path = preferences.write("whole", verify=True, compare_lora=True, gradient_checkpointing=True)
    done = smt("train", path)
    assert done.returncode == 0, done.stderr
    directory = preferences.directory / "whole"
    return done, directory, json.loads((directory / outputs.METRICS).read_text())


def answer_logps(model, tokenizer, row: dict) -> list[torch.Tensor]:
    """Summed log-probability of each answer, with the end-of-text token that closes it."""
    found = []
    for name in ("chosen", "rejected"):
        prompt, answer = tokenizer(row["prompt"])["input_ids"], tokenizer(row[name])["input_ids"]
        target = torch.tensor([*answer, tokenizer.eos_token_id])
        logits = model(input_ids=torch.tensor([[*prompt, *target]])).logits[0, len(prompt) - 1 : -1]
        found.append(logits.log_softmax(-1).gather(1, target[:, None]).sum())
    return found


def dpo_loss(model, base, tokenizer, row: dict, beta: float = 0.1) -> torch.Tensor:
    """Equation 7 of Rafailov et al. 2023."""
    policy = answer_logps(model, tokenizer, row)
    with torch.no_grad():
        reference = answer_logps(base, tokenizer, row)
    return -logsigmoid(beta * ((policy[0] - reference[0]) - (policy[1] - reference[1])))


def test_a_run_learns_the_preference_saves_and_verifies(whole):
    done, directory, metrics = whole
    assert metrics["before"]["eval_loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert metrics["before"]["reward_margin"] == 0
    assert metrics["after"]["eval_loss"] < 0.9 * metrics["before"]["eval_loss"]
    assert metrics["after"]["reward_accuracy"] == 1 and metrics["after"]["reward_margin"] > 0
    assert metrics["lora"]["eval_loss"] < metrics["before"]["eval_loss"]
    assert set(metrics["verified"]["passed"].values()) == {True}
    assert metrics["verified"]["reload_difference"] == 0
    assert "train set: " in done.stdout and "preference, 32 rows" in done.stdout
    assert "chosen preferred" in (directory / outputs.REPORT).read_text()


def test_the_loss_is_that_of_the_paper_with_the_base_as_reference(whole, preferences):
    _, directory, metrics = whole
    model = preferences.settings["model_name_or_path"]
    tokenizer = AutoTokenizer.from_pretrained(model)
    base = AutoModelForCausalLM.from_pretrained(model).eval()
    trained = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), directory).eval()
    with torch.no_grad():
        truth = torch.stack([dpo_loss(trained, base, tokenizer, row) for row in PAIRS[:6]]).mean()
    assert metrics["after"]["eval_loss"] == pytest.approx(truth.item(), rel=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_blocks_are_scored_by_the_gradient_of_that_loss(preferences, checkpointing, monkeypatch):
    batches = []

    def spy(model, config, loader, loss_fn, **settings):
        def recording(model, batch):
            batches.append(batch)
            return loss_fn(model, batch)

        return select_blocks(model, config, loader, loss_fn=recording, **settings)

    monkeypatch.setattr("smt_peft.training.run.select_blocks", spy)
    run = load_run(preferences.write("scored", max_steps=1, gradient_checkpointing=checkpointing))
    chosen = choose(run, prepared := prepare(run), None)
    assert not hasattr(prepared.model, "peft_config") and len(batches) == 2

    def loss(model, batch):
        half = len(batch["input_ids"]) // 2
        rows = [
            (ids[mask.bool()], words.sum())
            for ids, mask, words in zip(
                *(batch[key] for key in ("input_ids", "attention_mask", "completion_mask")), strict=False
            )
        ]
        pairs = zip(rows[:half], rows[half:], strict=True)
        return torch.stack([from_logps(*(logp(model, *row) for row in pair)) for pair in pairs]).mean()

    truth = select_blocks(prepared.model, run.smt, batches, 2, loss_fn=loss, progress=False)
    for name, scores in truth.scores.items():
        torch.testing.assert_close(chosen.scores[name], scores, rtol=1e-4, atol=1e-9)
    assert chosen.blocks.keys() == truth.blocks.keys()


def logp(model, ids: torch.Tensor, words: int) -> torch.Tensor:
    """Of the last `words` tokens."""
    logits = model(input_ids=ids[None]).logits[0, -words - 1 : -1]
    return logits.log_softmax(-1).gather(1, ids[-words:, None]).sum()


def from_logps(chosen: torch.Tensor, rejected: torch.Tensor, beta: float = 0.1) -> torch.Tensor:
    """Equation 7 of a model that is its own reference."""
    return -logsigmoid(beta * ((chosen - chosen.detach()) - (rejected - rejected.detach())))


def test_it_resumes_with_the_losses_of_one_that_never_stopped(preferences):
    assert_resumed_alike(preferences)


def test_layers_in_turn_resume_between_two_periods(preferences):
    """The reference is the base, whatever trains."""
    assert_resumed_alike(preferences, layer_sampling={"layers": 1, "every": 4, "moments": "move"})


def test_the_reference_may_be_computed_beforehand(preferences):
    path = preferences.write("on_the_way", max_steps=3)
    straight = train(load_run(path))
    path = preferences.write("beforehand", max_steps=3, precompute_ref_log_probs=True)
    beforehand = train(load_run(path))
    for step, (loss, _) in losses(straight).items():
        assert losses(beforehand)[step][0] == pytest.approx(loss, rel=1e-5)
    assert beforehand["after"]["eval_loss"] == pytest.approx(straight["after"]["eval_loss"], rel=1e-5)


@pytest.mark.parametrize("settings", [{"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]}, {"ld_alpha": 0.5}])
def test_other_losses_of_the_trainer_score_and_train(preferences, settings):
    path = preferences.write(
        "other", output_dir=str(preferences.directory / "-".join(settings)), max_steps=2, **settings
    )
    assert train(load_run(path))["after"]["eval_loss"] > 0


def test_smt_adamw_trains_a_run(preferences):
    metrics = train(load_run(preferences.write("fused", max_steps=3, optim="smt_adamw_8bit")))
    assert metrics["after"]["eval_loss"] < metrics["before"]["eval_loss"]


def test_a_stream_of_conversations_trains(preferences, tmp_path):
    model = tmp_path / "chat"
    shutil.copytree(preferences.settings["model_name_or_path"], model)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text()
    tokenizer.save_pretrained(model)
    path = preferences.write(
        "stream",
        model_name_or_path=str(model),
        dataset_path=str(write_jsonl(tmp_path / "chats.jsonl", [CHAT] * 12)),
        eval_dataset_path=None,
        dataset_streaming=True,
        max_steps=2,
        max_length=256,
    )
    assert len(losses(train(load_run(path)))) == 2


def test_a_dry_run_shows_both_answers(preferences, capsys, monkeypatch):
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    before = {entry: entry.stat().st_mtime_ns for entry in preferences.directory.rglob("*")}
    path = preferences.write("dry")
    assert cli.main(["train", "--dry-run", str(path)]) == 0
    out = capsys.readouterr().out
    assert "one pair, a prompt of 13 tokens (inside [-  -]), a chosen answer of 6, a rejected one of 13:" in out
    assert "chosen:\n[-upper: word0\n-]WORD0<eos>\nrejected:\n[-upper: word0\n-]word0, lower<eos>" in out
    assert "beta: 0.1" in out and "packing" not in out
    assert set(preferences.directory.rglob("*")) == {*before, path}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"packing": True}, "line .*: unknown key 'packing' for task: dpo; it is a key of task: sft"),
        ({"task": "sft", "beta": 0.2}, "unknown key 'beta' for task: sft; it is a key of task: dpo"),
        ({"task": None, "rl": "dpo", "beta": "much"}, "beta must be a number"),
        ({"task": "dpoo"}, "task must be 'sft' or 'dpo' or 'classification'"),
        ({"sync_ref_model": True}, "'sync_ref_model'; it has no effect here"),
        ({"eval_exact_match": True}, "eval_exact_match is about completions of prompts, which task: dpo does not make"),
        ({"dataset_format": "alpaca"}, "rows of task: dpo have the form preference, not alpaca"),
        ({"loss_type": "sigmiod"}, "loss_type: there is no loss 'sigmiod'; did you mean 'sigmoid'"),
        ({"loss_type": ["sigmoid", "kto"]}, "loss_type.1: there is no loss 'kto'; there are sigmoid"),
        ({"max_length": 4}, "max_length: no prompt leaves room for an answer within 4 tokens"),
        ({"smt": {"target_modules": ["query"]}}, "smt: Target modules {'query'} not found"),
        ({"stage": "dpo"}, "task .* and stage .* both set task"),
    ],
)
def test_what_cannot_be_is_refused_by_name(preferences, capsys, changed, message):
    import re

    assert cli.main(["train", "--dry-run", str(preferences.write("refused", **changed))]) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("block", [{"freezing": {"share": 0.5}}, {"layer_sampling": {"layers": 1}}])
def test_what_rests_goes_on_resting_while_the_reference_is_computed(preferences, tmp_path, block):
    """Checkpointing notices when other blocks train in the recomputation."""
    workshop = replace(preferences, directory=tmp_path)
    metrics = train(load_run(workshop.write("resting", max_steps=2, gradient_checkpointing=True, **block)))
    assert sorted(losses(metrics)) == [1, 2]
