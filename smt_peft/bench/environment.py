"""What this is running on: versions, devices, compiled libraries, and which backend serves which operation."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from .. import ops
from ..ops import native
from ..ops.dispatch import parse

PACKAGES = ("torch", "peft", "transformers", "trl", "triton", "accelerate", "bitsandbytes")


def versions() -> dict[str, str | None]:
    """Of Python, this package and those it works with (None: not installed); nothing is imported for it."""
    found = {"python": platform.python_version(), "smt-peft": _version("smt-peft")}
    found |= {name: _version(name) if importlib.util.find_spec(name) else None for name in PACKAGES}
    # The wheel's own name for its build, such as +cpu, is not in its metadata everywhere.
    found["torch"] = torch.__version__
    return found | {"cuda": torch.version.cuda, "driver": _driver()}


def describe(device: torch.device | str) -> dict[str, Any]:
    """Name and figures of a device."""
    device = torch.device(device)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {
            "type": "cuda",
            "name": properties.name,
            "capability": list(torch.cuda.get_device_capability(device)),
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "cache_bytes": properties.L2_cache_size,
        }
    return {
        "type": "cpu",
        "name": _processor(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "cache_bytes": last_level_cache(),
    }


def record(device: torch.device | str) -> dict[str, Any]:
    """What a measurement on a device is written down with."""
    return {
        "device": describe(device),
        "versions": versions(),
        "build": native.build_info(),
        "threads": torch.get_num_threads(),
        # Above the number of threads, other programs wanted the processor too.
        "load_average": list(os.getloadavg()),
        "smt_backend": os.environ.get("SMT_BACKEND"),
    }


def last_level_cache() -> int:
    """Bytes of the processor's largest cache; 32 MiB where the system does not tell."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=32 << 20)


def devices() -> list[str]:
    return ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]


def report() -> str:
    """Everything that `smt env` prints."""
    found = versions()
    lines = [f"smt-peft {found.pop('smt-peft') or '(not installed)'}, Python {found.pop('python')} on {sys.platform}"]
    lines += [f"  {name:13s} {version or 'not there'}" for name, version in found.items()]
    lines += ["", "devices", *(f"  {_sentence(device)}" for device in devices()), "", "compiled libraries"]
    for kind in ("cpu", "cuda"):
        reason = native.available(kind)
        lines.append(f"  {kind:5s} {'loaded' if reason is None else reason}")
    built = {key: value for key, value in native.build_info().items() if value}
    lines += [f"  {key}: {' '.join(value) if isinstance(value, list) else value}" for key, value in built.items()]
    spec = os.environ.get("SMT_BACKEND")
    lines += ["", f"SMT_BACKEND={spec}" if spec else "SMT_BACKEND is not set"]
    for device in devices():
        lines += ["", f"{'on ' + device:16s} {'served by':11s} why not by a faster one"]
        lines += [f"{operation:16s} {name:11s} {why}".rstrip() for operation, name, why in served(device, spec)]
    return "\n".join(lines)


def served(device: str, spec: str | None) -> list[tuple[str, str, str]]:
    """`(operation, backend, why no faster one)` of an ordinary call on a device under a value of `SMT_BACKEND`."""
    forced, rows = parse(spec), []
    for operation, name, reasons in ops.explain(device):
        if operation in forced:
            reason = reasons.get(forced[operation])
            why = f"forced by SMT_BACKEND, but it cannot run: {reason}" if reason else "forced by SMT_BACKEND"
            rows.append((operation, forced[operation], why))
        else:
            rows.append((operation, name, "; ".join(f"{faster}: {reason}" for faster, reason in reasons.items())))
    return rows


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    if not torch.cuda.is_available():
        return None
    try:
        words = Path("/proc/driver/nvidia/version").read_text().split()
    except OSError:
        return None
    return next((word for word in words if word.count(".") >= 1 and word[0].isdigit()), None)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _sentence(device: str) -> str:
    facts = describe(device)
    if facts["type"] == "cpu":
        return f"cpu     {facts['name']}, {facts['isa']}, {facts['threads']} threads"
    major, minor = facts["capability"]
    memory = facts["memory_bytes"] / 2**30
    return f"{device:7s} {facts['name']}, compute capability {major}.{minor}, {memory:.0f} GiB"
