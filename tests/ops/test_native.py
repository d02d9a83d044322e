"""The compiled backend: built and loaded here, safe against hostile operands, interrupts and threads; deterministic.

That its results are right is tested beside those of the other backends.
"""

from __future__ import annotations

import importlib
import math
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import random_layout

from smt_peft.blocks import BlockGrid
from smt_peft.ops import adamw, native, reference

ROOT = Path(__file__).resolve().parents[2]
LAYOUT = random_layout(BlockGrid.fit((40, 56), 8), 9)


@pytest.fixture(scope="module", autouse=True)
def loaded():
    reason = native.available("cpu")
    if reason and shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip(f"no C++ compiler here: {reason}")


def test_the_library_is_built_and_loaded_here():
    assert native.available("cpu") is None
    assert "smt_peft._C" in native.build_info()["libraries"]
    assert {
        "version",
        "torch",
        "abi_target",
        "compiler",
        "flags",
        "cuda",
        "architectures",
    } <= native.build_info().keys()


def test_importing_the_package_loads_no_library():
    code = "import torch, smt_peft.ops; assert not hasattr(torch.ops.smt_native, 'block_gather')"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


class TestLoading:
    @pytest.fixture
    def folder(self, monkeypatch, tmp_path):
        """A copy of the module that looks for libraries in an empty folder."""
        spec = importlib.util.spec_from_file_location("smt_peft.ops.native_copy", native.__file__)
        self.module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, self.module)
        spec.loader.exec_module(self.module)
        monkeypatch.setattr(self.module, "_FOLDER", tmp_path)
        return tmp_path

    def test_a_missing_library_is_a_reason(self, folder):
        assert "not built" in self.module.available("cpu")
        assert "pip install --no-build-isolation" in self.module.available("cpu")
        weight = torch.zeros(LAYOUT.grid.shape)
        assert "not built" in self.module.why_not_block_gather(weight, LAYOUT)
        with pytest.raises(RuntimeError, match="not built"):
            self.module.block_gather(weight, LAYOUT)

    def test_a_damaged_library_is_a_reason_that_quotes_its_build(self, folder):
        (folder / "_C.abi3.so").write_bytes(b"\x7fELF damaged")
        (folder / "_build.json").write_text('{"torch": "9.9.9", "compiler": "some c++ 1.2"}')
        reason = self.module.available("cpu")
        assert "_C.abi3.so does not load" in reason and "torch 9.9.9" in reason and "some c++ 1.2" in reason

    def test_no_other_device_is_served(self):
        assert "not mps" in native.available("mps")
        assert "not meta" in native.why_not_block_gather(torch.zeros(LAYOUT.grid.shape, device="meta"), LAYOUT)


def _calls(blocks, packed=None):
    """Every raw operation that takes an index, on fresh operands, and the tensors that it could damage."""
    rows, cols = LAYOUT.grid.shape
    packed = torch.randn(len(blocks), 8, 8) if packed is None else packed
    weight, x, dy = torch.randn(rows, cols), torch.randn(5, cols), torch.randn(5, rows)
    raw = torch.ops.smt_native
    return {
        "block_gather": (lambda: raw.block_gather(weight, blocks, *packed.shape[1:]), weight),
        "block_scatter_": (lambda: raw.block_scatter_(weight, packed, blocks), weight),
        "block_grad_": (lambda: raw.block_grad_(packed, dy, x, blocks, False), packed),
        "swap_linear": (lambda: raw.swap_linear(x, weight, None, packed, blocks), weight),
        "swap_matmul": (lambda: raw.swap_matmul(dy, weight, packed, blocks), weight),
    }


HOSTILE = {
    "beyond the last row": ([[5, 0]], "outside the grid"),
    "beyond the last column": ([[0, 7]], "outside the grid"),
    "far out": ([[2**31 - 1, 2**31 - 1]], "outside the grid"),
    "negative": ([[0, 0], [-1, 3]], "outside the grid"),
    "duplicate": ([[1, 1], [1, 1]], "duplicate or out of order"),
    "unsorted": ([[2, 2], [1, 3], [1, 1]], "duplicate or out of order"),
    "duplicate later": ([[0, 1], [1, 1], [1, 2], [1, 2]], "duplicate or out of order"),
}


@pytest.mark.parametrize("operation", _calls(LAYOUT.blocks))
@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_index_is_refused_with_nothing_written(case, operation):
    coordinates, message = HOSTILE[case]
    call, target = _calls(torch.tensor(coordinates, dtype=torch.int32))[operation]
    kept = target.clone()
    with pytest.raises(RuntimeError, match=f"{operation}.*{message}.*select_blocks"):
        call()
    assert torch.equal(target, kept)


INDEX = LAYOUT.blocks
WRONG = {
    "int64": (INDEX.long(), "int32"),
    "float": (INDEX.float(), "int32"),
    "flat": (INDEX.reshape(-1), "shape"),
    "three columns": (torch.zeros(len(INDEX), 3, dtype=torch.int32), "shape"),
    "strided": (INDEX.t().contiguous().t(), "contiguous"),
}


@pytest.mark.parametrize("operation", _calls(LAYOUT.blocks))
@pytest.mark.parametrize("case", WRONG)
def test_an_index_of_the_wrong_kind_is_refused(case, operation):
    index, message = WRONG[case]
    call, target = _calls(index, torch.randn(9 if index.ndim == 2 else 18, 8, 8))[operation]
    kept = target.clone()
    with pytest.raises(RuntimeError, match=message):
        call()
    assert torch.equal(target, kept)


def test_operands_that_do_not_fit_are_refused():
    raw = torch.ops.smt_native
    weight, packed = torch.randn(40, 56), torch.randn(9, 8, 8)
    with pytest.raises(RuntimeError, match="contiguous or the transpose"):
        raw.block_scatter_(torch.randn(80, 56)[::2], packed, INDEX)
    with pytest.raises(RuntimeError, match="holds 3 blocks"):
        raw.block_scatter_(weight, packed[:3], INDEX)
    with pytest.raises(RuntimeError, match="dtype Long"):
        raw.block_scatter_(weight.long(), packed, INDEX)
    with pytest.raises(RuntimeError, match="5 tokens and x has 6"):
        raw.block_grad_(packed, torch.randn(5, 40), torch.randn(6, 56), INDEX, False)
    with pytest.raises(RuntimeError, match="float64"):
        raw.block_grad_(packed, torch.randn(5, 40).double(), torch.randn(5, 56), INDEX, False)
    with pytest.raises(RuntimeError, match="cast x"):
        raw.swap_linear(torch.randn(5, 56).double(), weight, None, packed, INDEX)
    with pytest.raises(RuntimeError, match="bias has shape"):
        raw.swap_linear(torch.randn(5, 56), weight, torch.randn(39), packed, INDEX)


def _swap(dtype=torch.float32, side=64, seed=1):
    torch.manual_seed(seed)
    layout = random_layout(BlockGrid.fit((side, side), 8), side // 8)
    weight, x = torch.randn(side, side).to(dtype), torch.randn(7, side).to(dtype)
    delta = torch.randn(len(layout), 8, 8)
    written = weight.clone()
    reference.block_scatter_(written, reference.add_rounded(reference.block_gather(weight, layout), delta), layout)
    return x, weight, delta, layout, written


class TestSwap:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
    @pytest.mark.parametrize("turned", [False, True], ids=["linear", "conv1d"])
    def test_bit_equal_to_a_merged_weight(self, dtype, turned):
        x, weight, delta, layout, written = _swap(dtype)
        if turned:
            weight, written = weight.t().contiguous().t(), written.t().contiguous().t()
        kept, bias = weight.clone(), torch.randn(64).to(dtype)
        assert torch.equal(native.swap_linear(x, weight, bias, delta, layout), F.linear(x, written, bias))
        assert torch.equal(native.swap_linear(x, weight, None, delta, layout), F.linear(x, written))
        assert torch.equal(native.swap_matmul(x, weight, delta, layout), x @ written)
        assert torch.equal(weight, kept)

    def test_base_comes_back_when_the_gemm_raises(self):
        _, weight, delta, layout, _ = _swap()
        kept = weight.clone()
        # Rows enough that no memory can hold the result: this passes every check and fails inside the GEMM.
        endless = torch.randn(1, 64).expand(1 << 52, 64)
        for call in (
            lambda: native.swap_linear(endless, weight, None, delta, layout),
            lambda: native.swap_matmul(endless, weight, delta, layout),
        ):
            with pytest.raises(RuntimeError):
                call()
            assert torch.equal(weight, kept)
        # The lock is free again.
        native.swap_matmul(torch.randn(2, 64), weight, delta, layout)

    def test_bad_shapes_are_refused_before_anything_is_written(self):
        _, weight, delta, layout, _ = _swap()
        kept = weight.clone()
        with pytest.raises(RuntimeError, match="does not fit a weight"):
            native.swap_linear(torch.randn(3, 63), weight, None, delta, layout)
        with pytest.raises(RuntimeError, match="does not fit a weight"):
            native.swap_matmul(torch.randn(3, 65), weight, delta, layout)
        assert torch.equal(weight, kept)

    def test_threads_in_one_weight_get_right_results(self):
        x, weight, delta, layout, written = _swap()
        kept, expected = weight.clone(), F.linear(x, written)
        alias, right = weight.view(-1).view(64, 64), []

        def work(w):
            right.extend(torch.equal(native.swap_linear(x, w, None, delta, layout), expected) for _ in range(200))

        threads = [threading.Thread(target=work, args=(w,)) for w in (weight, alias, weight, alias)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(right) == 800 and all(right)
        assert torch.equal(weight, kept)

    def test_interrupts_never_leave_a_block_behind(self):
        code = """
import os, random, signal, sys, threading, time
import torch
from smt_peft.blocks import BlockGrid, BlockLayout
from smt_peft.ops import adamw, native
grid = BlockGrid.fit((256, 256), 8)
layout = BlockLayout(grid, grid.unflatten(torch.randperm(grid.num_blocks)[:200]))
weight, x, delta = torch.randn(256, 256), torch.randn(8, 256), torch.randn(200, 8, 8)
kept, caught, calls = weight.clone(), 0, 0
native.available("cpu")
done = threading.Event()
def storm():
    while not done.is_set():
        time.sleep(random.random() * 2e-3)
        os.kill(os.getpid(), signal.SIGINT)
sender = threading.Thread(target=storm)
stop = time.monotonic() + 3
try:
    sender.start()
except KeyboardInterrupt:
    pass
while time.monotonic() < stop:
    try:
        try:
            while time.monotonic() < stop:
                native.swap_linear(x, weight, None, delta, layout)
                calls += 1
        except KeyboardInterrupt:
            caught += 1
            assert torch.equal(weight, kept)
    except KeyboardInterrupt:
        caught += 1
signal.signal(signal.SIGINT, signal.SIG_IGN)
done.set()
sender.join()
assert torch.equal(weight, kept), "damaged"
assert caught > 50 and calls > 200, (caught, calls)
"""
        self.run_python(code)

    @staticmethod
    def run_python(code, **env):
        path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
        result = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | env,
        )
        assert result.returncode == 0, result.stderr[-2000:]


SIDES = [4, 8, 16, 64, 200, (5, 7), (-1, 1), (1, -1)]


@pytest.mark.parametrize("side", SIDES, ids=str)
def test_the_number_of_threads_changes_no_bit(side):
    grid = BlockGrid.fit((300, 520), side)
    layout = random_layout(grid, min(grid.num_blocks, 40))
    dy, x, weight = torch.randn(700, 300), torch.randn(700, 520), torch.randn(300, 520)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            grad = native.block_grad(dy, x, layout)
            native.block_grad(dy, x, layout, grad, accumulate=True)
            results.append((grad, native.block_scatter_(weight.clone(), grad, layout)))
    finally:
        torch.set_num_threads(before)
    for grad, scattered in results[1:]:
        assert torch.equal(grad, results[0][0]) and torch.equal(scattered, results[0][1])


ISA = """
import torch
from helpers import assert_no_worse_than_torch, random_layout
from smt_peft.blocks import BlockGrid
from smt_peft.ops import adamw, native, reference
for side in {sides}:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        grid = BlockGrid.fit((72, 100), side)
        layout = random_layout(grid, min(grid.num_blocks, 12))
        dy, x = torch.randn(130, 72).to(dtype), torch.randn(130, 100).to(dtype)
        wide = torch.promote_types(dtype, torch.float32)
        truth = reference.block_gather(dy.double().t() @ x.double(), layout)
        torch_own = reference.block_gather(dy.to(wide).t() @ x.to(wide), layout)
        ours = native.block_grad(dy, x, layout)
        if dtype == torch.float64:
            assert torch.allclose(ours, truth, rtol=0, atol=1e-12)
        else:
            assert_no_worse_than_torch(ours, torch_own, truth)
        weight, packed = torch.randn(72, 100).to(dtype), torch.randn(len(layout), *grid.block_shape)
        ours = native.block_scatter_(weight.clone(), packed, layout)
        assert torch.equal(ours, reference.block_scatter_(weight.clone(), packed, layout))
        assert torch.equal(native.block_gather(ours, layout), reference.block_gather(ours, layout))
for moment in (torch.float32, torch.bfloat16, torch.uint8):
    runs = []
    for backend in (native, adamw):
        torch.manual_seed(3)
        param, states = torch.randn(999), [torch.zeros(999, dtype=moment) for _ in range(2)]
        scales = [torch.zeros(4 if moment == torch.uint8 else 0) for _ in range(2)]
        for step in range(1, 5):
            backend.block_adamw_(
                [param], [torch.randn(999)], *([t] for t in states), *([t] for t in scales),
                [torch.tensor(float(step))], lr=0.01, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1, seed=step,
            )
        runs.append(param)
    assert (runs[0] - runs[1]).abs().max() < 1e-5, moment
"""


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_gives_the_result(isa):
    try:
        TestSwap.run_python(ISA.format(sides=SIDES), SMT_CPU_ISA=isa)
    except AssertionError as error:
        if "which this processor lacks" in str(error):
            pytest.skip(f"no {isa} here")
        raise


def test_an_unknown_instruction_set_is_an_error():
    with pytest.raises(AssertionError, match="must be avx512, avx2, baseline or unset"):
        TestSwap.run_python(ISA.format(sides=[8]), SMT_CPU_ISA="mmx")


def test_writes_are_seen_by_autograd():
    weight = torch.randn(40, 56)
    version = weight._version
    native.block_scatter_(weight, torch.randn(9, 8, 8), LAYOUT)
    assert weight._version > version
    version = weight._version
    native.swap_matmul(torch.randn(2, 40), weight, torch.randn(9, 8, 8), LAYOUT)
    assert weight._version == version


def test_adamw_refuses_with_nothing_written():
    param, moments = torch.randn(10), [torch.zeros(10), torch.zeros(10)]
    kept = param.clone()
    numbers = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.0}

    def step(grad, coefficient=None, skip=None, at=1.0):
        lists = ([param], [grad], [moments[0]], [moments[1]], [torch.empty(0)], [torch.empty(0)], [torch.tensor(at)])
        native.block_adamw_(*lists, coefficient=coefficient, skip=skip, **numbers)

    with pytest.raises(ValueError, match="coefficient is inf"):
        step(torch.randn(10), coefficient=torch.tensor(float("inf")))
    with pytest.raises(ValueError, match="shape"):
        step(torch.randn(11))
    with pytest.raises(ValueError, match="steps"):
        step(torch.randn(10), at=0.0)
    step(torch.full((10,), float("nan")), coefficient=torch.tensor(float("nan")), skip=torch.tensor(1.0))
    assert torch.equal(param, kept) and not moments[0].any()


@pytest.mark.parametrize("moment", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
@pytest.mark.parametrize("shape", [(7, 5, 5), (3, 16, 16), (4, 20, 16), (1, 3, 3), (0, 4, 4)], ids=str)
def test_adamw_counts_steps_by_block(moment, shape):
    """Blocks that end within the 256 elements of a scale, with them, and past several."""
    numbers = {"lr": 0.01, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1, "seed": 5}
    count = math.prod(shape)
    state = [torch.randn(shape), torch.randn(shape)]
    scales = [torch.empty(0), torch.empty(0)]
    for i, (values, signed) in enumerate(((torch.randn(count), True), (torch.rand(count), False))):
        if moment == torch.uint8:
            values, scales[i] = adamw.quantise(values, adamw.dynamic_code(signed))
        state.append(values.to(moment).view(shape))
    steps = torch.randint(1, 50, shape[:1]).float()
    ours, truth = ([[tensor.clone()] for tensor in (*state, *scales, steps)] for _ in range(2))
    native.block_adamw_(*ours, **numbers)
    adamw.block_adamw_(*truth, **numbers)
    for (left,), (right,) in zip(ours, truth, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-7)
    wrong = [*ours[:6], [torch.ones(shape[0] + 1)]]
    with pytest.raises(ValueError, match=r"steps\[0\] must have the shape"):
        native.block_adamw_(*wrong, **numbers)
