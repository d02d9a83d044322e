"""`optim: smt_adamw` in a YAML: the run of `adamw_torch`, its resuming, and wrong names."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from smt_peft.optim import SMTAdamW
from smt_peft.training import outputs
from smt_peft.training.errors import ConfigError
from smt_peft.training.run import train
from smt_peft.training.yaml.keys import SMT_OPTIMIZERS
from smt_peft.training.yaml.schema import load_run

# Numbers other than the defaults, and a norm that is clipped at every step.
NUMBERS = {"weight_decay": 0.2, "adam_beta1": 0.85, "adam_beta2": 0.95, "adam_epsilon": 1e-5, "max_grad_norm": 0.3}


class Watch(TrainerCallback):
    """Keeps the optimizer, and the learning rate after each step."""

    def __init__(self):
        self.rates = []

    def on_train_begin(self, args, state, control, optimizer=None, **others):
        self.optimizer = getattr(optimizer, "optimizer", optimizer)

    def on_step_end(self, args, state, control, **others):
        self.rates.append(self.optimizer.param_groups[0]["lr"])


def history(metrics: dict) -> dict[int, torch.Tensor]:
    return {
        entry["step"]: torch.tensor([entry["loss"], entry["grad_norm"], entry["learning_rate"]])
        for entry in metrics["log_history"]
        if "loss" in entry
    }


def test_smt_adamw_is_the_run_of_adamw_torch(workshop):
    runs, optimizers = {}, {}
    for optim in ("adamw_torch", "smt_adamw"):
        path = workshop.write(
            f"optim_{optim}",
            optim=optim,
            **NUMBERS,
            smt={"block_size": 8, "density": 0.1, "warmup_batches": 2, "modules_to_save": ["lm_head"]},
        )
        watch = Watch()
        runs[optim] = history(train(load_run(path), [watch]))
        optimizers[optim] = watch
    assert runs["smt_adamw"].keys() == runs["adamw_torch"].keys() == set(range(1, 9))
    for step, expected in runs["adamw_torch"].items():
        torch.testing.assert_close(runs["smt_adamw"][step], expected, rtol=0, atol=1e-5)
        assert expected[1] > NUMBERS["max_grad_norm"]
    ours, theirs = optimizers["smt_adamw"], optimizers["adamw_torch"]
    assert type(ours.optimizer) is SMTAdamW and type(theirs.optimizer) is torch.optim.AdamW
    assert ours.rates == theirs.rates and len(set(ours.rates)) == 8
    for group, expected in zip(ours.optimizer.param_groups, theirs.optimizer.param_groups, strict=True):
        assert len(group["params"]) == len(expected["params"])
        assert {name: group[name] for name in ("betas", "eps", "weight_decay")} == {
            name: expected[name] for name in ("betas", "eps", "weight_decay")
        }


@pytest.mark.parametrize("optim", SMT_OPTIMIZERS)
def test_a_run_resumes_as_if_it_had_not_stopped(workshop, optim):
    path = workshop.write(f"resumed_{optim}", optim=optim, max_steps=6, save_strategy="steps", save_steps=3)
    directory = workshop.directory / f"resumed_{optim}"
    watch = Watch()
    straight = train(load_run(path), [watch])
    assert watch.optimizer.state_dtype == SMT_OPTIMIZERS[optim]
    weights = load_file(directory / "adapter_model.safetensors")
    shutil.rmtree(directory / "checkpoint-6")
    for name in (outputs.METRICS, outputs.REPORT, outputs.PICTURE, "adapter_model.safetensors", "adapter_config.json"):
        (directory / name).unlink()
    resumed = train(load_run(path, ["resume_from_checkpoint=true"]))
    assert all(torch.equal(history(resumed)[step], values) for step, values in history(straight).items())
    again = load_file(directory / "adapter_model.safetensors")
    assert all(torch.equal(again[key], weights[key]) for key in weights)


def test_the_name_reaches_the_resolved_run(workshop):
    run = load_run(workshop.write("named", optim="smt_adamw_8bit"))
    assert run.state_dtype == "8bit" and run.resolved["optim"] == "smt_adamw_8bit"
    run = load_run(workshop.write("named", optim="adamw_torch"))
    assert run.state_dtype is None and run.trainer.optim == "adamw_torch"
    assert load_run(workshop.write("named")).state_dtype is None


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"optim": "smt_adam"}, "optim: there is no optimizer 'smt_adam'; did you mean 'smt_adamw'?"),
        ({"optim": "smt_adamw_8bits"}, "no optimizer 'smt_adamw_8bits'; did you mean 'smt_adamw_8bit'?"),
        ({"optim": "adamw_torc"}, "no optimizer 'adamw_torc'; did you mean 'adamw_torch'?"),
        ({"optim": "zzz"}, "no optimizer 'zzz'; say smt_adamw, smt_adamw_bf16, smt_adamw_8bit, mezo or one of"),
        ({"optim": "smt_adamw", "optim_args": "rank=2"}, "optim_args: smt_adamw takes none, got 'rank=2'"),
    ],
)
def test_wrong_names_are_one_error_with_a_hint(workshop, changed, message):
    with pytest.raises(ConfigError) as caught:
        load_run(workshop.write("wrong_optim", **changed))
    (line,) = str(caught.value).splitlines()
    assert message in line and "line" in line
