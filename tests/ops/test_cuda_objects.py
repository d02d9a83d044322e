"""The CUDA sources compiled for GPUs that are not here: registers, spills and the width of loads, read back from the
machine code, and what the library registers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from compiling import CUDA_HOME, SOURCES, call

from smt_peft.ops import reference

NVCC = shutil.which("nvcc") or str(CUDA_HOME / "bin" / "nvcc")
ARCHITECTURES = ("80", "90a")
# Of 65,536 in an SM: 16 warps, a quarter of what it can hold, are the least that hide the latency of memory.
MAX_REGISTERS = 128
OPS = ("block_gather", "block_scatter_", "swap_linear", "swap_matmul", "block_adamw_")
# Compiling takes 45 s of CPU time, and minutes where others compile too (2026-11).
pytestmark = pytest.mark.timeout(900)
STUB = """
int aoti_torch_get_current_cuda_stream(int device, void** stream) { *stream = 0; return 0; }
int torch_c10_cuda_check_msg(int e, const char* f, const char* n, unsigned l, _Bool b, char** m) { *m = 0; return 0; }
void torch_c10_cuda_free_error_msg(char* message) {}
"""


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    """Every source compiled for every architecture: {name: (object file, what ptxas said)}."""
    if not Path(NVCC).is_file():
        pytest.skip(f"needs nvcc (looked on the path and at {NVCC})")
    include = Path(torch.__file__).parent / "include"
    command = [NVCC, "-c", "-std=c++17", "-Xcompiler", "-fPIC", "-Xptxas", "-v", f"-I{include}", "-DUSE_CUDA"]
    command += ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY", "-Werror", "all-warnings"]
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES]

    folder = tmp_path_factory.mktemp("objects")

    def compile_one(source: Path) -> tuple[str, tuple[Path, str]]:
        target = folder / f"{source.stem}.o"
        return source.stem, (target, call([*command, str(source), "-o", str(target)]))

    with ThreadPoolExecutor(2) as pool:
        # The longest first.
        sources = sorted(SOURCES.glob("*.cu"), key=lambda source: "__global__" not in source.read_text())
        return dict(pool.map(compile_one, sources))


def test_registers_and_spills(objects):
    pattern = re.compile(
        r"entry function '(\w+)' for 'sm_(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers",
        re.DOTALL,
    )
    found = [match for _, log in objects.values() for match in pattern.findall(log)]
    # Gathers of 4 dtypes, scatters and swaps of 4 x 4, each wide and narrow; AdamW of 2 x 3 x 3.
    assert Counter(arch for _, arch, *_ in found) == dict.fromkeys(ARCHITECTURES, 2 * (4 + 16 + 16) + 18)
    for name, arch, stack, stores, loads, registers in found:
        assert (int(stack), int(stores), int(loads)) == (0, 0, 0), (name, arch)
        assert int(registers) <= MAX_REGISTERS, (name, arch, registers)


def _kernels(path: Path) -> dict[str, str]:
    """SASS by kernel, of all architectures in a file; skips where the disassembler of Triton's wheel is missing."""
    triton = pytest.importorskip("triton", reason="its wheel brings the disassembler")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.is_file():
        pytest.skip("this Triton has no cuobjdump")
    kernels: dict[str, str] = {}
    arch = None
    for part in re.split(r"(?m)^(?=\s*(?:Function :|arch =))", call([str(tool), "--dump-sass", str(path)])):
        if match := re.match(r"\s*arch = (\w+)", part):
            arch = match[1]
        elif match := re.match(r"\s*Function : (\w+)", part):
            kernels[f"{arch} {match[1]}"] = part
    return kernels


def test_wide_kernels_move_16_bytes_at_a_time(objects):
    copies, adamws = (_kernels(objects[name][0]) for name in ("block_copy", "block_adamw"))
    # The last template argument, N, is 1 in the kernels for single elements.
    wide = {name: sass for name, sass in copies.items() if "copy_kernel" in name and "Li1EEE" not in name}
    assert len(wide) == 36 * len(ARCHITECTURES) and len(adamws) == 18 * len(ARCHITECTURES)
    for name, sass in wide.items():
        assert "LDG.E.128" in sass and set(re.findall(r"STG\.E\S*", sass)) == {"STG.E.128"}, name
    for name, sass in adamws.items():
        assert "LDG.E.128" in sass and not re.search(r"\b(LDL|STL|ATOM|ATOMG|RED)\b", sass), name
        if "kernelIfff" in name:
            # Two accesses each of p, g, m and v, all but g written.
            assert sass.count("LDG.E.128") == 8 and sass.count("STG.E.128") == 6


def test_the_library_registers_every_operation(objects, tmp_path):
    stub = tmp_path / "stub.c"
    stub.write_text(STUB)
    compiler = shutil.which("cc") or shutil.which("gcc")
    call(
        [compiler, "-shared", "-fPIC", "-Wl,-soname,libtorch_cuda.so", str(stub)]
        + ["-o", f"{tmp_path}/libtorch_cuda.so"]
    )
    torch_libraries = Path(torch.__file__).parent / "lib"
    library = tmp_path / "_C_cuda.so"
    call(
        [NVCC, "-shared", "-o", str(library), *(str(path) for path, _ in objects.values())]
        + [f"-L{tmp_path}", f"-L{torch_libraries}", "-ltorch_cuda", "-ltorch_cpu", "-ltorch"]
        + ["-Xlinker", "--no-undefined", "-gencode=arch=compute_90a,code=sm_90a"]
    )
    operations = sorted(Path(reference.__file__).resolve().parents[1].glob("_C.*so"))
    if not operations:
        pytest.skip("smt_peft._C, which defines the operations, is not built")
    script = f"""
import torch
torch.ops.load_library({str(operations[0])!r})
for op in {OPS}:
    assert not torch._C._dispatch_has_kernel_for_dispatch_key("smt_native::" + op, "CUDA"), op
torch.ops.load_library({str(library)!r})
for op in {OPS}:
    assert torch._C._dispatch_has_kernel_for_dispatch_key("smt_native::" + op, "CUDA"), op
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
