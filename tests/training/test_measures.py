"""What a run measures of itself is what a count from its files gives, and never stands in its way."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from helpers import tiny_llama
from killing import history
from peft import get_peft_model
from safetensors.torch import load_file

from smt_peft import BlockSelection, SMTConfig, cli
from smt_peft.plan.record import record
from smt_peft.report.html import HTML
from smt_peft.report.words import percent
from smt_peft.training import outputs
from smt_peft.training.measures import MEASUREMENTS, Measures, command, measure_effective_update
from smt_peft.training.run import select, train
from smt_peft.training.yaml.schema import load_run
from smt_peft.tuner.delta import SMTBlocks


@pytest.fixture(scope="module")
def metrics(finished) -> dict:
    return json.loads((finished.directory / outputs.METRICS).read_text())


def test_the_effective_update_is_that_of_the_saved_adapter(finished, metrics, workshop):
    base = load_file(workshop.directory / "model" / "model.safetensors")
    adapter = load_file(finished.directory / "adapter_model.safetensors")
    selection = BlockSelection.load(finished.directory / outputs.SELECTION)
    found = {}
    for name, blocks in selection.blocks.items():
        delta = adapter[f"base_model.model.{name}.smt_blocks.weight"]
        weight, (high, wide) = base[f"{name}.weight"], delta.shape[1:]
        before = torch.stack([weight[r * high : (r + 1) * high, c * wide : (c + 1) * wide] for r, c in blocks.tolist()])
        found[name] = [delta.numel(), int((delta != 0).sum()), int(((before + delta) != before).sum())]
    update = metrics["effective_update"]
    assert update["modules"] == found
    assert [update["entries"], update["moved"], update["changed"]] == [sum(each) for each in zip(*found.values())]  # noqa: B905
    assert update["share"] == update["changed"] / update["entries"] > 0.5
    assert update["dtype"] == "float32"
    # That of the last step, as the log has it.
    logged = [entry["effective_update"] for entry in metrics["log_history"] if "effective_update" in entry]
    assert logged[-1] == update["share"]
    assert f" {percent(update['share'])} |" in (finished.directory / outputs.REPORT).read_text()


def test_memory_is_counted_and_set_against_the_plan(finished, metrics, workshop):
    base = load_file(workshop.directory / "model" / "model.safetensors")
    parameters = metrics["trainable_parameters"]
    modules = len(BlockSelection.load(finished.directory / outputs.SELECTION).blocks)
    measured, planned = metrics["memory"], metrics["plan"]
    assert measured["trained"] == planned["trained"] == 4 * parameters
    # Two moments, and a step counter for each module.
    assert measured["moments"] == planned["moments"] == 8 * parameters + 4 * modules
    assert measured["weights"] == planned["weights"]
    # Besides the weights there are the frequencies of the rotary embedding, a few bytes.
    assert 0 <= measured["weights"] - sum(tensor.nbytes for tensor in base.values()) < 1024
    assert measured["resident"] > measured["weights"] and planned["peak"] > planned["weights"]


def test_the_log_has_times_and_the_run_its_rate(metrics):
    entries = [entry for entry in metrics["log_history"] if "loss" in entry]
    times = [entry["elapsed"] for entry in entries]
    assert times == sorted(times) and times[0] > 0
    assert metrics["tokens_per_second"] == pytest.approx(entries[-1]["num_tokens"] / times[-1], abs=0.1)


def test_the_page_is_made_again_as_it_was(finished, metrics):
    page = (finished.directory / HTML).read_bytes()
    (finished.directory / HTML).unlink()
    assert cli.main(["report", str(finished.directory)]) == 0
    assert (finished.directory / HTML).read_bytes() == page
    assert metrics["command"] == f"smt train {finished.yaml} max_steps=6"
    assert metrics["command"].encode() in page and b"verified" in page


def test_a_selection_has_a_page(workshop, capsys):
    directory = workshop.directory / "selected_page"
    select(load_run(workshop.write("selected_page")))
    page = (directory / HTML).read_text()
    assert f"drawn in {directory / HTML}" in capsys.readouterr().out
    assert str(workshop.directory / "model") in page and "nothing trained yet" in page


def test_neither_a_plan_nor_a_page_that_fails_breaks_a_run(workshop, monkeypatch, capsys):
    def broken(*args):
        raise RuntimeError("out of ideas")

    monkeypatch.setattr("smt_peft.plan.record.plan", broken)
    monkeypatch.setattr("smt_peft.training.run.write_report", broken)
    metrics = train(load_run(workshop.write("unplanned", max_steps=2)), plan=record)
    directory = workshop.directory / "unplanned"
    assert metrics["plan"] == {"error": "RuntimeError: out of ideas"}
    assert json.loads((directory / outputs.METRICS).read_text()) == metrics
    assert f"{HTML} could not be made (RuntimeError: out of ideas)" in capsys.readouterr().out
    assert cli.main(["report", str(directory)]) == 0
    assert "The plan could not be made: RuntimeError: out of ideas." in (directory / HTML).read_text()


def test_what_was_measured_survives_a_run_brought_to_its_end_later(workshop, monkeypatch):
    path = workshop.write("later", max_steps=2, verify=True, save_strategy="steps", save_steps=1)

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("smt_peft.training.run.verify_saved", killed)
        with pytest.raises(KeyboardInterrupt):
            train(load_run(path))
    before = json.loads((workshop.directory / "later" / outputs.UNFINISHED).read_text())
    after = train(load_run(path, ["resume_from_checkpoint=true"]))
    for key in ("memory", "effective_update", "tokens_per_second"):
        assert after[key] == before[key] and after[key]
    assert history(after) == history(before)


def adapted(delta: float):
    model = get_peft_model(
        tiny_llama().to(torch.bfloat16),
        SMTConfig(target_modules=["q_proj"], block_size=8, density=0.2, score="random"),
    )
    for module in model.modules():
        if isinstance(module, SMTBlocks):
            torch.nn.init.constant_(module.weight, delta)
    return model


def test_a_run_that_rounds_away_is_told(capsys):
    assert measure_effective_update(adapted(1e-9))["share"] < 0.01
    assert "of the trained entries differ from the base once they are stored in bfloat16" in capsys.readouterr().out
    assert measure_effective_update(adapted(1e-1))["share"] > 0.9
    assert capsys.readouterr().out == ""
    assert "on the meta device" in measure_effective_update(adapted(1e-1).to("meta"))["error"]


def test_however_often_is_logged_the_update_is_measured_a_few_times(monkeypatch):
    calls = []
    monkeypatch.setattr("smt_peft.training.measures.effective_update", lambda model: calls.append(model) or {})
    measures, model = Measures(), adapted(0.0)
    args = SimpleNamespace(device=torch.device("cpu"))
    state = SimpleNamespace(global_step=0, max_steps=1000, log_history=[], is_world_process_zero=True)
    measures.on_log(args, state, None, model=model)  # of an evaluation before the training
    measures.on_train_begin(args, state, None)
    for step in range(1, 1001):
        state.global_step = step
        state.log_history.append({"loss": 1.0, "step": step})
        measures.on_log(args, state, None, model=model)
    assert len(calls) == MEASUREMENTS
    assert all("elapsed" in entry for entry in state.log_history)


def test_the_command_is_told_without_its_secrets():
    words = ["/usr/bin/smt", "train", "my run.yaml", "hub_token=hf_abc", "seed=1"]
    assert command(words) == "smt train 'my run.yaml' 'hub_token=***' seed=1"
    assert command(["/site/smt_peft/cli.py", "train"]) == "smt train"
    assert command(["train.py"]) == "train.py"
