"""The compiled backend under AddressSanitizer: hostile indices, and operands that end where their memory ends."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]

ASAN_FLAGS = [
    "-O1",
    "-g",
    "-std=c++17",
    "-fPIC",
    "-shared",
    "-Wno-psabi",
    "-fsanitize=address",
    "-fvisibility=hidden",
    "-fno-omit-frame-pointer",
]
ASAN_RUN = """
import itertools, sys
import torch
torch.ops.load_library(sys.argv[1])
raw = torch.ops.smt_native
def index(*pairs): return torch.tensor(pairs, dtype=torch.int32).reshape(-1, 2)
hostile = [index((5, 0)), index((0, 9)), index((-1, 0)), index((0, -7)), index((2**31 - 1, 2**31 - 1)),
           index((1, 1), (1, 1)), index((2, 0), (1, 0)), index((0, 0)).long(), torch.zeros(3, dtype=torch.int32)]
for blocks in hostile:
    n = blocks.shape[0]
    w, p, x, dy = torch.randn(20, 24), torch.randn(n, 5, 3), torch.randn(4, 24), torch.randn(4, 20)
    for call in (lambda: raw.block_gather(w, blocks, 5, 3), lambda: raw.block_scatter_(w, p, blocks),
                 lambda: raw.block_grad_(p, dy, x, blocks, False), lambda: raw.swap_matmul(dy, w, p, blocks),
                 lambda: raw.swap_linear(x, w, None, p, blocks)):
        try:
            call()
        except RuntimeError as error:
            assert "blocks" in str(error) or "block " in str(error), error
        else:
            raise SystemExit(f"{blocks} was accepted")
# Exact operands: their last element is the last of its allocation.
shapes = [(1, 1), (7, 33), (40, 65), (129, 17)]
sides = [(1, 1), (4, 4), (8, 8), (5, 3), (16, 16), (33, 40), (1, 65), (129, 1)]
for (n, k), (r, c), tokens in itertools.product(shapes, sides, [0, 1, 65]):
    r, c = min(r, n), min(c, k)
    pairs = list(itertools.product(range(-(-n // r)), range(-(-k // c))))
    for blocks in (index(), index(*pairs), index(*pairs[-1:]), index(*pairs[::3])):
        for dtype in (torch.float32, torch.bfloat16):
            w, p = torch.randn(n, k).to(dtype), torch.randn(len(blocks), r, c)
            dy, x = torch.randn(tokens, n).to(dtype), torch.randn(tokens, k).to(dtype)
            raw.block_scatter_(w, p, blocks)
            raw.block_scatter_(w.t().contiguous().t(), p, blocks)
            raw.block_gather(w, blocks, r, c)
            raw.swap_linear(x, w, None, p, blocks)
            raw.swap_matmul(dy, w, p, blocks)
            raw.block_grad_(p, dy, x, blocks, True)
code = torch.linspace(-1, 1, 256)
for size, kind in itertools.product((0, 1, 255, 257), (torch.float32, torch.bfloat16, torch.uint8)):
    scales = lambda: [torch.zeros(-(-size // 256) if kind == torch.uint8 else 0)]
    raw.block_adamw_([torch.randn(size)], [torch.randn(size)], [torch.zeros(size, dtype=kind)],
                     [torch.zeros(size, dtype=kind)], scales(), scales(), [torch.tensor(1.0)], None, None, code, code,
                     0.1, 0.9, 0.99, 1e-8, 0.1, 0)
    blocks = lambda: torch.zeros(3, size, dtype=kind)
    scales = lambda: [torch.zeros(-(-3 * size // 256) if kind == torch.uint8 else 0)]
    raw.block_adamw_([torch.randn(3, size)], [torch.randn(3, size)], [blocks()], [blocks()], scales(), scales(),
                     [torch.tensor([1.0, 2.0, 3.0])], None, None, code, code, 0.1, 0.9, 0.99, 1e-8, 0.1, 0)
print("survived", flush=True)
"""
ASAN_CONTROL = """
#include <cstdlib>
extern "C" __attribute__((visibility("default"))) int smt_overrun(int n) {
  volatile char* p = static_cast<char*>(std::malloc(n));
  return p[n];
}
"""


def test_address_sanitizer_sees_no_access_out_of_range(tmp_path):
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler here")
    # With the C++ runtime beside it: AddressSanitizer looks for its exceptions before Python loads it.
    names = ("libasan.so", "libstdc++.so")
    found = [subprocess.check_output([compiler, f"-print-file-name={name}"], text=True).strip() for name in names]
    if not all(map(os.path.isabs, found)):
        pytest.skip("this compiler has no AddressSanitizer library")
    torch_root = Path(torch.__file__).parent
    includes = [f"-I{torch_root / 'include'}", f"-I{torch_root / 'include/torch/csrc/api/include'}"]
    define = "-DTORCH_TARGET_VERSION=0x020a000000000000"
    (tmp_path / "control.cpp").write_text(ASAN_CONTROL)
    sources = [*sorted((ROOT / "csrc/cpu").glob("*.cpp")), tmp_path / "control.cpp"]
    jobs = [
        subprocess.Popen([compiler, *ASAN_FLAGS, "-c", define, *includes, str(s), "-o", str(tmp_path / f"{s.stem}.o")])
        for s in sources
    ]
    assert [job.wait() for job in jobs] == [0] * len(jobs)
    library = tmp_path / "asan.so"
    objects = [str(tmp_path / f"{s.stem}.o") for s in sources]
    linked = [f"-L{torch_root / 'lib'}", "-ltorch_cpu", "-ltorch", "-lc10"]
    subprocess.run([compiler, *ASAN_FLAGS, *objects, *linked, "-o", str(library)], check=True)

    def run(code):
        env = os.environ | {"LD_PRELOAD": " ".join(found), "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "2"}
        return subprocess.run([sys.executable, "-c", code, str(library)], capture_output=True, text=True, env=env)

    checked = run(ASAN_RUN)
    assert checked.returncode == 0 and "survived" in checked.stdout, checked.stderr[-3000:]
    assert "AddressSanitizer" not in checked.stderr
    control = run("import ctypes, sys, torch; ctypes.CDLL(sys.argv[1]).smt_overrun(64)")
    assert control.returncode != 0 and "heap-buffer-overflow" in control.stderr
