"""Trainers of other libraries, given an `SMTConfig` where they expect any config of PEFT."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from helpers import save_tiny_model
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from smt_peft import SMTConfig
from smt_peft.optim import SMTAdamW

SETTINGS = {"block_size": 8, "density": 0.1, "score": "random", "task_type": "CAUSAL_LM"}
# Plain settings of every trainer here: on the CPU, a few steps, nothing written or shown that a test does not ask for.
ARGUMENTS = {
    "use_cpu": True,
    "max_steps": 4,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
}
PROMPTS = [f"upper: word{i}\n" for i in range(8)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("hosts")
    save_tiny_model(path / "model")
    return path


@pytest.fixture
def model(directory):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_pretrained(directory / "model", attention_dropout=0.0)


@pytest.fixture
def tokenizer(directory):
    return AutoTokenizer.from_pretrained(directory / "model")


def frozen_and_trained(model):
    """The base's tensors, and the blocks."""
    base = {name: p.detach().clone() for name, p in model.named_parameters() if "smt_blocks" not in name}
    blocks = {name: p.detach().clone() for name, p in model.named_parameters() if "smt_blocks" in name}
    return base, blocks


def assert_only_blocks_moved(trainer):
    assert isinstance(trainer.model, PeftModel)
    before, blocks = frozen_and_trained(trainer.model)
    assert blocks and not any(tensor.any() for tensor in blocks.values())
    trainer.train()
    after, moved = frozen_and_trained(trainer.model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    assert any(tensor.any() for tensor in moved.values())
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == ARGUMENTS["max_steps"]


def assert_reloads(trainer, tokenizer, directory, tmp_path):
    """The adapter that the trainer saves gives the same logits in a fresh process."""
    trainer.save_model(tmp_path / "adapter")
    model = trainer.model.eval()
    inputs = tokenizer("upper: word1\n", return_tensors="pt")["input_ids"]
    torch.save({"inputs": inputs, "logits": model(input_ids=inputs).logits.detach()}, tmp_path / "expected.pt")
    code = """
import sys, torch, smt_peft
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1]), sys.argv[2] + "/adapter").eval()
expected = torch.load(sys.argv[2] + "/expected.pt")
assert torch.equal(model(input_ids=expected["inputs"]).logits, expected["logits"])
print("equal")
"""
    arguments = [sys.executable, "-c", code, str(directory / "model"), str(tmp_path)]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.stdout.strip().endswith("equal"), done.stderr


class TestTrl:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")

    def test_sft_trainer(self, model, tokenizer, directory, tmp_path):
        rows = [{"prompt": prompt, "completion": prompt.upper()} for prompt in PROMPTS]
        trainer = self.trl.SFTTrainer(
            model=model,
            args=self.trl.SFTConfig(output_dir=str(tmp_path), bf16=False, max_length=64, **ARGUMENTS),
            train_dataset=self.datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=SMTConfig(**SETTINGS),
        )
        assert_only_blocks_moved(trainer)
        assert_reloads(trainer, tokenizer, directory, tmp_path)

    def test_dpo_trainer(self, model, tokenizer, directory, tmp_path):
        rows = [{"prompt": prompt, "chosen": prompt.upper(), "rejected": "no"} for prompt in PROMPTS]
        trainer = self.trl.DPOTrainer(
            model=model,
            args=self.trl.DPOConfig(output_dir=str(tmp_path), bf16=False, max_length=64, **ARGUMENTS),
            train_dataset=self.datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=SMTConfig(**SETTINGS),
        )
        assert_only_blocks_moved(trainer)
        # The reference is the base model: at the first step the policy is the base still, and prefers nothing.
        first = next(entry for entry in trainer.state.log_history if "rewards/margins" in entry)
        assert first["rewards/margins"] == pytest.approx(0, abs=1e-6)
        assert_reloads(trainer, tokenizer, directory, tmp_path)

    def test_grpo_trainer(self, model, tokenizer, directory, tmp_path):
        def distinct_characters(completions, **_):
            return [float(len(set(completion))) for completion in completions]

        arguments = {**ARGUMENTS, "num_generations": 2, "max_completion_length": 6}
        trainer = self.trl.GRPOTrainer(
            model=model,
            reward_funcs=distinct_characters,
            args=self.trl.GRPOConfig(output_dir=str(tmp_path), bf16=False, **arguments),
            train_dataset=self.datasets.Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
            processing_class=tokenizer,
            peft_config=SMTConfig(**SETTINGS),
        )
        assert_only_blocks_moved(trainer)
        assert_reloads(trainer, tokenizer, directory, tmp_path)


def examples(tokenizer) -> list[dict]:
    rows = [tokenizer(prompt + prompt.upper())["input_ids"][:24] for prompt in PROMPTS]
    return [{"input_ids": row, "labels": row} for row in rows]


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    length = min(len(row["input_ids"]) for row in rows)
    return {key: torch.tensor([row[key][:length] for row in rows]) for key in ("input_ids", "labels")}


def plain_trainer(model, tokenizer, output, **changed) -> Trainer:
    arguments = TrainingArguments(output_dir=str(output), seed=0, **{**ARGUMENTS, **changed})
    return Trainer(model, arguments, train_dataset=examples(tokenizer), data_collator=collate)


def test_the_plain_trainer(model, tokenizer, directory, tmp_path):
    trainer = plain_trainer(get_peft_model(model, SMTConfig(**SETTINGS)), tokenizer, tmp_path)
    assert_only_blocks_moved(trainer)
    assert_reloads(trainer, tokenizer, directory, tmp_path)


def test_the_plain_trainer_over_an_adapter_of_transformers(model, tokenizer, tmp_path):
    """Transformers' own `add_adapter`, with no `PeftModel` around the model."""
    model.add_adapter(SMTConfig(**SETTINGS))
    before, _ = frozen_and_trained(model)
    plain_trainer(model, tokenizer, tmp_path).train()
    after, blocks = frozen_and_trained(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    assert any(tensor.any() for tensor in blocks.values())


@pytest.mark.parametrize("adapter_name", ["default", "french"])
def test_a_trainer_resumes_as_if_it_had_not_stopped(directory, tokenizer, tmp_path, adapter_name):
    """Losses, blocks and optimizer state of 4 steps + 4 resumed steps are those of 8 steps, under any adapter name:
    transformers#28531."""

    def run(output, resume=False):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(directory / "model")
        model = get_peft_model(model, SMTConfig(**SETTINGS), adapter_name=adapter_name)
        trainer = plain_trainer(model, tokenizer, output, max_steps=8, save_strategy="steps", save_steps=4)
        trainer.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-4") if resume else None)
        losses = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
        return losses, frozen_and_trained(model)[1], trainer.optimizer.state_dict()["state"]

    losses, blocks, state = run(tmp_path / "straight")
    resumed_losses, resumed_blocks, resumed_state = run(tmp_path / "resumed", resume=True)
    assert resumed_losses == losses and len(losses) == 8
    assert all(torch.equal(blocks[name], tensor) for name, tensor in resumed_blocks.items())
    for key, moments in state.items():
        assert all(torch.equal(resumed_state[key][name], value) for name, value in moments.items())


def test_the_best_checkpoint_is_loaded_at_the_end(model, tokenizer, tmp_path):
    model = get_peft_model(model, SMTConfig(**SETTINGS))
    every_step = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    # The highest loss is called the best, so that the last step is not.
    best_is_worst = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    arguments = TrainingArguments(output_dir=str(tmp_path), **{**ARGUMENTS, **every_step, **best_is_worst})
    rows = examples(tokenizer)
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:2], data_collator=collate)
    trainer.train()
    evaluated = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    best = max(evaluated, key=evaluated.get)
    assert best != max(evaluated)
    assert trainer.evaluate()["eval_loss"] == evaluated[best]


@pytest.mark.parametrize("make", [torch.optim.AdamW, SMTAdamW])
def test_a_loop_written_by_hand(model, tokenizer, make):
    model = get_peft_model(model, SMTConfig(**SETTINGS)).train()
    optimizer = make([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(6):
        loss = model(**collate(examples(tokenizer)[:4])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
