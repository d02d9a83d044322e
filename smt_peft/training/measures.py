"""What a run measures of itself while it trains: time, memory, and the effective update. Nothing in a step itself."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerState

from ..bases.sharded import is_sharded
from ..tuner.delta import SMTBlocks
from ..tuner.effective import effective_update
from ..tuner.low_rank import LowRank
from .tell import tell

# Of a whole run, whatever `logging_steps` is: each reads all blocks once, as one update does.
MEASUREMENTS = 20
# Below this share of changed entries a run has mostly trained what rounding takes away.
LOW = 0.01


class Measures(TrainerCallback):
    """Writes into the log entries `elapsed` (seconds since this process began to train) and, now and then,
    `effective_update` (share of the blocks' entries changed since the start); at the end has `memory`.

    Attributes:
        memory: bytes on the device of this process, empty before the end of a training: `weights` (frozen), `trained`
            (blocks, low-rank pairs), `moments` (of the optimizer), and `peak`, the most that PyTorch's CUDA allocator
            held during the training; on a CPU, which counts no such thing, `resident` instead: the largest resident
            set of the process so far, Python and libraries included.
    """

    def __init__(self):
        self.memory: dict[str, int] = {}
        self._start: float | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        if args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(args.device)
        self._start = time.perf_counter()

    def on_log(self, args, state, control, model=None, **kwargs):
        if self._start is None or not state.log_history:
            return
        entry = state.log_history[-1]
        entry["elapsed"] = round(time.perf_counter() - self._start, 3)
        if _is_due(state) and state.is_world_process_zero and not is_sharded(model):
            found = summed(effective_update(model))
            if found["entries"]:
                entry["effective_update"] = found["share"]

    def on_train_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        self._start = None
        self.memory = memory(model, optimizer, args.device)


def _is_due(state: TrainerState) -> bool:
    """Whether the last entry begins another of the run's parts; by the log alone, so that a resumed run agrees."""
    entry = state.log_history[-1]
    if "loss" not in entry:
        return False
    earlier = islice(reversed(state.log_history), 1, None)
    before = next((other["step"] for other in earlier if "loss" in other), 0)
    whole = max(1, state.max_steps)
    return entry["step"] * MEASUREMENTS // whole > before * MEASUREMENTS // whole


def summed(modules: Mapping[str, Any]) -> dict[str, Any]:
    """`metrics.json`'s `effective_update` of `tuner.effective.effective_update`.

    Returns:
        `share` of `changed` among `entries`, how many `moved` in the adapter, the `dtype` (several: with commas), and
        per name in `modules` `[entries, moved, changed]`.
    """
    entries, moved, changed = (
        sum(getattr(each, part) for each in modules.values()) for part in ("entries", "moved", "changed")
    )
    return {
        "share": changed / entries if entries else 0.0,
        "entries": entries,
        "moved": moved,
        "changed": changed,
        "dtype": ", ".join(sorted({each.dtype for each in modules.values()})),
        "modules": {name: [each.entries, each.moved, each.changed] for name, each in modules.items()},
    }


def measure_effective_update(model: nn.Module) -> dict[str, Any]:
    """As `summed`, or `error` where it cannot be counted; says so when hardly anything changed."""
    try:
        found = summed(effective_update(model))
    except ValueError as error:
        return {"error": str(error)}
    if found["entries"] and found["share"] < LOW:
        tell(
            f"only {found['share']:.2%} of the trained entries differ from the base once they are stored in "
            f"{found['dtype']}; the rest rounds away when the adapter is merged: raise learning_rate, or train longer"
        )
    return found


def memory(model: nn.Module, optimizer: Any, device: torch.device) -> dict[str, int]:
    """The storages of a training at its end, see `Measures.memory`."""
    adapters = [module for module in model.modules() if isinstance(module, (SMTBlocks, LowRank))]
    blocks = {id(parameter) for module in adapters for parameter in module.parameters(recurse=False)}
    tables = {id(table) for module in adapters for table in module.buffers(recurse=False)}
    tensors = [tensor for tensor in (*model.parameters(), *model.buffers()) if id(tensor) not in tables]
    found = {
        "weights": _stored(tensor for tensor in tensors if id(tensor) not in blocks),
        "trained": _stored(tensor for tensor in tensors if id(tensor) in blocks),
        "moments": _stored(_tensors(getattr(optimizer, "optimizer", optimizer).state if optimizer else {})),
    }
    if device.type == "cuda":
        found["peak"] = torch.cuda.max_memory_allocated(device)
    elif resident := _resident():
        found["resident"] = resident
    return found


def _stored(tensors) -> int:
    """Bytes of the storages of this process, each counted once."""
    local = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in local}
    return sum(storages.values())


def _tensors(state: Any):
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, (Mapping, list, tuple)):
        for value in state.values() if isinstance(state, Mapping) else state:
            yield from _tensors(value)


def _resident() -> int:
    """Bytes of the largest resident set of this process so far; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024


def command(words: list[str]) -> str:
    """`sys.argv` as a line for a shell; a key that ends in `token` keeps its value to itself."""
    name = Path(words[0]).name
    shown = [f"{key}=***" if key.lower().endswith("token") and mark else word for word, key, mark in map(_split, words)]
    return shlex.join(["smt" if name in ("smt", "smt_main.py", "cli.py") else name, *shown[1:]])


def _split(word: str) -> tuple[str, str, str]:
    key, mark, _ = word.partition("=")
    return word, key, mark


def kept(file: Path, key: str) -> Any:
    """What an unfinished run has measured before; None where that is not known."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))[key]
    except (OSError, ValueError, KeyError, TypeError):
        return None
