"""Kills a run in the middle of what it does to its output directory, in a forked process."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
import yaml
from safetensors.torch import load_file

TIMES = ("elapsed", "runtime", "per_second", "preparation_time")


def forked(function: Callable[[], object], log: Path) -> int:
    """Call it in a process of its own; returns the signal that killed that, or 0. What it prints goes to `log`."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
            function()
            status = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, log.read_text()[-4000:]
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


class Killer:
    """Kills this process at the given one of the changes it makes to the files of a directory.

    What Python opens for writing, renames or removes counts before it is done; files that C++ and Rust write count
    when they are half written.

    Args:
        directory: watched, with all that is in it.
        at: the change that is the last, counted from 1.
        only: count those alone whose path has this in it.
    """

    def __init__(self, directory: Path, at: int, only: str = ""):
        self.directory, self.left, self.only = str(directory), at, only

    def watch(self) -> None:
        """From now on; for as long as this process lives."""
        sys.addaudithook(self._audit)
        torch.save = self._halving(torch.save, 1)
        for module in [module for name, module in sys.modules.items() if name.startswith(("smt_peft", "peft"))]:
            if getattr(module, "save_file", None) is safetensors.torch.save_file:
                module.save_file = self._halving(safetensors.torch.save_file, 1)
            if getattr(module, "safe_save_file", None) is safetensors.torch.save_file:
                module.safe_save_file = self._halving(safetensors.torch.save_file, 1)

    def _audit(self, event: str, arguments: tuple) -> None:
        if event == "open":
            path, mode, flags = arguments
            if isinstance(path, str) and (set(mode or "") & set("wax+") or (flags or 0) & (os.O_WRONLY | os.O_RDWR)):
                self._count(os.path.abspath(path))
        elif event in ("os.mkdir", "os.rename"):
            self._count(" to ".join(os.path.abspath(path) for path in arguments[:2] if not isinstance(path, int)))
        elif event in ("os.remove", "os.rmdir"):
            path, folder = arguments
            self._count(os.path.abspath(path) if folder == -1 else f"{os.readlink(f'/proc/self/fd/{folder}')}/{path}")

    def _halving(self, save: Callable, position: int) -> Callable:
        def halved(*args, **kwargs):
            save(*args, **kwargs)
            path = args[position]
            if self._would_end(os.path.abspath(path)):
                os.truncate(path, os.path.getsize(path) // 2)
            self._count(os.path.abspath(path))

        return halved

    def _would_end(self, path: str) -> bool:
        return self.left == 1 and path.startswith(self.directory) and self.only in path

    def _count(self, path: str) -> None:
        if path.startswith(self.directory) and self.only in path:
            self.left -= 1
            if self.left == 0:
                print(f"killed at {path}", flush=True)
                os.kill(os.getpid(), signal.SIGKILL)


def history(metrics: dict) -> list[dict]:
    """What a run has logged, but for times."""
    return [
        {key: value for key, value in entry.items() if not any(time in key for time in TIMES)}
        for entry in metrics["log_history"]
    ]


def numbers(metrics: dict) -> dict:
    """Every number of `metrics.json` that does not depend on the clock, LoRA's among them."""
    found = {"log": history(metrics), "trainable": metrics["trainable_parameters"]}
    found |= {name: {k: v for k, v in metrics[name].items() if k != "seconds"} for name in ("before", "after")}
    if "lora" in metrics:
        lora = {k: v for k, v in metrics["lora"].items() if k not in ("seconds", "log_history")}
        found["lora"] = {**lora, "log": history(metrics["lora"])}
    return found


def read_everything(directory: Path) -> int:
    """Open every file of a run; returns how many there are.

    Raises:
        Exception: whatever the reader of a damaged file raises.
    """
    readers = {
        ".json": lambda file: json.loads(file.read_text(encoding="utf-8")),
        ".yaml": lambda file: yaml.safe_load(file.read_text(encoding="utf-8")),
        ".safetensors": load_file,
        ".pt": _load,
        ".pth": _load,
        ".bin": _load,
        ".png": _is_png,
    }
    files = [file for file in directory.rglob("*") if file.is_file()]
    for file in files:
        readers.get(file.suffix, lambda file: file.read_text(encoding="utf-8"))(file)
    return len(files)


def _load(file: Path) -> object:
    return torch.load(file, weights_only=False)


def _is_png(file: Path) -> None:
    data = file.read_bytes()
    assert data.startswith(b"\x89PNG") and data.rstrip()[-8:-4] == b"IEND", file
