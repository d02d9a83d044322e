"""The cost benchmark counts rightly: memory to the byte, the baseline's gradient, and rows that say what they are."""

from __future__ import annotations

import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_no_worse_than_torch, random_layout
from torch import nn

from benchmarks.cost import __main__ as command
from benchmarks.cost import fourbit, freezing, growth, large, methods, released, result, tables, warmup
from benchmarks.cost.memory import step_memory, trace
from benchmarks.cost.methods import Method
from benchmarks.cost.model import Case
from smt_peft import ops, select_blocks
from smt_peft.blocks import BlockGrid
from smt_peft.ops import native
from smt_peft.optim import MeZO

TINY = Case(hidden=64, layers=1, tokens=16, density=0.05)
BYTES = ("peak_bytes", "weights_bytes", "training_bytes", "gradient_bytes", "saved_bytes", "transient_bytes")


class Scale(nn.Module):
    """`x * (weight + delta)`, summed: every tensor of a step can be counted by hand."""

    def __init__(self, width: int):
        super().__init__()
        self.config = SimpleNamespace(hidden_size=width, vocab_size=2)
        self.weight = nn.Parameter(torch.ones(width), requires_grad=False)

    def forward(self, inputs_embeds, labels, use_cache):
        return SimpleNamespace(loss=(inputs_embeds * (self.weight + self.delta)).sum())


def with_delta(model: Scale) -> Scale:
    model.delta = nn.Parameter(torch.zeros_like(model.weight))
    return model


def memory_of(method: Method, case: Case) -> dict:
    return step_memory(partial(method.started, case.build), case.batch)


def test_memory_between_notes_is_counted_to_the_byte():
    def run(note):
        note("first")
        kept = torch.empty(1000)
        note("second")
        more = torch.empty(500, dtype=torch.float64)
        del kept
        last = torch.empty(10, dtype=torch.int8)
        note("third")
        del more, last

    first, second, third = trace(run)
    assert [span.name for span in (first, second, third)] == ["first", "second", "third"]
    assert (first.start, first.peak, first.end) == (0, 4000, 4000)
    assert (second.start, second.peak, second.end) == (4000, 8000, 4010)
    assert (third.start, third.peak, third.end) == (4010, 4010, 0)


def test_every_part_of_a_step_is_what_it_comes_to_by_hand():
    width, tokens = 256, 32
    vector, matrix = 4 * width, 4 * width * tokens
    figures = step_memory(partial(Method(with_delta).started, partial(Scale, width)), (1, tokens))
    # The delta, two moments, and the count of steps.
    training = 3 * vector + 4
    # The embeddings, which the product keeps for the delta's gradient, int64 labels and the loss.
    saved = matrix + 8 * tokens + 4
    # Backward: the gradient of the loss and of the product, and its sum over tokens.
    transient = saved + 4 + matrix + vector
    assert figures == {
        "peak_bytes": vector + training + transient,
        "peak_phase": "backward",
        "weights_bytes": vector,
        "training_bytes": training,
        "gradient_bytes": vector,
        "saved_bytes": saved,
        "transient_bytes": transient,
        "unseen_bytes": 0,
    }


def test_a_step_without_a_backward_pass_is_what_it_comes_to_by_hand():
    width, tokens = 256, 32
    vector, matrix = 4 * width, 4 * width * tokens
    method = Method(with_delta, optimizer=MeZO, backward=False)
    figures = step_memory(partial(method.started, partial(Scale, width)), (1, tokens))
    # The delta, and the number that a step keeps.
    assert (figures["training_bytes"], figures["gradient_bytes"]) == (vector + 8, 0)
    assert figures["peak_phase"] == "forward"
    # When the update begins: embeddings, labels, and the mean of the losses.
    assert figures["saved_bytes"] == matrix + 8 * tokens + 8
    # Beside them: the copy of the delta, weight + delta, and the product; a few losses, and states of generators.
    most = matrix + 8 * tokens + vector + vector + matrix
    assert most <= figures["transient_bytes"] <= most + 3 * len(torch.get_rng_state())


@pytest.mark.skipif(native.available("cpu") is not None, reason="the C++ library is not built")
def test_what_the_compiled_operations_allocate_is_seen():
    layout = random_layout(BlockGrid.fit((64, 48), 8), 5).prepare()
    weight, x, dy = torch.randn(64, 48), torch.randn(16, 48), torch.randn(16, 64)

    def run(note):
        note("gather")
        packed = ops.block_gather(weight, layout)
        note("grad")
        grad = ops.block_grad(dy, x, layout)
        note("end")
        del packed, grad

    # Loads the library, which is not to be counted.
    run(lambda name: None)
    gather, grad, _ = trace(run)
    assert gather.end == gather.peak == 5 * 8 * 8 * 4
    assert grad.end == 2 * 5 * 8 * 8 * 4


def test_memory_is_the_same_in_every_run():
    method = methods.smt(TINY.density)
    once = memory_of(method, TINY)
    assert memory_of(method, TINY) == once
    assert once["unseen_bytes"] > 0
    assert once["peak_bytes"] == once["weights_bytes"] + once["training_bytes"] + once["transient_bytes"]


@pytest.mark.parametrize("shape", [(2, 10, 48), (10, 48)], ids=["batch", "one sequence"])
def test_the_released_layer_and_ours_give_the_gradients_of_plain_pytorch(shape):
    torch.manual_seed(0)
    layout = random_layout(BlockGrid.fit((64, 48), 16), 5)
    base = nn.Linear(48, 64)
    weight, bias = base.weight.detach().clone(), base.bias.detach().clone()
    x, dy = torch.randn(shape), torch.randn(*shape[:-1], 64)

    def plain(dtype):
        leaves = [tensor.to(dtype, copy=True).requires_grad_() for tensor in (x, weight)]
        y = F.linear(*leaves, bias.to(dtype))
        y.backward(dy.to(dtype))
        return y.detach(), leaves[0].grad, ops.block_gather(leaves[1].grad, layout)

    def theirs():
        layer, leaf = released.ReleasedLinear(base, layout), x.clone().requires_grad_()
        y = layer(leaf)
        y.backward(dy)
        return y.detach(), leaf.grad, layer.blocks.grad.view(5, 16, 16)

    def ours():
        leaf, delta = x.clone().requires_grad_(), torch.zeros(5, 16, 16, requires_grad=True)
        y = ops.block_linear(leaf, weight, bias, delta, layout, swap=True)
        y.backward(dy)
        return y.detach(), leaf.grad, delta.grad

    truth, same = plain(torch.float64), plain(torch.float32)
    for found in (theirs(), ours()):
        for tensor, in_torch, true in zip(found, same, truth, strict=True):
            assert_no_worse_than_torch(tensor, in_torch, true)


def test_the_released_layer_computes_with_the_blocks_it_has_trained():
    layout = random_layout(BlockGrid.fit((64, 48), 16), 5)
    layer = released.ReleasedLinear(nn.Linear(48, 64), layout)
    expected = layer.base.weight.detach().clone()
    with torch.no_grad():
        layer.blocks.add_(1)
    ops.block_scatter_(expected, ops.block_gather(expected, layout) + 1, layout)
    x = torch.randn(3, 48)
    assert torch.equal(layer(x), F.linear(x, expected, layer.base.bias))


def test_the_released_layer_stands_on_the_blocks_of_ours_and_comes_off():
    base = TINY.build()
    names = [name for name, _ in base.named_parameters()]
    config = methods.smt_config(TINY.density)
    selection = select_blocks(base, config)
    model = released.put_on(base, selection)
    assert {name for name, layer in model.named_modules() if isinstance(layer, released.ReleasedLinear)} == set(
        selection.blocks
    )
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trained == selection.effective_numel == methods.smt(TINY.density).started(TINY.build).trainable
    assert [name for name, _ in released.take_off(model).named_parameters()] == names


def test_the_released_layer_refuses_blocks_that_do_not_tile_the_weight():
    with pytest.raises(ValueError, match="needs blocks that tile the weight"):
        released.ReleasedLinear(nn.Linear(50, 64), random_layout(BlockGrid.fit((64, 50), 16), 3))


def test_checkpointing_frees_what_smt_saves_but_not_what_the_released_layer_keeps():
    case = Case(hidden=64, layers=2, tokens=64, density=0.05, checkpointing=True)
    saved = {
        name: memory_of(method, case)["saved_bytes"]
        for name, method in {
            "frozen": methods.frozen(),
            "smt": methods.smt(case.density),
            "released": methods.released_smt(case.density),
        }.items()
    }
    assert saved["smt"] == saved["frozen"]
    # At least the input of one layer's down projection.
    assert saved["released"] >= saved["frozen"] + 4 * case.tokens * case.hidden * 11 // 4


def test_lora_at_equal_parameters_is_within_half_a_rank():
    base, case = TINY.build(), TINY
    rank, weights = methods.equal_rank(base, case.density), methods.targeted(base)
    per_rank = methods.lora(1).started(case.build).trainable
    assert abs(rank * per_rank - case.density * weights) <= per_rank / 2
    assert weights == sum(p.numel() for name, p in base.named_parameters() if "_proj" in name)


def run_suite(tmp_path, *arguments) -> dict:
    size = ["--hidden", "64", "--layers", "1", "--tokens", "16", "--density", "0.05"]
    command.main([*arguments, "--quick", "--rounds", "1", "--out", str(tmp_path), *size])
    (path,) = tmp_path.glob("*.json")
    return json.loads(path.read_text())


def check_rows(found: dict) -> None:
    assert {"device", "versions", "commit", "settings", "rows", "unseen_memory"} <= found.keys()
    assert {"hash", "dirty"} == found["commit"].keys()
    assert found["rows"]
    for row in found["rows"]:
        # Magnitude and chance need no batch.
        assert row["seconds"] > 0 or row.get("score") in ("low_rank_magnitude", "random")
        assert row["peak_bytes"] > 0 and row["peak_ratio"] > 0
        if row["method"] == "frozen":
            assert row["ratio"] == row["peak_ratio"] == 1 and row["trainable"] == 0
        elif not row["method"].startswith(("warm-up", "frozen", "inference")):
            assert row["ratio"] > 0 and row["trainable"] > 0 and row["trained_modules"] > 0
            assert row["peak_bytes"] == row["weights_bytes"] + row["training_bytes"] + row["transient_bytes"]


def test_the_step_suite_compares_every_method_with_and_without_checkpointing(tmp_path, capsys):
    found = run_suite(tmp_path, "step")
    check_rows(found)
    plain, checkpointed = found["done"]
    of = {point: {row["method"] for row in found["rows"] if row["point"] == point} for point in found["done"]}
    kinds = {"frozen", "smt matched", "smt clustered", "released, matched", "lora r16", "dora r16", "full"}
    assert kinds <= of[plain] and any(name.startswith("shira") for name in of[plain])
    assert of[checkpointed] < of[plain] and {row["checkpointing"] for row in found["rows"]} == {False, True}
    head, rows = tables.steps(found, plain)
    assert len(rows) == len(of[plain]) and all(len(row) == len(head) for row in rows)
    assert "released, clustered" in capsys.readouterr().out


def test_layers_in_turn_hold_moments_and_gradients_of_one_and_save_less_the_higher_it_is(tmp_path):
    size = ["--hidden", "64", "--layers", "3", "--tokens", "16", "--density", "0.05"]
    command.main(["neighbours", "--quick", "--rounds", "1", "--out", str(tmp_path), *size])
    found = json.loads((tmp_path / "neighbours_cpu.json").read_text())
    check_rows(found)
    for point in ("plain", "checkpointed"):
        of = {row["method"]: row for row in found["rows"] if row["point"] == point}
        whole, lowest, highest = of["smt matched"], of["layers in turn, the lowest"], of["layers in turn, the highest"]
        layers = whole["layers"]
        assert lowest["gradient_bytes"] == highest["gradient_bytes"] == whole["gradient_bytes"] // layers
        assert highest["saved_bytes"] < lowest["saved_bytes"] <= whole["saved_bytes"]
        assert highest["peak_bytes"] <= lowest["peak_bytes"] < whole["peak_bytes"]


def test_the_warm_up_is_inside_the_cost_of_a_run(tmp_path):
    found = run_suite(tmp_path, "warmup")
    check_rows(found)
    scores = {row["score"]: row for row in found["rows"] if "score" in row}
    assert set(scores) == set(warmup.SCORES)
    assert scores["grad_abs"]["peak_bytes"] > scores["activation"]["peak_bytes"]
    assert scores["grad_abs"]["peak_to_full_backward"] < 1
    times = {"frozen": 1.0, "smt matched": 2.0, "lora": 3.0}
    rows = [{"point": "warm-up", "method": name, "ratio": value, "seconds": value} for name, value in times.items()]
    choosing = {"method": "warm-up, grad_abs", "score": "grad_abs", "seconds": 0.5, "choice_seconds": 12.0}
    assert tables.runs({"rows": [*rows, {"point": "warm-up"} | choosing]})[1] == [
        ["frozen", 1.0, 1.0, 1.0, 1.0],
        ["smt matched", 2.0, 2.2, 2.02, 2.002],
        ["lora", 3.0, 3.0, 3.0, 3.0],
    ]
    for table in (tables.runs(found), tables.warm_ups(found)):
        assert table[1] and all(len(row) == len(table[0]) for row in table[1])


def test_growth_has_a_frozen_pass_at_every_point(tmp_path, monkeypatch):
    monkeypatch.setattr(growth, "DENSITIES", (0.02, 0.1))
    found = run_suite(tmp_path, "growth", "--axes", "density")
    check_rows(found)
    assert found["done"] == [f"density={density}" for density in growth.DENSITIES]
    frozen = [row for row in found["rows"] if row["method"] == "frozen"]
    assert [row["density"] for row in frozen] == list(growth.DENSITIES)
    head, rows = tables.growth(found, "density", "peak_ratio")
    assert head == ["density", "smt auto", "smt 32", "smt 128", "lora, equal parameters"]
    assert len(rows) == len(growth.DENSITIES) and all(None not in row for row in rows)


def test_freezing_and_inputs_in_8_bits_are_measured_over_a_round_of_all_modules(tmp_path):
    found = run_suite(tmp_path, "freezing")
    assert found["done"] == ["decoder", "encoder", "images"] and found["settings"]["device"] == "cpu"
    for kind in found["done"]:
        rows = {(row["share"], row["saved_activations"]): row for row in found["rows"] if row["point"] == kind}
        assert set(rows) == {(share, saved) for share in freezing.SHARES for saved in freezing.SAVED}
        first = rows[0.0, "full"]
        assert first["ratio"] == first["peak_ratio"] == first["saved_ratio"] == 1
        assert all(row["seconds"] > 0 and row["peak_bytes"] > row["weights_bytes"] > 0 for row in rows.values())
        # In bf16 as the model is, of all blocks or of those that train.
        assert first["gradient_bytes"] == 2 * first["trainable"]
        assert rows[0.9, "full"]["gradient_bytes"] < 0.5 * first["gradient_bytes"]
        assert rows[0.0, "int8"]["saved_bytes"] < first["saved_bytes"]
        assert rows[0.5, "full"]["saved_bytes"] < first["saved_bytes"]
    head, rows = tables.freezing(found)
    assert len(rows) == len(found["rows"]) and all(len(row) == len(head) for row in rows)


def test_every_axis_of_growth_moves_one_property_of_the_centre():
    for point in growth.points():
        base = vars(growth.CENTRE) | ({"hidden": point.case.hidden} if point.axis == "layers" else {})
        changed = {name for name, value in vars(point.case).items() if base[name] != value}
        assert changed <= {point.axis}
    assert {point.axis for point in growth.points()} == set(growth.AXES)


def test_four_bits_are_measured_over_a_frozen_pass_of_four_bits(tmp_path):
    pytest.importorskip("bitsandbytes")
    found = run_suite(tmp_path, "fourbit")
    check_rows(found)
    plain = {row["method"]: row for row in found["rows"] if row["point"] == "nf4"}
    assert plain["frozen"]["weights_bytes"] < plain["frozen, in floats"]["weights_bytes"]
    assert any(name.startswith("qlora") for name in plain)


def test_without_bitsandbytes_the_reason_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(fourbit, "find_spec", lambda name: None)
    rows = run_suite(tmp_path, "fourbit")["rows"]
    assert [row["reason"] for row in rows] == [fourbit.ABSENT] * 2


def test_a_suite_goes_on_where_it_stopped_and_begins_anew_with_other_settings(tmp_path, monkeypatch):
    monkeypatch.setattr(result, "commit", lambda: {"hash": "abc", "dirty": False})
    path = tmp_path / "some.json"
    first = result.Result(path, "some", {"rounds": 1})
    row = {"method": "frozen", "seconds": 1.0, "ratio": 1.0, "ratio_p20_p80": [1.0, 1.0]}
    first.add("one", [row])
    broken = iter([row, {}])
    with pytest.raises(KeyError):
        first.add("two", broken)
    again = result.Result(path, "some", {"rounds": 1})
    assert again.has("one") and not again.has("two")
    again.add("two", [row])
    assert [row["point"] for row in json.loads(path.read_text())["rows"]] == ["one", "two"]
    assert not result.Result(path, "some", {"rounds": 2}).has("one")
    monkeypatch.setattr(result, "commit", lambda: {"hash": "abc", "dirty": True})
    assert not result.Result(path, "some", {"rounds": 1}).has("one")


def test_the_large_model_is_measured_method_by_method_on_one_base(tmp_path, monkeypatch):
    kept = ("smt matched, 0.84 %", "lora r16", "full", "released, clustered 8, 0.84 %")
    every = methods.large(8)
    monkeypatch.setattr(large.methods, "large", lambda side: {name: every[name] for name in kept})
    monkeypatch.setattr(large.methods, "large_checkpointed", lambda side: {"lora r16": every["lora r16"]})
    size = ["--device", "cpu", "--dtype", "float32", "--layers", "1", "--shrink", "32", "--batches", "2x8"]
    command.main(["large", *size, "--rounds", "1", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "large_cpu.json").read_text())
    assert found["done"] == ["plain", "warm-up", "checkpointed"]
    rows = {(row["point"], row["method"]): row for row in found["rows"]}
    assert {name for point, name in rows if point == "plain"} == {"frozen", *kept}
    assert all(row["ratio"] > 0 and row["peak_bytes"] > row["weights_bytes"] > 0 for row in found["rows"])
    frozen, full = rows["plain", "frozen"], rows["plain", "full"]
    # Two moments in fp32, of every weight: the table of embeddings is trained too.
    assert full["training_bytes"] >= 8 * full["trainable"] > 0 and frozen["training_bytes"] == 0
    assert rows["plain", "lora r16"]["weights_bytes"] == frozen["weights_bytes"]


def test_methods_for_which_there_is_no_time_are_told_so(tmp_path):
    size = ["--device", "cpu", "--dtype", "float32", "--layers", "1", "--shrink", "32", "--batches", "2x8"]
    command.main(["large", *size, "--rounds", "1", "--seconds", "0", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "large_cpu.json").read_text())["rows"]
    left_out = [row["method"] for row in rows if "left out" in row.get("reason", "")]
    assert left_out[:-4] == list(methods.large(8)) and len(rows) == len(left_out) + 2
