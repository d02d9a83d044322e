"""Two processes that a cluster stops save one whole checkpoint together, and go on from it by the same command."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from importlib.util import find_spec

import pytest
from launch import HERE, environment, torchrun
from test_smt_train import launched, workshop  # noqa: F401  a fixture
from training.killing import numbers

from smt_peft.training.stopping import checkpoints

needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="no DeepSpeed; see `make engines`")


@pytest.mark.parametrize("engine", ["ddp", pytest.param("zero2", marks=needs_deepspeed)])
def test_sigterm_saves_a_checkpoint_and_the_same_command_goes_on(workshop, engine):  # noqa: F811
    cpu = {"ACCELERATE_USE_CPU": "1"} if engine == "ddp" else {"DS_ACCELERATOR": "cpu"}
    more = {**launched(engine)[1], **cpu}
    settings = {"use_cpu": None if engine == "ddp" else True, "verify": False, "max_steps": 40, "logging_steps": 3}
    settings |= {"save_strategy": "steps", "save_steps": 4, "save_total_limit": 2}
    paths = [workshop.write(f"{engine}_{name}", **settings) for name in ("unbroken", "stopped")]
    done = torchrun(HERE / "smt_worker.py", "train", paths[0], **more)
    assert done.returncode == 0, done.stderr[-6000:]

    directory = workshop.directory / f"{engine}_stopped"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [HERE / "smt_worker.py", "train", paths[1]]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(**more)
    ) as p:
        while checkpoints.last_checkpoint(directory) is None and p.poll() is None:
            time.sleep(0.01)
        p.send_signal(signal.SIGTERM)
        _, told = p.communicate()
    assert p.returncode != 0 and "smt train: stopped by SIGTERM" in told, told[-6000:]
    assert told.count("the same command goes on from checkpoint-") == 1
    last = checkpoints.last_checkpoint(directory)
    assert last.name in told and 4 <= int(last.name.removeprefix("checkpoint-")) < 40
    assert all(map(checkpoints.is_whole, directory.glob("checkpoint-*"))) and not list(directory.glob("*.part"))
    assert len(list(last.glob("rng_state_*.pth"))) == 2

    done = torchrun(HERE / "smt_worker.py", "train", paths[1], **more)
    assert done.returncode == 0, done.stderr[-6000:]
    assert f"going on from {last}" in done.stdout
    ended = [
        json.loads((path / "metrics.json").read_text())
        for path in (directory, workshop.directory / f"{engine}_unbroken")
    ]
    assert numbers(ended[0]) == numbers(ended[1])
