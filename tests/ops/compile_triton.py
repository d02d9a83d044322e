"""Compiles every Triton kernel to machine code, without a GPU, exactly as the launchers launch it. Prints JSON.

The launchers run on CPU tensors; in place of Triton's driver stands one that names a GPU, and every launch stops after
its compilation. Run by test_triton_compile.py in a process of its own: kernels are either interpreted or compiled.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from helpers import random_layout
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from smt_peft.blocks import BlockGrid
from smt_peft.ops.triton import grad, matmul
from smt_peft.ops.triton.launch import Device
from smt_peft.ops.triton.plan import plan

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
GPUS = {
    "sm_80": (GPUTarget("cuda", 80, 32), Device((8, 0), 108)),
    "sm_90": (GPUTarget("cuda", 90, 32), Device((9, 0), 132)),
    "gfx942": (GPUTarget("hip", "gfx942", 64), Device((9, 4), 304, amd=True)),
}
# So few blocks that a kernel and not a GEMM is the route.
NUM_BLOCKS = 9
TOKENS = 8192
# Matrix side, block shape, dtype, and whether to compile what is launched less often too.
WHOLE, ODD = (4096, (256, 256), "bfloat16", True), (1001, (101, 101), "bfloat16", False)
NARROW = (4096, (16, 16), "bfloat16", True)
CASES = {
    "sm_90": [
        WHOLE,
        NARROW,
        ODD,
        (4096, (16, 16), "float16", False),
        (4096, (128, 128), "bfloat16", False),
        (4096, (64, 64), "bfloat16", False),
        (1000, (8, 8), "bfloat16", False),
        (1000, (100, 100), "bfloat16", False),
        (4096, (24, 40), "bfloat16", False),
    ],
    "sm_80": [WHOLE, NARROW, ODD],
    "gfx942": [WHOLE, NARROW],
}


class NamedGPU:
    """What Triton asks a driver when it compiles."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target)

    def get_current_stream(self, device: str) -> int:
        return 0


def main(names: list[str]) -> None:
    launch = JITFunction.run
    for name in names:
        target, device = GPUS[name]
        driver.set_active(NamedGPU(target))
        grad.describe = matmul.describe = lambda _, device=device: device
        for side, block_shape, dtype, all_kinds in CASES[name]:
            layout = random_layout(BlockGrid.fit((side, side), block_shape), NUM_BLOCKS)
            chosen = plan(TOKENS, layout.grid, NUM_BLOCKS, device)
            facts = {"target": name, "side": side, "blocks": "{}x{}".format(*block_shape), "dtype": dtype}
            facts |= {"route": chosen.route, "at_once": chosen.at_once}

            def compile_only(kernel, *operands, grid, warmup, facts=facts, **options):
                compiled = launch(kernel, *operands, grid=grid, warmup=True, **options)
                rows = options.get("BLOCK_T") if kernel is matmul.matmul_kernel else options.get("LANES_R", 128)
                facts = {**facts, "rows": rows, "accumulate": options.get("ACCUMULATE", False)}
                print(json.dumps({"kernel": kernel.__name__, **facts, **measure(compiled)}), flush=True)

            JITFunction.run = compile_only
            run(layout, getattr(torch, dtype), all_kinds)


def run(layout, dtype, all_kinds: bool) -> None:
    grid = layout.grid
    dy, x = torch.empty(TOKENS, grid.rows, dtype=dtype), torch.empty(TOKENS, grid.cols, dtype=dtype)
    delta = torch.empty(NUM_BLOCKS, *grid.block_shape)
    grad.block_grad(dy, x, layout)
    matmul.block_matmul_(dy, x, delta, layout)
    if all_kinds:
        grad.block_grad(dy[:64], x[:64], layout, out=delta, accumulate=True)
        matmul.block_matmul_(x, dy, delta.transpose(1, 2), layout.transposed)
        matmul.block_matmul_(dy[:16], x[:16], delta, layout)


def measure(compiled) -> dict[str, int]:
    numbers = {"shared": compiled.metadata.shared, "warps": compiled.metadata.num_warps}
    if "ptx" not in compiled.asm:
        assembly = compiled.asm["amdgcn"]
        return numbers | {
            "mfma": assembly.count("v_mfma"),
            "registers": int(re.search(r"\.vgpr_count:\s+(\d+)", assembly)[1]),
            "spills": int(re.search(r"\.vgpr_spill_count:\s+(\d+)", assembly)[1]),
        }
    ptx = compiled.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        used = subprocess.run([TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True).stdout
    registers, stack, local = (int(re.search(rf"{key}:(\d+)", used)[1]) for key in ("REG", "STACK", "LOCAL"))
    return numbers | {
        "wgmma": ptx.count("wgmma.mma_async"),
        "mma": ptx.count("mma.sync"),
        "bulk_copies": ptx.count("cp.async.bulk.tensor"),
        "async_copies": ptx.count("cp.async.cg") + ptx.count("cp.async.ca"),
        "registers": registers,
        "spills": stack + local,
    }


if __name__ == "__main__":
    main(sys.argv[1:])
