"""`smt train` in two processes, with the engines of `configs/accelerate`, ends as in one with the same global batch."""

from __future__ import annotations

import json
import os
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from helpers import save_tiny_model
from launch import HERE, ROOT, torchrun
from safetensors.torch import load_file
from training.runs import Workshop, smt, write_jsonl

CONFIGS = ROOT / "configs" / "accelerate"
needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="no DeepSpeed; see `make engines`")
ENGINES = ["ddp", pytest.param("zero2", marks=needs_deepspeed), pytest.param("zero3", marks=needs_deepspeed)]


def launched(engine: str) -> tuple[object, dict[str, str]]:
    """What `accelerate launch` makes of a file: its arguments, and what it adds to the environment."""
    line = ["--config_file", str(CONFIGS / f"{engine}.yaml"), "-m", "smt_peft.cli", "train", "run.yaml"]
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(line))
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        environment = prepare_deepspeed_cmd_env(args)[1]
    else:
        environment = prepare_multi_gpu_env(args)
    kept = ("ACCELERATE_", "FSDP_")
    return args, {name: value for name, value in environment.items() if name.startswith(kept)}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory) -> Workshop:
    directory = tmp_path_factory.mktemp("workshop")
    save_tiny_model(directory / "model")
    # Without dropout, which two processes cannot draw as one does.
    file = directory / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"attention_dropout": 0.0}))
    rows = [{"prompt": f"upper: word{i % 7}\n", "completion": f"WORD{i % 7}"} for i in range(48)]
    settings = {
        "model_name_or_path": str(directory / "model"),
        "dataset_path": str(write_jsonl(directory / "train.jsonl", rows)),
        "eval_dataset_path": str(write_jsonl(directory / "test.jsonl", rows[:6])),
        "max_steps": 5,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "adam_epsilon": 1e-4,  # see lesson.py
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "smt": {"block_size": 8, "density": 0.1, "warmup_batches": 2},
    }
    return Workshop(directory, settings)


@pytest.fixture(scope="module")
def alone(workshop) -> Path:
    """One process, with batches of twice the rows and the same blocks chosen."""
    chosen = workshop.write("chosen")
    done = smt("select", chosen, "smt.warmup_batches=4")
    assert done.returncode == 0, done.stderr
    selection = str(workshop.directory / "chosen" / "selection.safetensors")
    settings = {**workshop.settings["smt"], "selection": selection}
    done = smt("train", workshop.write("alone", per_device_train_batch_size=4, smt=settings))
    assert done.returncode == 0, done.stderr
    return workshop.directory / "alone"


def run(workshop: Workshop, engine: str) -> tuple[Path, str]:
    # Accelerate takes DeepSpeed for plain DDP when it is told itself that there is but a CPU.
    cpu = {"ACCELERATE_USE_CPU": "1"} if engine == "ddp" else {"DS_ACCELERATOR": "cpu"}
    path = workshop.write(engine, use_cpu=None if engine == "ddp" else True)
    done = torchrun(HERE / "smt_worker.py", "train", path, **launched(engine)[1], **cpu)
    assert done.returncode == 0, done.stderr[-6000:]
    return workshop.directory / engine, done.stdout


@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_end_as_one(workshop, alone, engine):
    directory, printed = run(workshop, engine)
    ours, one = (json.loads((path / "metrics.json").read_text()) for path in (directory, alone))
    assert (ours["engine"], ours["processes"]) == ("MULTI_CPU" if engine == "ddp" else "DEEPSPEED", 2)
    # Printed once, by the first process, which alone has verified.
    assert printed.count("verified: read back in a fresh process") == 1
    assert len(re.findall(r"^saved in ", printed, re.M)) == 1
    assert set(ours["verified"]["passed"].values()) == {True}
    # One sum of gradients in another order: a few roundings of fp32 in each step.
    for name in ("loss", "grad_norm"):
        found = [entry[name] for entry in ours["log_history"] if name in entry]
        expected = [entry[name] for entry in one["log_history"] if name in entry]
        assert len(found) == 5
        torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=2e-6, atol=0)
    saved, expected = (load_file(path / "adapter_model.safetensors") for path in (directory, alone))
    assert saved.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(saved[key], tensor, rtol=0, atol=1e-6 if tensor.is_floating_point() else 0)
    # Counted over the whole of every module, also where a process holds a part of it.
    assert ours["effective_update"]["entries"] == one["effective_update"]["entries"] == one["trainable_parameters"]
    assert ours["effective_update"]["share"] == pytest.approx(one["effective_update"]["share"], abs=0.01)
    assert (directory / "report.html").is_file()
    assert not list(directory.glob("*.part*"))


def test_two_processes_without_a_backward_pass_end_as_one(workshop):
    """They displace the weights alike, and take the mean of what each measures on its rows."""
    blocks = {**workshop.settings["smt"], "score": "random"}
    settings = {"optim": "mezo", "mezo_eps": 0.05, "learning_rate": 1e-3, "gradient_checkpointing": None, "smt": blocks}
    done = smt("train", workshop.write("mezo_alone", **settings, per_device_train_batch_size=4))
    assert done.returncode == 0, done.stderr
    done = torchrun(HERE / "smt_worker.py", "train", workshop.write("mezo", **settings), ACCELERATE_USE_CPU="1")
    assert done.returncode == 0, done.stderr[-6000:]
    both, one = (
        json.loads((workshop.directory / name / "metrics.json").read_text())["log_history"]
        for name in ("mezo", "mezo_alone")
    )
    # Losses around 6 in fp32, a few roundings apart; for the norm, over 2 eps.
    rounding = 4 * 2**-21
    for name, slack in (("loss", rounding), ("grad_norm", rounding / 0.1)):
        found, expected = ([entry[name] for entry in log if name in entry] for log in (both, one))
        assert len(found) == 5 and found == pytest.approx(expected, abs=slack)
    saved, expected = (
        load_file(workshop.directory / name / "adapter_model.safetensors") for name in ("mezo", "mezo_alone")
    )
    for key, tensor in expected.items():
        torch.testing.assert_close(saved[key], tensor, rtol=0, atol=5 * 1e-3 * 5 * rounding / 0.1)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", *ENGINES[1:]])
def test_a_shipped_config_is_what_accelerate_understands(engine):
    args, environment = launched(engine)
    assert args.num_processes == 2 and not args.cpu
    assert (args.multi_gpu, args.use_fsdp, args.use_deepspeed) == (
        engine == "ddp",
        engine == "fsdp2",
        engine.startswith("zero"),
    )
    if engine == "fsdp2":
        assert environment["FSDP_VERSION"] == "2" and environment["FSDP_STATE_DICT_TYPE"] == "FULL_STATE_DICT"
    if engine.startswith("zero"):
        assert environment["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == engine[-1]
    assert f"--config_file configs/accelerate/{engine}.yaml" in (CONFIGS / f"{engine}.yaml").read_text()


def test_every_shipped_config_is_tested():
    assert sorted(path.stem for path in CONFIGS.glob("*.yaml")) == ["ddp", "fsdp2", "zero2", "zero3"]


def test_what_fails_in_the_first_process_ends_all(workshop):
    path = workshop.write("failing", eval_dataset_path=None)
    directory = workshop.directory / "failing"
    directory.mkdir()
    (directory / "model.safetensors").write_text("of another run")
    done = torchrun(HERE / "smt_worker.py", "train", path, ACCELERATE_USE_CPU="1")
    assert done.returncode != 0
    assert "belongs to something else" in done.stderr
    assert os.listdir(directory) == ["model.safetensors"]
