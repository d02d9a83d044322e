"""The benchmark judges rightly: what is wrong is told and never timed, and every route timed agrees with the truth."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from smt_peft import cli, ops
from smt_peft.bench import cases, command, measure, products, table, updates
from smt_peft.bench.measure import Budget, Experiment, Route

CPU = torch.device("cpu")
BUDGET = Budget(rounds=3, operand_bytes=1 << 20, cache_bytes=1 << 12)
PEAKS = {"copy_bytes_per_second": 1e10, "mm_flops_per_second": 1e11}


def experiment(**routes):
    return Experiment(
        "product",
        "8 x 8",
        (torch.randn(8, 8), torch.randn(8, 8)),
        truth=lambda a, b: a.double() @ b.double(),
        plain=torch.mm,
        routes={"mm": Route(torch.mm), **routes},
        baseline="mm",
        bytes=3 * 8 * 8 * 4,
        flops=2 * 8**3,
    )


def rows_of(**routes):
    return {row["route"]: row for row in measure.run(experiment(**routes), BUDGET, PEAKS)}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda c: c + 1e-3,
        lambda c: c * float("nan"),
        lambda c: c[:4],
        lambda c: c.index_fill(0, torch.tensor([7]), float("inf")),
    ],
    ids=["off", "nan", "shape", "inf"],
)
def test_a_wrong_route_is_told_and_not_timed(spoil):
    calls = []

    def wrong(a, b):
        calls.append(1)
        return spoil(a @ b)

    rows = rows_of(wrong=Route(wrong))
    assert rows["wrong"]["status"] == "wrong" and "seconds" not in rows["wrong"]
    assert len(calls) == 1
    assert not rows["wrong"]["error"] <= rows["wrong"]["allowed"]
    assert rows["mm"]["status"] == "ok" and rows["mm"]["ratio"] == 1
    assert "WRONG, not timed: error" in table.write(list(rows.values()))


def test_a_route_that_raises_is_a_line_with_its_reason():
    def raises(a, b):
        raise NotImplementedError("no such kernel\nand a long trace")

    rows = rows_of(raises=Route(raises), absent="not on this machine")
    assert rows["raises"]["status"] == rows["absent"]["status"] == "cannot run"
    assert rows["raises"]["reason"] == "NotImplementedError: no such kernel"
    text = table.write(list(rows.values()))
    assert "cannot run: not on this machine" in text and "cannot run: NotImplementedError" in text


def test_an_operation_in_place_is_checked_and_timed_on_fresh_operands():
    """A check that wrote to the operands would spoil the next route's check."""
    rows = rows_of(inplace=Route(lambda a, b: a.copy_(a @ b)), after=Route(torch.mm))
    assert {row["status"] for row in rows.values()} == {"ok"}


def test_the_tolerance_is_twice_the_error_of_pytorch():
    truth = torch.tensor([1.0, 2.0], dtype=torch.float64)
    plain = torch.tensor([1.25, 2.0])
    assert measure.errors(truth + 0.4, plain, truth) == pytest.approx((0.4, 0.5))
    wrong = measure.errors([truth, truth + 0.6], [plain, plain], [truth, truth])
    assert wrong == pytest.approx((0.6, 0.5))


def test_operands_outgrow_the_cache_within_their_limit():
    operands = (torch.randn(1024),)
    assert len(measure.rotation(operands, 4096, Budget(1, 1 << 20, 16384))) == 8
    assert len(measure.rotation(operands, 1024, Budget(1, 1 << 20, 16384))) == 32
    assert len(measure.rotation(operands, 4096, Budget(1, 4096 * 5, 1 << 30))) == 5
    assert len(measure.rotation(operands, 4096, Budget(1, 1, 1 << 30))) == 2


@pytest.mark.parametrize("shape", [(96, 64), (64, 100)])
def test_matched_blocks_touch_every_stripe_and_clustered_ones_few(shape):
    layout = cases.matched(shape, 8, CPU)
    assert len(layout) == max(layout.grid.stripes)
    assert [len(set(stripes)) for stripes in layout.blocks.T.tolist()] == list(layout.grid.stripes)
    crowd = cases.clustered(shape, 8, 0.2, CPU)
    assert len(crowd) == round(0.2 * crowd.grid.num_blocks)
    rows, cols = (len(set(stripes)) for stripes in crowd.blocks.T.tolist())
    assert len(crowd) >= 0.5 * rows * cols


def test_every_route_agrees_with_the_truth_over_several_sequences(monkeypatch):
    monkeypatch.setattr(products, "SEQUENCE", 8)
    for made in products.block_grad(cases.QUICK, CPU):
        rows = {row["route"]: row for row in measure.run(made, BUDGET, PEAKS)}
        wrong = {name: row for name, row in rows.items() if row["status"] == "wrong"}
        assert not wrong
        for name in ("smt reference", "dense mm", "dense mm + gather", "loop as released", "addmm per block"):
            assert rows[name]["status"] == "ok", rows[name]


def test_quick_run_prints_and_writes_what_it_promises(tmp_path, capsys):
    path = tmp_path / "bench.json"
    assert cli.main(["bench", "--quick", "--device", "cpu", "--out", str(path)]) == 0
    printed = capsys.readouterr().out
    result = json.loads(path.read_text())
    assert {"device", "versions", "build", "threads", "settings", "peaks", "rows"} <= result.keys()
    assert {"python", "torch", "triton", "cuda", "driver"} <= result["versions"].keys()
    assert result["device"]["name"] and result["settings"]["rounds"] == command.QUICK_ROUNDS
    assert {row["operation"] for row in result["rows"]} == set(command.EXPERIMENTS)
    timed = [row for row in result["rows"] if row["status"] == "ok"]
    needed = {"seconds", "seconds_p20_p80", "ratio", "ratio_p20_p80", "bytes", "percent_of_copy", "backend"}
    for row in timed:
        assert needed <= row.keys(), row
        assert row["seconds_p20_p80"][0] <= row["seconds"] <= row["seconds_p20_p80"][1]
    for row in result["rows"]:
        assert row["status"] == "ok" or row["reason"]
    served = {(row["operation"], row["case"]) for row in timed if row["serves"]}
    assert served == {(row["operation"], row["case"]) for row in result["rows"]}
    for route in ("loop as released", "addmm per block", "sampled_addmm (BSR)", "gather + grouped_mm", "torch fused"):
        assert route in printed


def test_a_wrong_result_of_ours_ends_with_status_1(monkeypatch, capsys):
    right = ops.block_gather
    monkeypatch.setattr(updates.ops, "block_gather", lambda *operands: right(*operands) + 1)
    assert cli.main(["bench", "--quick", "--device", "cpu", "--operation", "block_gather"]) == 1
    captured = capsys.readouterr()
    assert "WRONG: block_gather" in captured.out and "block_gather by native" in captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--operation", "block_grab"], "no benchmark of 'block_grab'"),
        (["--rounds", "0"], "rounds must be at least 1, got 0"),
        pytest.param(
            ["--device", "cuda"],
            "finds no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one here"),
        ),
    ],
)
def test_a_bad_argument_is_an_error_that_names_it(arguments, message, capsys):
    assert cli.main(["bench", "--quick", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_forced_backend_is_the_only_one_of_ours(monkeypatch):
    monkeypatch.setenv("SMT_BACKEND", "reference")
    made = next(updates.block_gather(cases.QUICK, CPU))
    assert [name for name in made.routes if name.startswith("smt ")] == ["smt reference"]
    assert made.routes["smt reference"].serves


@pytest.fixture(scope="module")
def gpu_script():
    path = Path(__file__).parent.parent / "benchmarks" / "gpu.py"
    spec = importlib.util.spec_from_file_location("gpu_script", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_all_gpu_stages_together_stay_under_nine_minutes(gpu_script, tmp_path):
    assert sum(stage.limit for stage in gpu_script.stages(tmp_path, dry=False)) < 540


def test_a_stage_that_hangs_is_stopped_and_the_later_ones_run(gpu_script, tmp_path, monkeypatch, capsys):
    def say(text, then=""):
        return [
            sys.executable,
            "-c",
            f"import os, sys, time; print({text!r}, os.environ.get('KIND'), flush=True); {then}",
        ]

    stages = [
        gpu_script.Stage("hangs", say("started", "time.sleep(60)"), 1),
        gpu_script.Stage("fails", say("tried", "sys.exit(3)"), 20, (("KIND", "all"),), on_failure=(("KIND", "auto"),)),
        gpu_script.Stage("works", say("worked"), 20),
    ]
    monkeypatch.setattr(gpu_script, "stages", lambda out, dry: stages)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path)])
    assert gpu_script.main() == 1
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [facts["status"] for facts in summary.values()] == ["stopped after 1 s", "failed (status 3)", "ok"]
    log = (tmp_path / "log.txt").read_text()
    assert all(text in log for text in ("tried all", "tried auto", "worked None"))
