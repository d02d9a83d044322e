"""Every Triton kernel compiled to machine code for three GPUs that are not here, and what the code needs read back.

A spill, a lost asynchronous copy or a tensor-core instruction of an older kind is invisible to the interpreter and
costs a kernel a multiple of its time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
# Registers, and shared memory of one program and of a multiprocessor. "sm_80" stands for the GPUs of 8.6 and 8.9 too,
# whose shared memory is smaller.
REGISTERS = 65536
SHARED = {"sm_80": (101376, 102400), "sm_90": (232448, 233472), "gfx942": (65536, 65536)}


@pytest.fixture(scope="module")
def kernels() -> list[dict]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("compile_triton.py"), *SHARED],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def _each(kernels: list[dict], **wanted) -> list[dict]:
    found = [kernel for kernel in kernels if all(kernel.get(key) == value for key, value in wanted.items())]
    assert found, f"no kernel was compiled with {wanted}"
    return found


def test_every_kernel_fits(kernels):
    for kernel in kernels:
        # The largest tile, added to a gradient: 72 bytes, once, after the loop (Triton 3.6.0 and 3.7.1, 2026-11).
        largest = kernel["kernel"] == "bulk_kernel" and kernel["accumulate"] and kernel["blocks"] == "256x256"
        assert kernel["spills"] <= (72 if largest else 0), kernel
        assert kernel["shared"] <= SHARED[kernel["target"]][0], kernel


def test_as_many_programs_fit_together_as_planned(kernels):
    for target in ("sm_80", "sm_90"):
        for name in {"sm_80": ["pointer_kernel"], "sm_90": ["pointer_kernel", "bulk_kernel"]}[target]:
            for kernel in _each(kernels, target=target, kernel=name, accumulate=False):
                by_registers = REGISTERS // (kernel["registers"] * kernel["warps"] * 32)
                # 1 KiB of every program is the driver's.
                by_shared = SHARED[target][1] // (kernel["shared"] + 1024)
                assert min(by_registers, by_shared) >= kernel["at_once"], kernel


def test_tensor_cores_are_used(kernels):
    for kernel in _each(kernels, target="sm_90"):
        if kernel["kernel"] != "sum_kernel":
            # The warp-group instruction of Hopper needs 64 rows.
            assert kernel["wgmma" if kernel["rows"] >= 64 else "mma"] > 0, kernel
    for target, instruction in (("sm_80", "mma"), ("gfx942", "mfma")):
        for kernel in _each(kernels, target=target):
            assert kernel[instruction] > 0 or kernel["kernel"] == "sum_kernel", kernel


def test_copies_are_asynchronous(kernels):
    bulk = _each(kernels, kernel="bulk_kernel")
    assert {(kernel["target"], kernel["blocks"]) for kernel in bulk} == {
        ("sm_90", "256x256"),
        ("sm_90", "128x128"),
        ("sm_90", "64x64"),
    }
    for kernel in bulk:
        assert kernel["bulk_copies"] > 0, kernel
    for target in ("sm_80", "sm_90"):
        for name in ("pointer_kernel", "matmul_kernel"):
            for kernel in _each(kernels, target=target, kernel=name):
                # Blocks of odd sides lie at odd addresses, where nothing can be copied asynchronously.
                assert (kernel["async_copies"] > 0) == (kernel["blocks"] != "101x101"), kernel
    for kernel in _each(kernels, blocks="16x16", target="sm_90", kernel="pointer_kernel"):
        # 64 tokens of 128 rows and 128 columns, 16 bytes for each of 256 threads, in 3 stages and a loop unrolled once.
        assert kernel["async_copies"] == 2 * 3 * 64 * 128 * 2 // (16 * 256), kernel
