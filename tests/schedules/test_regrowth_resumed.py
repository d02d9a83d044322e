"""Regrown blocks that are saved, loaded, and gone on with."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from helpers import batch as llama_batch
from helpers import tiny_llama
from peft import get_peft_model
from regrown import NUMBERS, run, small, trainable
from scheduled import adapted, train
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from smt_peft import SMTConfig
from smt_peft.optim import SMTAdamW
from smt_peft.schedules import Regrowth, ScheduleCallback
from smt_peft.schedules.trained import trained_blocks

RELOADED = """
import sys
import torch
import smt_peft
from peft import PeftModel
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
base = AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/base")
model = PeftModel.from_pretrained(base, sys.argv[1] + "/adapter").eval()
expected = torch.load(sys.argv[1] + "/logits.pt")
inputs = torch.load(sys.argv[1] + "/inputs.pt")
assert torch.equal(model(**inputs).logits, expected)
merged = model.merge_and_unload()
torch.testing.assert_close(merged(**inputs).logits, expected)
print("same")
"""


@pytest.mark.parametrize("dropped", ["revert", "keep"])
def test_what_came_out_is_an_adapter_that_a_fresh_process_reads(dropped, tmp_path):
    torch.manual_seed(0)
    tiny_llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, SMTConfig(block_size=8, density=0.1, score="random")).train()
    before = {name: len(module.index) for name, module in trained_blocks(model).items()}
    train(model, Regrowth(every=3, share=0.9, score_steps=2, dropped=dropped), 12, SMTAdamW(trainable(model), lr=1e-2))
    after = {name: len(module.index) for name, module in trained_blocks(model).items()}
    assert after == before if dropped == "revert" else sum(after.values()) > sum(before.values())
    model.eval().save_pretrained(tmp_path / "adapter")
    inputs = llama_batch(seed=99)
    torch.save(inputs, tmp_path / "inputs.pt")
    torch.save(model(**inputs).logits.detach(), tmp_path / "logits.pt")
    done = subprocess.run([sys.executable, "-c", RELOADED, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "same", done.stderr


@pytest.mark.parametrize("dropped", ["revert", "keep"])
def test_a_loop_goes_on_from_what_was_saved_in_the_middle(dropped, tmp_path):
    """Between two reselections, scores half gathered, blocks retired."""
    settings = {"every": 6, "share": 0.9, "score_steps": 4, "dropped": dropped}
    _, straight = small()
    run(straight, Regrowth(**settings), SMTAdamW(trainable(straight), **NUMBERS))
    _, first = small()
    optimizer, schedule = SMTAdamW(trainable(first), **NUMBERS), Regrowth(**settings)
    run(first, schedule, optimizer, steps=10)
    saved = {"model": first.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
    torch.save(saved, tmp_path / "saved.pt")
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    _, again = small()
    again.load_state_dict(saved["model"])
    optimizer = SMTAdamW(trainable(again), **NUMBERS)
    optimizer.load_state_dict(saved["optimizer"])
    schedule = Regrowth(**settings)
    run(again, schedule, optimizer, first=11, state=saved["schedule"])
    blocks = trained_blocks(straight)
    assert any(module.retired is not None for module in blocks.values()) == (dropped == "keep")
    for name, module in trained_blocks(again).items():
        assert torch.equal(module.index, blocks[name].index) and torch.equal(module.weight, blocks[name].weight)
        if dropped == "keep":
            assert torch.equal(module.retired.weight, blocks[name].retired.weight)


def test_going_on_from_before_blocks_were_retired_forgets_them():
    """In the process whose training went further, as a trainer resumes after an error."""
    settings = {"every": 6, "share": 0.9, "score_steps": 4, "dropped": "keep"}
    _, straight = small()
    run(straight, Regrowth(**settings), SMTAdamW(trainable(straight), **NUMBERS))
    _, model = small()
    optimizer, schedule = SMTAdamW(trainable(model), **NUMBERS), Regrowth(**settings)
    saved = {}

    def look(step):
        if step == 4:
            parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
            saved.update({name: copy.deepcopy(part.state_dict()) for name, part in parts.items()})

    run(model, schedule, optimizer, steps=15, each=look)
    assert any(module.retired is not None for module in trained_blocks(model).values())
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    run(model, schedule, optimizer, first=5, state=saved["schedule"])
    ours, truth = trained_blocks(model), trained_blocks(straight)
    for name, module in truth.items():
        assert torch.equal(ours[name].index, module.index) and torch.equal(ours[name].weight, module.weight)
        assert torch.equal(ours[name].retired.index, module.retired.index)
        assert torch.equal(ours[name].retired.weight, module.retired.weight)


@pytest.mark.parametrize("dropped", ["revert", "keep"])
def test_a_plain_trainer_resumes_as_if_it_had_not_stopped(dropped, tmp_path):
    def trained(resume=None):
        torch.manual_seed(0)
        model = adapted(layers=1)
        rows = [{"input_ids": torch.arange(6) + i, "labels": torch.arange(6) + i} for i in range(16)]
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=10,
            save_steps=5,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            use_cpu=True,
            disable_tqdm=True,
            report_to=[],
        )
        schedule = Regrowth(every=3, share=0.9, score_steps=2, dropped=dropped)
        trainer = Trainer(
            model,
            arguments,
            train_dataset=rows,
            callbacks=[ScheduleCallback(schedule)],
            optimizer_cls_and_kwargs=(SMTAdamW, {"lr": 1e-2}),
        )
        trainer.train(resume_from_checkpoint=resume)
        assert schedule.replaced > 0
        return {name: (module.index, module.weight.detach()) for name, module in trained_blocks(model).items()}

    straight = trained()
    resumed = trained(resume=str(tmp_path / "checkpoint-5"))
    for name, (index, weight) in straight.items():
        assert torch.equal(resumed[name][0], index) and torch.equal(resumed[name][1], weight)
