"""The CUDA sources without a GPU: what one thread does is compiled for the CPU, and run for every thread of the grid,
against plain PyTorch."""

from __future__ import annotations

import ctypes
import shutil

import pytest
import torch
from compiling import CUDA_HOME, SOURCES, call
from helpers import assert_no_worse_than_torch, layouts, random_layout
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smt_peft.blocks import BlockGrid, BlockLayout
from smt_peft.ops import adamw, native, reference

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3, torch.uint8: 4}
FLOATS = list(DTYPES)[:4]
# Elements around every buffer that no kernel may touch.
GUARD = 64


@pytest.fixture(scope="module")
def emulation(tmp_path_factory):
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None or not (CUDA_HOME / "include" / "cuda_bf16.h").is_file():
        pytest.skip(f"needs a C++ compiler and the CUDA headers (looked in {CUDA_HOME})")
    library = tmp_path_factory.mktemp("emulation") / "emulation.so"
    flags = [
        "-std=c++17",
        "-O1",
        "-shared",
        "-fPIC",
        "-ffp-contract=off",
        "-fno-strict-aliasing",
        "-Wno-unknown-pragmas",
        "-Wall",
        "-Werror",
    ]
    call([compiler, *flags, f"-I{CUDA_HOME / 'include'}", str(SOURCES / "emulation.cpp"), "-o", str(library)])
    return ctypes.CDLL(str(library))


class Guarded:
    """A tensor amid memory that must stay as it is; `shift` elements off the alignment of the allocator."""

    def __init__(self, values: torch.Tensor, shift: int = 0):
        self.memory = torch.full((values.numel() + 2 * GUARD,), 77, dtype=values.dtype)
        self.start = GUARD + shift
        self.tensor = self.memory[self.start : self.start + values.numel()].view(values.shape)
        self.tensor.copy_(values)

    def assert_untouched_around(self):
        end = self.start + self.tensor.numel()
        assert bool((self.memory[: self.start] == 77).all() and (self.memory[end:] == 77).all())


def _copy(emulation, kind: str, weight_NK, packed_Brc, layout: BlockLayout, saved=None) -> bool:
    """Runs the grid of a copy as the launcher would describe it; True when it moved 16 bytes at a time."""
    strides = (ctypes.c_int64 * 3)(*packed_Brc.stride())
    wide = emulation.copy_blocks(
        ["gather", "scatter", "swap_in"].index(kind),
        DTYPES[weight_NK.dtype],
        DTYPES[packed_Brc.dtype],
        ctypes.c_void_p(weight_NK.data_ptr()),
        ctypes.c_int64(weight_NK.shape[0]),
        ctypes.c_int64(weight_NK.shape[1]),
        int(not weight_NK.is_contiguous()),
        ctypes.c_void_p(packed_Brc.data_ptr()),
        strides,
        ctypes.c_void_p(0 if saved is None else saved.data_ptr()),
        ctypes.c_void_p(layout.blocks.data_ptr()),
        ctypes.c_int64(len(layout)),
        ctypes.c_int64(layout.grid.block_rows),
        ctypes.c_int64(layout.grid.block_cols),
    )
    assert wide in (0, 1)
    return bool(wide)


def _check_copies(emulation, layout, weight_dtype, packed_dtype, transposed=False, shift=0) -> bool:
    """Gather, scatter, swap in and swap out of one weight, every element and its surroundings."""
    grid = layout.grid
    values = torch.randn(grid.cols, grid.rows).t() if transposed else torch.randn(grid.rows, grid.cols)
    memory = Guarded((values.t() if transposed else values).to(weight_dtype), shift)
    weight = memory.tensor.t() if transposed else memory.tensor
    before = weight.clone()

    packed = Guarded(torch.full((len(layout), *grid.block_shape), float("nan"), dtype=weight_dtype))
    wide = _copy(emulation, "gather", weight, packed.tensor, layout)
    assert torch.equal(packed.tensor, reference.block_gather(before, layout))
    packed.assert_untouched_around()

    # The padding of what is written is poison that must not arrive.
    padding = ~layout.padding_mask()
    delta = torch.randn(len(layout), *grid.block_shape).masked_fill(padding, float("nan")).to(packed_dtype)
    _copy(emulation, "scatter", weight, delta, layout)
    truth = reference.block_scatter_(before.clone(), delta, layout)
    assert torch.equal(weight, truth) and not bool(weight.isnan().any())
    weight.copy_(before)

    # A second visit of an element would add twice, and save what the first had written.
    sides = grid.block_shape[::-1] if transposed else grid.block_shape
    saved = Guarded(torch.full((len(layout), *sides), float("nan"), dtype=weight_dtype))
    _copy(emulation, "swap_in", weight, delta, layout, saved.tensor)
    wanted = reference.add_rounded(reference.block_gather(before, layout), delta)
    assert torch.equal(weight, reference.block_scatter_(before.clone(), wanted, layout))
    saved.assert_untouched_around()

    originals = saved.tensor.transpose(1, 2) if transposed else saved.tensor
    assert torch.equal(originals.isnan(), padding)
    _copy(emulation, "scatter", weight, originals, layout)
    assert torch.equal(weight, before)
    memory.assert_untouched_around()
    return wide


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(layouts(), st.booleans(), st.sampled_from(FLOATS))
def test_copies_of_any_layout(emulation, layout, transposed, dtype):
    _check_copies(emulation, layout, dtype, torch.float32, transposed)


# Whole accesses, one CTA per block and several blocks per CTA; ragged edges that keep accesses whole; wide and tall.
WIDE = {
    "16": random_layout(BlockGrid.fit((96, 128), 16), 12),
    "ragged": random_layout(BlockGrid.fit((70, 104), 16), 12),
    "tiles": random_layout(BlockGrid.fit((200, 560), (180, 544)), 2),
    "row": random_layout(BlockGrid.fit((9, 4200 * 8), (1, -1)), 3),
}


@pytest.mark.parametrize("packed_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("weight_dtype", FLOATS, ids=str)
def test_copies_of_16_bytes_at_a_time(emulation, weight_dtype, packed_dtype):
    for name in ("16", "ragged", "tiles"):
        assert _check_copies(emulation, WIDE[name], weight_dtype, packed_dtype), name
    # Off the alignment: the same by single elements.
    assert not _check_copies(emulation, WIDE["ragged"], weight_dtype, packed_dtype, shift=1)


def test_copies_of_whole_rows_and_columns(emulation):
    assert _check_copies(emulation, WIDE["row"], torch.bfloat16, torch.float32)
    columns = random_layout(BlockGrid.fit((3000, 20), (-1, 1)), 5)
    assert not _check_copies(emulation, columns, torch.bfloat16, torch.float32)
    assert not _check_copies(emulation, WIDE["ragged"], torch.bfloat16, torch.float32, transposed=True)


def test_packed_blocks_may_be_strided(emulation):
    layout, weight = WIDE["ragged"], torch.randn(70, 104)
    strided = torch.randn(len(layout), 16, 16).transpose(1, 2)
    truth = reference.block_scatter_(weight.clone(), strided, layout)
    assert not _copy(emulation, "scatter", weight, strided, layout)
    assert torch.equal(weight, truth)


def test_an_index_outside_the_matrix_touches_nothing(emulation):
    weight = Guarded(torch.randn(64, 64))
    before = weight.tensor.clone()
    hostile = torch.tensor([[-1, 0], [0, -1], [4, 0], [0, 4], [2**31 - 1, 2**31 - 1], [-(2**31), 1]], dtype=torch.int32)
    layout = BlockLayout(BlockGrid.fit((64, 64), 16), hostile)
    packed, saved = torch.ones(6, 16, 16), torch.ones(6, 16, 16)
    _copy(emulation, "scatter", weight.tensor, packed, layout)
    _copy(emulation, "swap_in", weight.tensor, packed, layout, saved)
    _copy(emulation, "gather", weight.tensor, packed, layout)
    assert torch.equal(weight.tensor, before) and not bool(packed.any()) and bool((saved == 1).all())
    weight.assert_untouched_around()


def test_stochastic_rounding_has_the_bits_of_the_reference(emulation):
    special = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 3.4e38, -3.4e38, 1e-45, 1.0, -1.0 - 2**-20]
    values = torch.cat((torch.tensor(special), torch.randn(5000)))
    for seed, ordinal, salt in ((0, 0, 1), (-1, 3, 2), (2**40 + 5, 700, 3)):
        rounded = torch.empty(len(values), dtype=torch.bfloat16)
        emulation.round_bf16(
            ctypes.c_void_p(values.data_ptr()),
            ctypes.c_int64(len(values)),
            ctypes.c_int64(seed),
            ctypes.c_uint32(ordinal),
            ctypes.c_uint32(salt),
            ctypes.c_void_p(rounded.data_ptr()),
        )
        truth = adamw.round_stochastically(values, seed, ordinal, salt)
        assert torch.equal(rounded.isnan(), truth.isnan())
        assert torch.equal(rounded.nan_to_num(0).view(torch.int16), truth.nan_to_num(0).view(torch.int16))


@pytest.mark.parametrize("signed", [True, False])
def test_the_nearest_code_is_the_nearest_in_exact_arithmetic(emulation, signed):
    code = adamw.dynamic_code(signed)
    middles = ((code[1:].double() + code[:-1].double()) / 2).float()
    around = [torch.nextafter(middles, torch.tensor(float(side))) for side in (-2, 2)]
    values = torch.cat((code, middles, *around, torch.rand(5000) * 2 - 1, torch.tensor([-1.0, 0.0, 1.0])))
    codes = torch.empty(len(values), dtype=torch.uint8)
    emulation.nearest_codes(
        *(ctypes.c_void_p(values.data_ptr()), ctypes.c_int64(len(values))),
        *(ctypes.c_void_p(code.data_ptr()), ctypes.c_void_p(codes.data_ptr())),
    )
    distances = (values.double()[:, None] - code.double()).abs()
    assert torch.equal(codes.long(), distances.argmin(dim=1))


NUMELS = (1, 255, 256, 257, 4095, 4097, 9000)
NUMBERS = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}


def _state(numels, param_dtype, grad_dtype, moment_dtype) -> list[list[torch.Tensor]]:
    state = [[] for _ in range(7)]
    for number, n in enumerate(numels):
        m, v = torch.randn(n) * 1e-2, torch.rand(n) * 1e-4
        scales = [torch.empty(0), torch.empty(0)]
        if moment_dtype == torch.uint8:
            (m, scales[0]), (v, scales[1]) = (
                adamw.quantise(moment, adamw.dynamic_code(signed)) for moment, signed in ((m, True), (v, False))
            )
        tensors = (torch.randn(n).to(param_dtype), (torch.randn(n) * 1e-2).to(grad_dtype), m.to(moment_dtype))
        tensors += (v.to(moment_dtype), *scales, torch.tensor(float(number + 1)))
        for group, tensor in zip(state, tensors, strict=True):
            group.append(tensor)
    return state


def _adamw(emulation, state, ordinals=None, coefficient=None, skip=None, seed=5, numbers=NUMBERS) -> int:
    """Runs the grid of one launch in place; returns how many tensors were read 16 bytes at a time."""
    count = len(state[0])
    rows, tables = torch.zeros(count, 10, dtype=torch.int64), []
    for i in range(count):
        rows[i, :7] = torch.tensor([group[i].data_ptr() for group in state])
        rows[i, 7], rows[i, 8] = state[0][i].numel(), i if ordinals is None else ordinals[i]
        if state[6][i].ndim:
            rows[i, 9] = state[0][i].numel() // len(state[6][i])
            tables.append(native.by_block(state[6][i], numbers["lr"], numbers["beta1"], numbers["beta2"]))
            rows[i, 6] = tables[-1].data_ptr()
    codes = [adamw.dynamic_code(True), adamw.dynamic_code(False)]
    pointers = [ctypes.c_void_p(0 if t is None else t.data_ptr()) for t in (coefficient, skip, *codes)]
    aligned = emulation.adamw(
        *(DTYPES[group[0].dtype] for group in state[:3]),
        ctypes.c_int64(count),
        ctypes.c_void_p(rows.data_ptr()),
        *pointers,
        *map(ctypes.c_double, numbers.values()),
        ctypes.c_int64(seed),
    )
    assert aligned >= 0
    return aligned


def _guarded(state, shift=0) -> tuple[list[list[Guarded]], list[list[torch.Tensor]]]:
    guards = [[Guarded(tensor, shift) for tensor in group] for group in state]
    return guards, [[guard.tensor for guard in group] for group in guards]


MOMENTS = (torch.float32, torch.bfloat16, torch.uint8)


@pytest.mark.parametrize("moment_dtype", MOMENTS, ids=str)
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("param_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adamw_of_every_kind(emulation, param_dtype, grad_dtype, moment_dtype):
    state = _state(NUMELS, param_dtype, grad_dtype, moment_dtype)
    coefficient = torch.tensor(0.5)
    truth = [[tensor.clone() for tensor in group] for group in state]
    adamw.block_adamw_(*truth, **NUMBERS, coefficient=coefficient, skip=torch.tensor(0.0), seed=5)

    guards, ours = _guarded(state)
    assert _adamw(emulation, ours, coefficient=coefficient, skip=torch.tensor(0.0)) == len(NUMELS)
    for index, (group, wanted) in enumerate(zip(ours, truth, strict=True)):
        if index in (1, 6):
            assert all(torch.equal(a, b) for a, b in zip(group, wanted, strict=True))
            continue
        a, b = torch.cat(group), torch.cat(wanted)
        if a.dtype == torch.float32:
            torch.testing.assert_close(a, b, rtol=2e-6, atol=0 if index else 2e-7)
        else:
            # The same random bits: another value only where fp32 arithmetic ends an ulp away, on the edge of rounding.
            steps = (_bits(a) - _bits(b)).abs()
            assert steps.max() <= 1 and (steps > 0).float().mean() < 2e-3
    for group in guards:
        for guard in group:
            guard.assert_untouched_around()

    # Off the alignment of 16 bytes: element by element, the same bits.
    shifted, again = _guarded(state, shift=1)
    assert _adamw(emulation, again, coefficient=coefficient) == 0
    assert all(torch.equal(a, b) for x, y in zip(again, ours, strict=True) for a, b in zip(x, y, strict=True))
    for group in shifted:
        for guard in group:
            guard.assert_untouched_around()


@pytest.mark.parametrize("moment_dtype", MOMENTS, ids=str)
def test_blocks_count_their_steps_apart(emulation, moment_dtype):
    """Blocks that end within a thread's elements, within a warp's, and with a chunk."""
    sizes = (5, 300, 4096)
    state = _state([3 * size for size in sizes], torch.float32, torch.float32, moment_dtype)
    for group in state[:4]:
        group[:] = [tensor.view(3, size) for tensor, size in zip(group, sizes, strict=True)]
    state[6] = [torch.tensor([40.0, 1.0, 7.0]) for _ in sizes]
    truth = [[tensor.clone() for tensor in group] for group in state]
    adamw.block_adamw_(*truth, **NUMBERS, seed=5)
    _adamw(emulation, state)
    for index in (0, 2, 3):
        for ours, wanted in zip(state[index], truth[index], strict=True):
            if ours.dtype == torch.float32:
                torch.testing.assert_close(ours, wanted, rtol=2e-6, atol=0 if index else 2e-7)
            else:
                steps = (_bits(ours) - _bits(wanted)).abs()
                assert steps.max() <= 1 and (steps > 0).float().mean() < 2e-3


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).int()


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.0), (0.9, 0.99999)], ids=str)
def test_adamw_is_no_worse_than_torch(emulation, betas):
    numbers = NUMBERS | {"beta1": betas[0], "beta2": betas[1]}
    start = torch.randn(3000)
    ours = [[start.clone()], [torch.empty(3000)], [torch.zeros(3000)], [torch.zeros(3000)]]
    ours += [[torch.empty(0)], [torch.empty(0)], [torch.tensor(0.0)]]
    others = [torch.nn.Parameter(start.to(dtype).clone()) for dtype in (torch.float32, torch.float64)]
    optimizers = [torch.optim.AdamW([p], lr=1e-2, betas=betas, eps=1e-8, weight_decay=0.1) for p in others]
    for step in range(100):
        grad = torch.randn(3000) * 10.0 ** (step % 5 - 4)
        for param, optimizer in zip(others, optimizers, strict=True):
            param.grad = grad.to(param.dtype)
            optimizer.step()
        ours[1][0].copy_(grad)
        ours[6][0] += 1
        _adamw(emulation, ours, numbers=numbers)
    assert_no_worse_than_torch(ours[0][0], others[0].detach(), others[1].detach())


def test_a_step_that_is_skipped_changes_nothing(emulation):
    for moment_dtype in MOMENTS:
        state = _state((300,), torch.float32, torch.float32, moment_dtype)
        before = [[tensor.clone() for tensor in group] for group in state]
        for flag in (1.0, float("nan"), float("inf")):
            _adamw(emulation, state, skip=torch.tensor(flag))
        assert all(torch.equal(a, b) for x, y in zip(state, before, strict=True) for a, b in zip(x, y, strict=True))


def test_eight_bit_moments_are_quantised_as_the_reference_does(emulation):
    # With both betas 0 the moments are g and g^2 exactly.
    numbers = NUMBERS | {"beta1": 0.0, "beta2": 0.0}
    grad = torch.randn(5000) * 10.0 ** torch.randint(-6, 3, (5000,))
    grad[256:512] = 0
    state = _state((5000,), torch.float32, torch.float32, torch.uint8)
    zero = [adamw.quantise(torch.zeros(5000), adamw.dynamic_code(signed)) for signed in (True, False)]
    state[1][0], (state[2][0], state[4][0]), (state[3][0], state[5][0]) = grad, *zero
    _adamw(emulation, state, numbers=numbers)
    for moment, codes, scales, signed in ((grad, 2, 4, True), (grad * grad, 3, 5, False)):
        wanted = adamw.quantise(moment, adamw.dynamic_code(signed))
        assert torch.equal(state[codes][0], wanted[0]) and torch.equal(state[scales][0], wanted[1])

    grad[1000] = float("nan")
    _adamw(emulation, state, numbers=numbers)
    assert torch.equal(state[4][0].isnan(), torch.arange(20) == 1000 // 256)


def test_one_launch_holds_the_tensors_of_a_model(emulation):
    capacity = emulation.adamw_capacity()
    assert capacity >= 448  # twice the linears of a model of 32 layers
    state = _state([1 + 37 * i % 9001 for i in range(capacity)], torch.bfloat16, torch.bfloat16, torch.bfloat16)
    ordinals = [3 * i for i in range(capacity)]
    alone = [[tensor.clone() for tensor in group] for group in state]
    _adamw(emulation, state, ordinals=ordinals)
    for i in range(0, capacity, 29):
        _adamw(emulation, [[group[i]] for group in alone], ordinals=[ordinals[i]])
        assert all(torch.equal(group[i], other[i]) for group, other in zip(state, alone, strict=True))
