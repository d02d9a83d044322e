"""Which backend serves a call, how it is forced, and what is refused before any backend is asked."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from helpers import random_layout

from smt_peft import ops
from smt_peft.blocks import BlockGrid, BlockLayout
from smt_peft.ops import dispatch, native

LAYOUT = random_layout(BlockGrid.fit((32, 48), 8), 5)
DY, X, WEIGHT = torch.randn(9, 32), torch.randn(9, 48), torch.randn(32, 48)
DELTA = torch.randn(5, 8, 8)


def test_the_cpu_is_served_by_the_compiled_kernels():
    served = {operation: backend for operation, backend, _ in ops.explain("cpu")}
    for operation in ("block_gather", "block_scatter_", "block_grad", "swap_linear", "swap_matmul", "block_adamw_"):
        assert served[operation] == "native", ops.explain("cpu")
    assert dispatch.pick("block_grad", DY, X, LAYOUT) is native.block_grad


def test_a_forced_backend_is_used_or_refused_with_the_reason():
    with ops.use_backend("reference"):
        assert dispatch.pick("block_grad", DY, X, LAYOUT) is ops.reference.block_grad
        with ops.use_backend(None):
            assert dispatch.pick("block_grad", DY, X, LAYOUT) is native.block_grad
    with (
        ops.use_backend("block_matmul_=triton"),
        pytest.raises(RuntimeError, match="block_matmul_: the backend 'triton' is forced .*, but .*"),
    ):
        ops.block_matmul_(DY.clone(), X, DELTA, LAYOUT)
    assert dispatch.pick("block_grad", DY, X, LAYOUT) is native.block_grad


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("cuda", "no backend 'cuda'; known are native, triton, reference"),
        ("block_matmul_=native", "'native' has no operation 'block_matmul_'; it has block_gather"),
        ("reference,block_grda=native", "no operation 'block_grda'"),
    ],
)
def test_a_wrong_spec_is_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        dispatch.parse(spec)


def test_a_backend_speaks_for_the_operations_it_has():
    assert dispatch.parse("triton") == {"block_grad": "triton", "block_matmul_": "triton"}
    assert set(dispatch.parse("reference").values()) == {"reference"}
    assert dispatch.parse("reference,block_grad=native")["block_grad"] == "native"


def test_the_environment_forces_too():
    code = "import smt_peft; from smt_peft.ops import dispatch; print(dispatch._forced['block_grad'])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"SMT_BACKEND": "block_grad=reference"}
    )
    assert done.stdout.strip() == "reference", done.stderr


def test_an_absent_backend_is_told_once(monkeypatch, caplog):
    caplog.set_level("INFO", logger="smt_peft")
    monkeypatch.setattr("smt_peft.say._said", set())
    monkeypatch.setattr(native, "available", lambda device: "no compiler was found")
    monkeypatch.setattr(dispatch, "_functions", {})
    for operation in ("block_grad", "block_gather"):
        monkeypatch.setattr(native, f"why_not_{operation}", lambda *operands: "no compiler was found")
    for _ in range(3):
        ops.block_gather(WEIGHT, LAYOUT)
        ops.block_grad(DY, X, LAYOUT)
    assert [line for line in caplog.messages if "no compiler was found" in line] == [
        "the native kernels do not serve cpu here, plain PyTorch does: no compiler was found"
    ]


CALLS = {
    "block_gather": lambda dy, x, weight, delta, layout: ops.block_gather(weight, layout),
    "block_scatter_": lambda dy, x, weight, delta, layout: ops.block_scatter_(weight, delta, layout),
    "block_grad": lambda dy, x, weight, delta, layout: ops.block_grad(dy, x, layout),
    "block_matmul_": lambda dy, x, weight, delta, layout: ops.block_matmul_(dy, x, delta, layout),
    "swap_linear": lambda dy, x, weight, delta, layout: ops.swap_linear(x, weight, None, delta, layout),
    "swap_matmul": lambda dy, x, weight, delta, layout: ops.swap_matmul(dy, weight, delta, layout),
}


def _index(*blocks):
    return torch.tensor(blocks, dtype=torch.int32)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("operation", CALLS)
@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (_index((0, 0), (4, 0)), r"block \(4, 0\) lies outside the grid of 4 x 6"),
        (_index((0, 0), (0, 6)), "lies outside"),
        (_index((-1, 0), (0, 1)), "lies outside"),
        (_index((1, 0), (0, 1), (0, 0)), "not sorted"),
        (_index((1, 0), (1, 0)), "listed twice"),
        (torch.tensor([[0, 0], [1, 1]]), "must be int32, got torch.int64"),
        (_index(0, 1), r"shape \(num_blocks, 2\)"),
    ],
)
def test_a_bad_index_is_refused_and_nothing_written(operation, blocks, message, backend):
    layout = BlockLayout(LAYOUT.grid, blocks)
    weight, dy = WEIGHT.clone(), DY.clone()
    with ops.use_backend(backend), pytest.raises(ValueError, match=message):
        CALLS[operation](dy, X, weight, DELTA[:2], layout)
    assert torch.equal(weight, WEIGHT) and torch.equal(dy, DY)


@pytest.mark.parametrize(
    ("operation", "changed", "message"),
    [
        ("block_gather", {"weight": WEIGHT.long()}, "weight_NK is torch.int64; the operations compute in"),
        (
            "block_gather",
            {"weight": WEIGHT.t()},
            r"weight_NK has shape \(48, 32\), but 5 blocks of a matrix of 32 x 48",
        ),
        ("block_scatter_", {"delta": DELTA[:4]}, r"blocks_Brc has shape \(4, 8, 8\)"),
        ("block_scatter_", {"delta": DELTA.to("meta")}, "blocks_Brc is on meta, the block index on cpu"),
        ("block_grad", {"x": X[:5]}, r"x_TK has shape \(5, 48\).* want \(9, 48\)"),
        ("block_grad", {"dy": DY.bool()}, "dy_TN is torch.bool"),
        ("block_matmul_", {"dy": DY[:, :8]}, "y_TN has shape"),
        ("swap_linear", {"delta": DELTA[..., :4]}, "delta_Brc has shape"),
        ("swap_matmul", {"weight": WEIGHT.to("meta")}, "weight_NK is on meta"),
    ],
)
def test_operands_that_do_not_fit_are_refused(operation, changed, message):
    given = {"dy": DY.clone(), "x": X, "weight": WEIGHT.clone(), "delta": DELTA, "layout": LAYOUT} | changed
    with pytest.raises(ValueError, match=message):
        CALLS[operation](**given)


def test_where_a_gradient_is_to_be_written_is_checked():
    for out, message in (
        (torch.zeros(5, 8, 8, dtype=torch.float64), "out is torch.float64 and contiguous; it must be torch.float32"),
        (torch.zeros(5, 8, 16)[..., ::2], "not contiguous"),
        (torch.zeros(4, 8, 8), r"out has shape \(4, 8, 8\)"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.block_grad(DY, X, LAYOUT, out=out)
    with pytest.raises(ValueError, match="accumulate=True adds to `out`, but no `out` was given"):
        ops.block_grad(DY, X, LAYOUT, accumulate=True)


def test_a_weight_that_is_no_matrix_in_memory_is_refused():
    wide = torch.randn(32, 96)[:, ::2]
    for backend in ("native", "reference"):
        with ops.use_backend(backend), pytest.raises((ValueError, RuntimeError), match="contiguous"):
            ops.block_scatter_(wide, DELTA, LAYOUT)
