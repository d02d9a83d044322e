"""`optim: mezo`: runs without a backward pass, of every task."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from runs import Workshop, assert_resumed_alike, losses, write_jsonl
from safetensors.torch import load_file
from transformers import TrainerCallback

from smt_peft.optim import MeZO
from smt_peft.training.errors import ConfigError
from smt_peft.training.forward_only import ForwardOnly
from smt_peft.training.run import train
from smt_peft.training.yaml.schema import load_run
from smt_peft.training.yaml.settings import render_settings


@pytest.fixture(scope="module")
def workshop(workshop, tmp_path_factory) -> Workshop:
    """The same model and data in a place of its own, as a run refuses a directory that holds another's."""
    return replace(workshop, directory=tmp_path_factory.mktemp("forward_only"))


SMT = {"block_size": 8, "density": 0.1, "score": "random"}
MEZO = {"optim": "mezo", "learning_rate": 1e-3, "gradient_checkpointing": None, "smt": SMT}
PAIRS = [{"prompt": f"upper: word{i % 7}\n", "chosen": f"WORD{i % 7}", "rejected": f"word{i % 7}"} for i in range(40)]
TEXTS = [{"text": f"word{i % 7}", "label": ["even", "odd"][i % 2]} for i in range(40)]


class Watch(TrainerCallback):
    """Keeps the optimizer and what it measured, and looks for what a backward pass leaves."""

    def __init__(self):
        self.rates, self.norms, self.gradients = [], [], 0

    def on_train_begin(self, args, state, control, optimizer=None, model=None, **others):
        self.optimizer, self.model, self.checkpointing = optimizer.optimizer, model, args.gradient_checkpointing

    def on_pre_optimizer_step(self, args, state, control, **others):
        self.gradients += sum(parameter.grad is not None for parameter in self.model.parameters())
        self.norms.append(self.optimizer.projected.square().mean().sqrt().item())

    def on_step_end(self, args, state, control, **others):
        self.rates.append(self.optimizer.param_groups[0]["lr"])


def of_task(workshop: Workshop, task: str) -> Workshop:
    rows = {"dpo": PAIRS, "classification": TEXTS}.get(task)
    if rows is None:
        return workshop
    directory = workshop.directory / task
    directory.mkdir(exist_ok=True)
    files = {
        name: str(write_jsonl(directory / f"{name}.jsonl", rows[:8] if name == "test" else rows))
        for name in ("train", "test")
    }
    settings = {**workshop.settings, "task": task, "dataset_path": files["train"], "eval_dataset_path": files["test"]}
    return Workshop(directory, settings)


@pytest.fixture(scope="module")
def still(workshop, tmp_path_factory) -> Workshop:
    """Without dropout."""
    directory = tmp_path_factory.mktemp("still")
    shutil.copytree(workshop.settings["model_name_or_path"], directory / "model")
    file = directory / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"attention_dropout": 0.0}))
    return Workshop(directory, {**workshop.settings, "model_name_or_path": str(directory / "model")})


def test_a_run_takes_no_gradient_and_logs_what_it_measured(workshop):
    watch, saved = Watch(), []
    run = load_run(workshop.write("mezo", **MEZO, mezo_eps=1e-2, mezo_samples=2, weight_decay=0.1, compare_lora=True))
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(1) or tensor, lambda tensor: tensor):
        metrics = train(run, [watch])
    assert not saved and watch.gradients == 0 and not watch.checkpointing
    assert type(watch.optimizer) is MeZO and (watch.optimizer.eps, watch.optimizer.samples) == (1e-2, 2)
    assert watch.optimizer.param_groups[0]["weight_decay"] == 0.1
    assert [norm for _, norm in losses(metrics).values()] == pytest.approx(watch.norms)
    assert all(norm > 0 for norm in watch.norms)
    assert len(set(watch.rates)) == 8 and watch.rates[-1] < watch.rates[0] / 4
    # LoRA is trained the same way.
    assert len(losses(metrics["lora"])) == 8
    assert metrics["lora"]["eval_loss"] != metrics["before"]["eval_loss"] != metrics["after"]["eval_loss"]


def test_a_run_learns_and_what_it_saves_is_verified(workshop):
    """Through a fresh process, which reads the adapter, merges it, and looks for weights in the padding."""
    smt = {**SMT, "block_size": 5, "density": 0.3}
    settings = {**MEZO, "smt": smt, "learning_rate": 1e-2, "mezo_eps": 1e-2, "mezo_samples": 2, "max_steps": 60}
    metrics = train(load_run(workshop.write("learns", **settings, logging_steps=20, verify=True)))
    assert metrics["after"]["eval_loss"] < metrics["before"]["eval_loss"] - 0.1
    assert set(metrics["verified"]["passed"].values()) == {True}


@pytest.mark.parametrize("task", ["sft", "dpo", "classification"])
def test_a_run_resumes_as_if_it_had_not_stopped(workshop, task):
    assert_resumed_alike(of_task(workshop, task), **MEZO)


def test_layers_may_take_turns(workshop):
    """Of two layers one rests for all 8 steps."""
    turns = {"layers": 1, "every": 8}
    train(load_run(workshop.write("turns", **MEZO, layer_sampling=turns)))
    weights = load_file(workshop.directory / "turns" / "adapter_model.safetensors")
    moved = {key.split("layers.")[1][0] for key, tensor in weights.items() if key.endswith("weight") and tensor.any()}
    assert len(moved) == 1


def test_accumulated_batches_are_one_batch(still):
    """Every batch of a step sees the same directions, and each token weighs as much."""
    settings = {**MEZO, "mezo_eps": 0.05}
    together, apart = (
        still.write(name, **settings, per_device_train_batch_size=size, gradient_accumulation_steps=4 // size)
        for name, size in (("together", 4), ("apart", 2))
    )
    found = [train(load_run(path)) for path in (together, apart)]
    # Losses around 6 in fp32, a few roundings apart, over 2 eps.
    slack = 4 * 2**-21 / 0.1
    for (loss, norm), (other, its) in zip(*(losses(metrics).values() for metrics in found), strict=True):
        assert (loss, norm) == (pytest.approx(other, rel=1e-5), pytest.approx(its, abs=slack))
    weights, others = (
        load_file(still.directory / name / "adapter_model.safetensors") for name in ("together", "apart")
    )
    for key, tensor in weights.items():
        torch.testing.assert_close(others[key], tensor, rtol=0, atol=8 * 1e-3 * 5 * slack)
    seen = [[entry["num_tokens"] for entry in metrics["log_history"] if "num_tokens" in entry] for metrics in found]
    assert seen[0] == seen[1]


def test_a_token_is_counted_once(workshop):
    found = []
    for name, settings in (("counted", {**MEZO, "mezo_samples": 3}), ("adam", {"smt": SMT})):
        metrics = train(load_run(workshop.write(name, **settings, max_steps=3)))
        found.append([entry["num_tokens"] for entry in metrics["log_history"] if "num_tokens" in entry])
    assert found[0] == found[1] and len(found[0]) >= 3


def test_checkpointing_is_for_choosing_blocks_alone(workshop):
    watch = Watch()
    settings = {**MEZO, "smt": {**SMT, "score": "grad_abs", "warmup_batches": 1}, "gradient_checkpointing": True}
    run = load_run(workshop.write("chosen", **settings, max_steps=1))
    assert run.trainer.gradient_checkpointing
    train(run, [watch])
    assert not watch.checkpointing


def test_defaults_about_gradients_are_off(workshop):
    run = load_run(workshop.write("defaults", **MEZO))
    assert not run.trainer.gradient_checkpointing and run.trainer.max_grad_norm == 0 and run.forward_only
    plain = load_run(workshop.write("defaults", gradient_checkpointing=None))
    assert plain.trainer.gradient_checkpointing and plain.trainer.max_grad_norm == 1 and not plain.forward_only


def test_the_settings_that_are_shown_are_a_run(workshop, tmp_path):
    run = load_run(workshop.write("shown", **MEZO))
    (tmp_path / "again.yaml").write_text(render_settings(run))
    again = load_run(tmp_path / "again.yaml")
    assert again.forward_only and again.config == run.config and again.trainer.max_grad_norm == 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"max_grad_norm": 1.0}, "max_grad_norm does not go with optim: mezo: it has no gradient to clip"),
        ({"fp16": True}, "fp16 does not go with optim: mezo: fp16 scales the loss for a backward pass"),
        ({"gradient_checkpointing": True}, "gradient_checkpointing has no effect with optim: mezo"),
        ({"activation_offloading": True}, "activation_offloading does not go with optim: mezo"),
        ({"mezo_eps": 0.0}, "mezo_eps must be a finite number above 0, got 0.0"),
        ({"mezo_samples": 0}, "mezo_samples must be at least 1, got 0"),
        ({"optim_args": "a=1"}, "optim_args: mezo takes none"),
        ({"optim": "smt_adamw", "mezo_eps": 0.1}, "mezo_eps has no effect without optim: mezo; set that, or leave"),
        ({"optim": None, "mezo_samples": 2}, "mezo_samples has no effect without optim: mezo"),
        ({"optim": "mezzo"}, "there is no optimizer 'mezzo'; did you mean 'mezo'?"),
    ],
)
def test_contradictions_are_refused_with_their_line(workshop, changed, message):
    path = workshop.write("contradiction", **{**MEZO, **changed})
    with pytest.raises(ConfigError) as caught:
        load_run(path)
    (line,) = str(caught.value).splitlines()
    number = 1 + [text.partition(":")[0] for text in path.read_text().splitlines()].index(list(changed)[-1])
    assert message in line and f"line {number}:" in line


@pytest.mark.parametrize("engine", ["DeepSpeed", "FSDP"])
def test_an_engine_that_holds_the_weights_is_refused(engine):
    class Trainer:
        is_deepspeed_enabled, is_fsdp_enabled = engine == "DeepSpeed", engine == "FSDP"

    with pytest.raises(ConfigError, match=f"optim: mezo trains weights that each process has whole, and {engine}"):
        type("Forward", (ForwardOnly, Trainer), {})()
