"""Runs that are killed, stopped, or run out of disk: what is left is whole, and the same command goes on from it."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from killing import Killer, forked, history, numbers, read_everything
from safetensors.torch import load_file
from transformers import TrainerCallback

from smt_peft import cli
from smt_peft.training import outputs
from smt_peft.training.errors import ConfigError, DivergedError, Interrupted, StoppedError
from smt_peft.training.run import select, train
from smt_peft.training.stopping import checkpoints, lock, signals
from smt_peft.training.yaml.schema import load_run

SETTINGS = {
    # Epochs of 6 steps, of which the second is left half way; neither logs nor checkpoints fall on their ends, nor both
    # on the same steps; moments that are rounded stochastically.
    "max_steps": 10,
    "per_device_train_batch_size": 8,
    "logging_steps": 3,
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": 1,
    "optim": "smt_adamw_bf16",
}


class At(TrainerCallback):
    """Does something once, when a step begins."""

    def __init__(self, step: int, do):
        self.step, self.do = step, do

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            self.do(kwargs["model"])


@pytest.fixture(scope="module")
def straight(workshop) -> tuple[dict, Path]:
    """The numbers of a run that nothing has stopped, and where it lies."""
    train(load_run(workshop.write("straight", **SETTINGS, compare_lora=True)))
    directory = workshop.directory / "straight"
    return numbers(json.loads((directory / outputs.METRICS).read_text())), directory


def same_end(directory: Path, straight: tuple[dict, Path]) -> None:
    expected, unbroken = straight
    assert numbers(json.loads((directory / outputs.METRICS).read_text())) == expected
    again, weights = (load_file(path / "adapter_model.safetensors") for path in (directory, unbroken))
    assert again.keys() == weights.keys() and all(torch.equal(again[key], weights[key]) for key in weights)
    assert read_everything(directory) == read_everything(unbroken)
    assert {path.name for path in directory.iterdir()} == {path.name for path in unbroken.iterdir()}


@pytest.mark.parametrize(
    ("only", "at"),
    [
        ("selection.safetensors", 1),
        ("saving.part/checkpoint-4/adapter_model.safetensors", 1),
        ("saving.part/checkpoint-4/optimizer.pt", 1),
        ("saving.part/checkpoint-4 to ", 1),
        ("deleting.part/checkpoint-2", 5),
        ("adapter.part/tokenizer.json", 1),
        ("lora/saving.part/checkpoint-6/optimizer.pt", 1),
        ("metrics.json.part", 1),
    ],
)
def test_a_run_killed_while_it_writes_goes_on_by_the_same_command(workshop, straight, tmp_path, only, at):
    path = workshop.write("killed", **SETTINGS, compare_lora=True, output_dir=str(tmp_path / "out"))
    run = load_run(path)

    def killed():
        Killer(tmp_path / "out", at, only).watch()
        train(run)

    assert forked(killed, tmp_path / "log") == signal.SIGKILL
    assert only in (tmp_path / "log").read_text().splitlines()[-1]
    assert all(checkpoints.is_whole(found) for found in (tmp_path / "out").glob("checkpoint-*"))
    train(load_run(path))
    same_end(tmp_path / "out", straight)


def test_a_run_killed_again_and_again_ends_as_one_that_was_not(workshop, straight, tmp_path):
    """Each time it gets as far as a few more changes to its directory than the time before."""
    path = workshop.write("again", **SETTINGS, compare_lora=True, output_dir=str(tmp_path / "out"))
    run = load_run(path)
    kills, places, ended = 0, set(), signal.SIGKILL
    while ended == signal.SIGKILL:
        allowance = 5 + 13 * kills

        def killed(allowance=allowance):
            Killer(tmp_path / "out", at=allowance).watch()
            train(run)

        ended = forked(killed, tmp_path / "log")
        kills += ended == signal.SIGKILL
        places.add((tmp_path / "log").read_text().splitlines()[-1])
        assert all(checkpoints.is_whole(found) for found in (tmp_path / "out").glob("checkpoint-*"))
    assert kills >= 4 and len(places) > kills
    same_end(tmp_path / "out", straight)


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_what_the_end_of_an_epoch_logs_and_measures_is_in_its_checkpoint(workshop, tmp_path, strategy):
    """Elsewhere a checkpoint of an epoch's last step lacks both, and a resumed run never has them."""
    changed = {"save_steps": 6, "logging_strategy": strategy, "eval_strategy": "epoch", "save_total_limit": None}
    path = workshop.write("epochs", **{**SETTINGS, **changed}, output_dir=str(tmp_path / "out"))
    whole = history(train(load_run(path)))
    (tmp_path / "out" / "checkpoint-10").rename(tmp_path / "elsewhere")
    for name in (outputs.METRICS, "adapter_model.safetensors"):
        (tmp_path / "out" / name).unlink()
    again = history(train(load_run(path)))
    assert again == whole
    assert [entry["step"] for entry in whole if "eval_loss" in entry] == [6, 10]


def test_a_signal_stops_at_the_step_boundary_and_the_run_goes_on_from_there(workshop, straight, tmp_path, capfd):
    path = workshop.write("signalled", **SETTINGS, compare_lora=True, output_dir=str(tmp_path / "out"))
    for step, number, words in ((3, signal.SIGTERM, "SIGTERM"), (7, signal.SIGINT, "Ctrl-C")):
        with pytest.raises(Interrupted) as caught:
            train(load_run(path), [At(step, lambda model, number=number: os.kill(os.getpid(), number))])
        lines = str(caught.value).splitlines()
        assert lines == [
            f"stopped by {words}",
            f"saved in {tmp_path / 'out'}: selection.safetensors, checkpoint-{step}",
            f"the same command goes on from checkpoint-{step}: smt train {path}",
        ]
        assert caught.value.signal_number == number
        assert f"{words}: the run stops at the next step boundary; once more, at once" in capfd.readouterr().err
    train(load_run(path))
    same_end(tmp_path / "out", straight)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_second_signal_stops_at_once(workshop, tmp_path):
    path = workshop.write("twice", **SETTINGS, output_dir=str(tmp_path / "out"))

    def twice(model):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)

    with pytest.raises(Interrupted, match="second Ctrl-C, at once\n.*checkpoint-4\nthe same command goes on from chec"):
        train(load_run(path), [At(6, twice)])
    assert not (tmp_path / "out" / "checkpoint-6").exists()


def test_a_signal_before_the_training_ends_the_command_with_its_status(workshop, tmp_path, monkeypatch, capsys):
    path = workshop.write("early", **SETTINGS, output_dir=str(tmp_path / "out"))
    monkeypatch.setattr("smt_peft.training.run.measure", lambda *args: os.kill(os.getpid(), signal.SIGTERM))
    assert cli.main(["train", str(path), "seed=3"]) == 128 + signal.SIGTERM
    error = capsys.readouterr().err
    assert error.startswith("smt train: stopped by SIGTERM\n") and "saved in" in error
    assert error.endswith(f"the same command goes on from the start: smt train {path} seed=3\n")


def test_blocks_once_chosen_are_not_chosen_again(workshop, tmp_path, monkeypatch):
    path = workshop.write("chosen_once", **SETTINGS, output_dir=str(tmp_path / "out"))

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("smt_peft.training.run.measure", killed)
        with pytest.raises(KeyboardInterrupt):
            train(load_run(path))
    monkeypatch.setattr("smt_peft.training.run.select_blocks", killed)
    train(load_run(path))


def test_a_run_without_checkpoints_is_not_trained_again_for_its_verification(workshop, tmp_path, monkeypatch):
    path = workshop.write("no_checkpoints", max_steps=3, verify=True, output_dir=str(tmp_path / "out"))

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("smt_peft.training.run.verify_saved", killed)
        with pytest.raises(Interrupted, match="goes on with what comes after the training"):
            train(load_run(path))
    unfinished = json.loads((tmp_path / "out" / outputs.UNFINISHED).read_text())
    monkeypatch.setattr("smt_peft.training.stopping.trainer.SafeTraining.train", killed)
    metrics = train(load_run(path))
    assert metrics["verified"] and numbers(metrics) == numbers(unfinished)


@pytest.mark.parametrize(("free", "full"), [(0, True), (2**40, False)])
def test_a_writer_that_only_says_that_it_failed_is_asked_for_room(tmp_path, monkeypatch, free, full):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    failure = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 814336 vs 814228")
    assert checkpoints.is_full(failure, tmp_path) == full


class FullDisk:
    """`torch.save`, until the disk is full; in the words of Python, and of PyTorch's own writer."""

    def __init__(self, after: int, error: Exception):
        self.save, self.left, self.error = torch.save, after, error

    def __call__(self, thing, path, *args, **kwargs):
        self.left -= 1
        if self.left < 0:
            Path(path).write_bytes(b"half")
            raise self.error
        self.save(thing, path, *args, **kwargs)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        RuntimeError("[enforce fail at inline_container.cc:672] . No space left on device"),
    ],
)
def test_a_full_disk_ends_with_one_message(workshop, straight, tmp_path, monkeypatch, capsys, error):
    path = workshop.write("full", **SETTINGS, compare_lora=True, output_dir=str(tmp_path / "out"))
    with monkeypatch.context() as patched:
        # Four for each checkpoint: the settings, optimizer, schedule, random numbers.
        patched.setattr(torch, "save", FullDisk(9, error))
        assert cli.main(["train", str(path)]) == 1
    told = capsys.readouterr().err
    assert "checkpoint-6 could not be written" in told and "No space left on device" in told
    assert (
        "the disk is full: " in told
        and f"MiB left in {tmp_path / 'out'}; a checkpoint takes" in told
        and "a new one is written before an old one goes" in told
    )
    assert "selection.safetensors, checkpoint-4\n" in told
    assert told.endswith(f"the same command goes on from checkpoint-4: smt train {path}\n")
    assert "Traceback" not in told and not list((tmp_path / "out").glob("*.part"))
    train(load_run(path))
    same_end(tmp_path / "out", straight)


def test_a_full_disk_at_the_end_keeps_the_last_checkpoint(workshop, tmp_path, monkeypatch):
    path = workshop.write("full_end", **SETTINGS, output_dir=str(tmp_path / "out"))

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(outputs, "save_adapter", full)
        with pytest.raises(StoppedError, match=r"No space left.*(?s:.)*checkpoint-10\n.*goes on from checkpoint-10"):
            train(load_run(path))
    monkeypatch.setattr("smt_peft.training.run.select_blocks", full)
    assert train(load_run(path))["after"]["eval_loss"] > 0


@pytest.mark.parametrize("how", ["deleted", "emptied"])
def test_a_lost_directory_is_noticed_when_the_run_logs(workshop, tmp_path, how):
    path = workshop.write("lost", **{**SETTINGS, "save_steps": 100}, output_dir=str(tmp_path / "out"))
    (tmp_path / "out").mkdir()

    def lose(model):
        shutil.rmtree(tmp_path / "out")
        if how == "emptied":
            (tmp_path / "out").mkdir()

    with pytest.raises(StoppedError) as caught:
        train(load_run(path), [At(4, lose)])
    assert f"after step 6 the output directory {tmp_path / 'out'} is gone" in str(caught.value)
    assert ("saved: nothing" if how == "deleted" else ": nothing yet") in str(caught.value)
    assert "the same command goes on from the start" in str(caught.value)
    assert not list(tmp_path.glob("out/*"))


def spoil(model) -> None:
    """The next loss will be no number."""
    next(model.parameters()).data.view(-1)[:] = float("nan")


def test_a_loss_that_is_no_number_stops_at_its_step(workshop, tmp_path):
    path = workshop.write("nan", **SETTINGS, output_dir=str(tmp_path / "out"))
    with pytest.raises(DivergedError) as caught:
        train(load_run(path, ["seed=3"]), [At(5, spoil)])
    told = str(caught.value)
    assert told.startswith("the loss of step 5 is not finite\n") and "checkpoint-4\n" in told
    assert "lower the learning_rate (it is 0.01)" in told
    again = f"from checkpoint-4: smt train {path} seed=3 resume_from_checkpoint=true learning_rate=0.005"
    assert told.endswith(again)
    metrics = train(load_run(path, again.split()[5:]))
    assert metrics["after"]["eval_loss"] > 0


def test_weights_that_are_not_finite_are_never_saved(workshop, tmp_path):
    """An infinite gradient of a finite loss."""
    path = workshop.write("inf", **SETTINGS, output_dir=str(tmp_path / "out"))

    class Overflow(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model, **kwargs):
            if state.global_step == 3:
                next(p for p in model.parameters() if p.requires_grad).data.view(-1)[0] = float("inf")

    with pytest.raises(DivergedError, match="after step 4 there are weights that are not finite"):
        train(load_run(path), [Overflow()])
    assert [found.name for found in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]


def test_a_user_may_ask_to_pass_over_such_losses(workshop, tmp_path):
    run = load_run(workshop.write("filtered", **SETTINGS), ["logging_nan_inf_filter=true"])
    assert run.trainer.logging_nan_inf_filter
    assert not load_run(workshop.write("filtered", **SETTINGS)).trainer.logging_nan_inf_filter


@pytest.mark.parametrize("terminal", [True, False])
def test_bars_are_for_terminals(workshop, monkeypatch, terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    path = workshop.write("bars", **SETTINGS, disable_tqdm=None)
    assert load_run(path).trainer.disable_tqdm is not terminal
    assert load_run(path, ["disable_tqdm=true"]).trainer.disable_tqdm
    assert not load_run(path, ["disable_tqdm=false"]).trainer.disable_tqdm


def test_a_selection_is_not_replaced_under_a_run_that_uses_it(workshop, tmp_path):
    path = workshop.write("used", **SETTINGS, output_dir=str(tmp_path / "out"))
    with pytest.raises(Interrupted):
        train(load_run(path), [At(3, lambda model: os.kill(os.getpid(), signal.SIGINT))])
    with pytest.raises(ConfigError, match="holds a run that uses its selection"):
        select(load_run(path))


def test_two_runs_do_not_share_a_directory(workshop, tmp_path, monkeypatch):
    path = workshop.write("shared", **SETTINGS, output_dir=str(tmp_path / "out"))
    monkeypatch.setattr(lock, "PATIENCE", 0.1)

    def second(model):
        assert forked(refused, tmp_path / "log") == 0

    def refused():
        with pytest.raises(ConfigError, match="output_dir: another run is at work in"):
            train(load_run(path))

    metrics = train(load_run(path), [At(3, second)])
    assert history(metrics)[-1]["step"] == 10


def test_what_a_refused_run_leaves_is_nothing(workshop, tmp_path):
    path = workshop.write("refused", **SETTINGS, output_dir=str(tmp_path / "out"))
    with pytest.raises(ConfigError, match="there is no checkpoint"):
        train(load_run(path, ["resume_from_checkpoint=true"]))
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_lost_a_file_or_half_of_one_is_not_whole(tmp_path):
    for step in (1, 2, 3):
        aside = tmp_path / "saving.part" / f"checkpoint-{step}"
        (aside / "deep").mkdir(parents=True)
        for name in ("trainer_state.json", "deep/optimizer.pt"):
            (aside / name).write_text("{}" * step)
        checkpoints.publish(aside, tmp_path / f"checkpoint-{step}")
    assert checkpoints.last_checkpoint(tmp_path).name == "checkpoint-3"
    (tmp_path / "checkpoint-3" / "deep" / "optimizer.pt").unlink()
    assert checkpoints.last_checkpoint(tmp_path).name == "checkpoint-2"
    (tmp_path / "checkpoint-2" / "deep" / "optimizer.pt").write_text("{")
    assert checkpoints.last_checkpoint(tmp_path).name == "checkpoint-1"
    # One of Transformers' own, without a list.
    (tmp_path / "checkpoint-4").mkdir()
    assert checkpoints.last_checkpoint(tmp_path).name == "checkpoint-1"
    (tmp_path / "checkpoint-4" / "trainer_state.json").write_text("{}")
    assert checkpoints.last_checkpoint(tmp_path).name == "checkpoint-4"


def test_a_damaged_checkpoint_that_is_asked_for_is_refused(workshop, tmp_path):
    path = workshop.write("damaged", **SETTINGS, output_dir=str(tmp_path / "out"))
    with pytest.raises(Interrupted):
        train(load_run(path), [At(3, lambda model: os.kill(os.getpid(), signal.SIGINT))])
    (tmp_path / "out" / "checkpoint-3" / "optimizer.pt").unlink()
    with pytest.raises(ConfigError, match="checkpoint-3 is not whole"):
        train(load_run(path, [f"resume_from_checkpoint={tmp_path / 'out' / 'checkpoint-3'}"]))


def test_pruning_keeps_the_best_and_the_newest(tmp_path):
    for step in (2, 4, 6, 8):
        (tmp_path / f"checkpoint-{step}").mkdir()
    checkpoints.prune(tmp_path, None, set())
    checkpoints.prune(tmp_path, 2, {tmp_path / "checkpoint-2", tmp_path / "checkpoint-8"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-8"]
    checkpoints.prune(tmp_path, 1, {tmp_path / "checkpoint-2", tmp_path / "checkpoint-8"})
    assert len(list(tmp_path.iterdir())) == 2


def test_signals_in_another_thread_are_left_alone():
    def body():
        with signals.requesting() as request:
            found.append(request.number)

    found: list[int] = []
    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert found == [0]
