"""Builds the compiled backends, `smt_peft._C` (CPU) and `smt_peft._C_cuda`, where that is possible; see `SMT_EXT`.

SMT_EXT=auto  (default) the CPU library; the CUDA one too where PyTorch is a CUDA build and nvcc is there. What cannot
              be built is left out with one line; the package then runs on PyTorch alone.
SMT_EXT=0     neither: a pure Python install.
SMT_EXT=cpu | cuda | all   these, or an error. The CUDA library needs neither a GPU nor a CUDA PyTorch to compile.

PyTorch must be importable while building: `pip install --no-build-isolation .`. Both libraries use its stable C++ ABI
only, so one build serves every PyTorch from 2.10 on, and every Python from 3.10 on.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from glob import glob
from pathlib import Path

from setuptools import setup

try:
    import torch
    from torch.utils import cpp_extension
except ImportError:
    torch = None

MODE = os.environ.get("SMT_EXT", "auto")
ABI_TARGET = "2.10"
# GPUs from Ampere on: machine code for the data-centre chips, PTX for those to come.
ARCHITECTURES = [
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90a,code=sm_90a",
    "-gencode=arch=compute_90,code=compute_90",
]
CXX_FLAGS = ["-O3", "-std=c++17", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]
NVCC_FLAGS = ["-O3", "-std=c++17", "-lineinfo", "--expt-relaxed-constexpr", *ARCHITECTURES]
MACROS = [("TORCH_TARGET_VERSION", "0x020a000000000000")]
# What `_C_cuda` takes from libtorch_cuda. A CPU build of PyTorch has no such library to link with; this one of the same
# name makes the linker record the dependency, which a CUDA build of PyTorch then fulfils.
STUB = """
#include <stdint.h>
int aoti_torch_get_current_cuda_stream(int32_t device, void** stream) { *stream = 0; return 0; }
int torch_c10_cuda_check_msg(int32_t e, const char* f, const char* n, uint32_t l, _Bool b, char** m) {
  *m = 0;
  return 0;
}
void torch_c10_cuda_free_error_msg(char* message) {}
"""


def wanted() -> list[str]:
    if MODE not in ("0", "auto", "cpu", "cuda", "all"):
        sys.exit(f"SMT_EXT is {MODE!r}; it must be 0, auto, cpu, cuda or all")
    if MODE == "0":
        return []
    if torch is None:
        say("PyTorch is not importable here, so no compiled backend; pip install --no-build-isolation builds it")
        if MODE != "auto":
            sys.exit(f"SMT_EXT={MODE} needs PyTorch while building: pip install --no-build-isolation .")
        return []
    cuda = MODE in ("cuda", "all") or (MODE == "auto" and torch.version.cuda and cpp_extension.CUDA_HOME)
    cuda = cuda and (MODE != "auto" or glob("csrc/cuda/*.cu"))
    # `_C` defines the operations that `_C_cuda` adds to.
    return ["_C", "_C_cuda"] if cuda else ["_C"]


def say(text: str) -> None:
    print(f"smt-peft: {text}", file=sys.stderr)


def cpu_extension():
    # Messages and debug information name the sources from here on, not where they were built.
    flags = [*CXX_FLAGS, f"-ffile-prefix-map={Path.cwd()}/="]
    return cpp_extension.CppExtension(
        "smt_peft._C",
        sorted(glob("csrc/cpu/*.cpp")),
        extra_compile_args={"cxx": flags},
        define_macros=MACROS,
        extra_link_args=["-s"],
        py_limited_api=True,
    )


def cuda_extension():
    if cpp_extension.CUDA_HOME is None:
        # A CPU build of PyTorch does not look for nvcc; sources of the stable ABI do not need a CUDA build.
        cpp_extension.CUDA_HOME = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    home = Path(cpp_extension.CUDA_HOME)
    library_dirs = [str(home / "lib64")]
    if torch.version.cuda is None:
        stub = Path("build/stub")
        stub.mkdir(parents=True, exist_ok=True)
        (stub / "stub.c").write_text(STUB)
        linked = ["-shared", "-fPIC", "-Wl,-soname,libtorch_cuda.so", "-o", str(stub / "libtorch_cuda.so")]
        subprocess.run([os.environ.get("CC", "cc"), *linked, str(stub / "stub.c")], check=True)
        library_dirs.insert(0, str(stub))
    return cpp_extension.CppExtension(
        "smt_peft._C_cuda",
        sorted(glob("csrc/cuda/*.cu")),
        include_dirs=[str(home / "include")],
        library_dirs=library_dirs,
        libraries=["torch_cuda", "cudart_static", "dl", "rt", "pthread"],
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS},
        define_macros=[*MACROS, ("USE_CUDA", None)],
        extra_link_args=["-s"],
        py_limited_api=True,
    )


def version_of(*command: str) -> str | None:
    try:
        lines = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout.split("\n")
    except (OSError, subprocess.CalledProcessError):
        return None
    return next((line for line in lines if "release" in line), lines[0])


def build_command():
    class Build(cpp_extension.BuildExtension):
        """Builds what it can, and writes what it was built with to `_build.json` beside the libraries."""

        def run(self):
            super().run()
            folders = {Path(self.build_lib, "smt_peft")}
            if self.inplace or getattr(self, "editable_mode", False):
                folders.add(Path("smt_peft"))
            for folder in folders:
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "_build.json").write_text(json.dumps(self.metadata(), indent=2) + "\n")

        def build_extensions(self):
            for ext in self.extensions:
                ext.optional = MODE == "auto"
                Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
            try:
                super().build_extensions()
            except Exception as error:
                if MODE != "auto":
                    raise
                missing = " and ".join({ext.name for ext in self.extensions} - set(self.built()))
                reason = str(error).strip().split("\n")[0]
                say(f"{missing} could not be compiled and is left out; the package works without it ({reason})")

        def built(self) -> list[str]:
            return [ext.name for ext in self.extensions if Path(self.build_lib, *self.file_of(ext)).exists()]

        def file_of(self, ext) -> tuple[str, ...]:
            return Path(self.get_ext_filename(self.get_ext_fullname(ext.name))).parts

        def metadata(self) -> dict:
            names = self.built()
            cuda = "smt_peft._C_cuda" in names
            return {
                "version": self.distribution.get_version(),
                "libraries": names,
                "torch": torch.__version__,
                "abi_target": ABI_TARGET,
                "machine": platform.machine(),
                "compiler": version_of(cpp_extension.get_cxx_compiler()),
                "flags": CXX_FLAGS,
                "cuda": version_of(str(Path(cpp_extension.CUDA_HOME, "bin", "nvcc"))) if cuda else None,
                "architectures": ARCHITECTURES if cuda else None,
            }

    return Build


builders = {"_C": cpu_extension, "_C_cuda": cuda_extension}
extensions = [builders[name]() for name in wanted()]
setup(
    ext_modules=extensions,
    cmdclass={"build_ext": build_command()} if extensions else {},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if extensions else {},
)
