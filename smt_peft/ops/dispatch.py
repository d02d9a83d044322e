"""Which backend serves a call: the fastest one that says it can, or the one that was asked for.

`reference` is plain PyTorch and runs anywhere; `native` is compiled C++ (CPU) and CUDA C++; `triton` serves GPUs. A
backend is a module with one function per operation and beside it `why_not_<operation>`, which names the reason why it
cannot run a call. `SMT_BACKEND` forces a choice: `native`, `triton` or `reference` for every operation that backend
has, or `block_grad=triton,block_scatter_=reference`. What is forced and cannot run is an error, never another backend.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from ..blocks import BlockGrid, BlockLayout
from ..say import once

# Backends of each operation, fastest first; after them comes the reference.
FASTER: dict[str, tuple[str, ...]] = {
    "block_gather": ("native",),
    "block_scatter_": ("native",),
    "block_grad": ("native", "triton"),
    "block_scores": (),
    "block_matmul_": ("triton",),
    "swap_linear": ("native",),
    "swap_matmul": ("native",),
    "block_adamw_": ("native",),
}
BACKENDS = ("native", "triton", "reference")
# Device types that a backend is made for: only there is its absence worth a word.
_SERVES = {"native": ("cpu", "cuda"), "triton": ("cuda",)}
# Operations whose reference is not in reference.py.
_REFERENCES = {"swap_linear": "swap", "swap_matmul": "swap", "block_scores": "scores", "block_adamw_": "adamw"}

# Plain PyTorch wherever they run, so that on the meta device they allocate there what they do elsewhere.
_PLAIN = ("block_scores",)

_functions: dict[tuple[str, str], tuple[Callable, Callable]] = {}
_served: set[tuple[str, str]] = set()


def pick(operation: str, *operands) -> Callable:
    """The function that is to run `operation` on these operands.

    Args:
        operation: a key of `FASTER`.
        operands: what the operation takes first; the first of them, or of its items, tells the device.

    Raises:
        RuntimeError: a forced backend cannot run the call; says why.
    """
    if _is_meta(operands) and operation not in _PLAIN:
        return _load("shapes", operation)[0]
    forced = _forced.get(operation)
    if forced is not None:
        function, why_not = _load(forced, operation)
        if reason := why_not(*operands):
            raise RuntimeError(
                f"{operation}: the backend {forced!r} is forced (SMT_BACKEND or use_backend), but {reason}; leave "
                "the choice open, or force another"
            )
        _served.add((operation, forced))
        return function
    for name in FASTER[operation]:
        function, why_not = _load(name, operation)
        if why_not(*operands) is None:
            _served.add((operation, name))
            return function
        _tell_absent(name, operands[0])
    _served.add((operation, "reference"))
    return _load("reference", operation)[0]


def why_not(backend: str, operation: str, *operands) -> str | None:
    """Why a backend cannot run a call, or None."""
    return _load(backend, operation)[1](*operands)


def served() -> dict[str, list[str]]:
    """The backends that have really run, per operation, since the process began."""
    return {name: sorted(backend for operation, backend in _served if operation == name) for name, _ in sorted(_served)}


@contextmanager
def use_backend(spec: str | None) -> Iterator[None]:
    """Force backends for the length of a `with` block; `spec` as in `SMT_BACKEND`, None leaves the choice open.

    Raises:
        ValueError: no such backend or operation.
    """
    global _forced
    before, _forced = _forced, parse(spec)
    try:
        yield
    finally:
        _forced = before


def parse(spec: str | None) -> dict[str, str]:
    """`"native"` or `"block_grad=triton,block_scatter_=reference"` as a map from operation to backend.

    Raises:
        ValueError: no such backend or operation.
    """
    forced = {}
    for part in filter(None, (spec or "").split(",")):
        operation, _, backend = part.strip().rpartition("=")
        if backend not in BACKENDS:
            raise ValueError(f"SMT_BACKEND: there is no backend {backend!r}; known are {', '.join(BACKENDS)}")
        having = [name for name, faster in FASTER.items() if backend == "reference" or backend in faster]
        if operation and operation not in having:
            raise ValueError(
                f"SMT_BACKEND: the backend {backend!r} has no operation {operation!r}; it has {', '.join(having)}"
            )
        forced |= dict.fromkeys([operation] if operation else having, backend)
    return forced


def explain(device: torch.device | str) -> list[tuple[str, str, dict[str, str]]]:
    """Per operation the backend that serves an ordinary call on a device, and why each faster one does not.

    The call that is asked about is small, of fp32 on a CPU and bf16 elsewhere.
    """
    rows = []
    for operation, faster in FASTER.items():
        operands = _sample(operation, torch.device(device))
        reasons = {}
        for name in faster:
            if (reason := _load(name, operation)[1](*operands)) is None:
                rows.append((operation, name, reasons))
                break
            reasons[name] = reason
        else:
            rows.append((operation, "reference", reasons))
    return rows


def _sample(operation: str, device: torch.device) -> tuple:
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    grid = BlockGrid.fit((512, 512), 64)
    x, weight = torch.zeros(512, 512, dtype=dtype, device=device), torch.zeros(512, 512, dtype=dtype, device=device)
    delta = torch.zeros(2, 64, 64, device=device)
    layout = BlockLayout(grid, torch.tensor([[0, 1], [3, 2]], dtype=torch.int32, device=device))
    return {
        "block_gather": (weight, layout),
        "block_scatter_": (weight, delta, layout),
        "block_grad": (x, x, layout),
        "block_scores": ([(x, x)], grid),
        "block_matmul_": (x, x, delta, layout),
        "swap_linear": (x, weight, None, delta, layout),
        "swap_matmul": (x, weight, delta, layout),
        "block_adamw_": ([delta], [delta], [delta], [delta], [delta[:0]], [delta[:0]], [delta[0, 0, 0]]),
    }[operation]


def _load(backend: str, operation: str) -> tuple[Callable, Callable]:
    found = _functions.get((backend, operation))
    if found is None:
        # Imported late: nobody needs Triton, or a compiled library, before the first call that may use it.
        if backend in ("reference", "shapes"):
            module = importlib.import_module(
                f".{backend if backend == 'shapes' else _REFERENCES.get(operation, backend)}", __package__
            )
            found = getattr(module, operation), _always
        else:
            module = importlib.import_module(f".{backend}", __package__)
            found = getattr(module, operation), getattr(module, f"why_not_{operation}")
        _functions[backend, operation] = found
    return found


def _is_meta(operand: object) -> bool:
    while isinstance(operand, (list, tuple)) and operand:
        operand = operand[0]
    return isinstance(operand, torch.Tensor) and operand.is_meta


def _always(*_: object) -> None:
    return None


def _tell_absent(backend: str, operand: object) -> None:
    while isinstance(operand, (list, tuple)) and operand:
        operand = operand[0]
    device = operand.device.type if isinstance(operand, torch.Tensor) else "cpu"
    if device in _SERVES[backend]:
        module = importlib.import_module(f".{backend}", __package__)
        if reason := module.available(device):
            once(f"the {backend} kernels do not serve {device} here, plain PyTorch does: {reason}")


_forced: dict[str, str] = parse(os.environ.get("SMT_BACKEND"))
