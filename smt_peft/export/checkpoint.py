"""A Transformers checkpoint on disk: its safetensors shards, and where in them the bytes of each tensor lie."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Stands in a checkpoint while a patch is being written into it, and says which.
JOURNAL = "smt_patch.journal"
# What else belongs to a model: its config, its tokenizer, its code.
COMPANIONS = ("*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "*.py")
# Small beside a shard, and large enough that the calls cost nothing beside the hash.
CHUNK = 4 << 20
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class NoShards(ValueError):
    """A checkpoint whose weights are not in safetensors files."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a shard.

    Args:
        name: its key.
        file: the shard.
        dtype: as safetensors names it, `"BF16"`.
        shape: its sides.
        begin, end: its bytes in the file.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def float_dtype(self) -> torch.dtype:
        """Its dtype in PyTorch.

        Raises:
            ValueError: these are no floats of 16 bits or more, so that nothing can be added to them.
        """
        if self.dtype not in FLOATS:
            raise ValueError(
                f"{self.name} is stored as {self.dtype} in {self.file}: the base is quantised, so its checkpoint has "
                "no floats to add the blocks to; use onto='dequantised' (--onto dequantised)"
            )
        return FLOATS[self.dtype]

    def read(self) -> Tensor:
        """Its elements in one dimension, in memory of their own."""
        dtype = self.float_dtype()
        if self.numel == 0:
            return torch.empty(0, dtype=dtype)
        buffer = bytearray(self.end - self.begin)
        with self.file.open("rb") as file:
            file.seek(self.begin)
            if file.readinto(buffer) != len(buffer):
                raise ValueError(f"{self.file} ends before {self.name} does; download or copy it again")
        return torch.frombuffer(buffer, dtype=dtype)

    def at(self, positions: Tensor) -> Tensor:
        """A few of its elements, by their place in one dimension, int64 `(n,)`."""
        dtype = self.float_dtype()
        with self.file.open("rb") as file:
            raw = b"".join(_at(file, self.begin + place * dtype.itemsize, dtype.itemsize) for place in positions)
        return torch.frombuffer(bytearray(raw), dtype=dtype) if raw else torch.empty(0, dtype=dtype)

    def sha256(self) -> str:
        """Hash of its bytes."""
        digest = hashlib.sha256()
        for chunk in self.chunks():
            digest.update(chunk)
        return digest.hexdigest()

    def chunks(self) -> Iterator[bytes]:
        """Its bytes, piece by piece."""
        with self.file.open("rb") as file:
            file.seek(self.begin)
            for start in range(self.begin, self.end, CHUNK):
                yield file.read(min(CHUNK, self.end - start))


def _at(file: BinaryIO, place: int, size: int) -> bytes:
    file.seek(int(place))
    return file.read(size)


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its header, and its tensors in the order of their bytes."""

    file: Path
    header: bytes
    tensors: list[StoredTensor]

    @classmethod
    def open(cls, file: Path) -> Shard:
        """Read and check the header.

        Raises:
            ValueError: the file is missing, or is no whole safetensors file; names it.
        """
        try:
            # Checks that every tensor has its bytes, and that there are no others.
            with safe_open(file, framework="pt"), file.open("rb") as raw:
                length = int.from_bytes(raw.read(8), "little")
                header = raw.read(length)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file} cannot be read ({error}); download or copy it again") from error
        entries = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
        tensors = [
            StoredTensor(
                name,
                file,
                entry["dtype"],
                tuple(entry["shape"]),
                8 + length + entry["data_offsets"][0],
                8 + length + entry["data_offsets"][1],
            )
            for name, entry in entries.items()
        ]
        tensors.sort(key=lambda tensor: (tensor.begin, tensor.end))
        return cls(file, length.to_bytes(8, "little") + header, tensors)


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a model in a directory.

    Args:
        directory: where they lie.
        shards: by file name.
        tensors: every tensor by name.
    """

    directory: Path
    shards: dict[str, Shard]
    tensors: dict[str, StoredTensor] = field(default_factory=dict)

    @classmethod
    def open(cls, directory: Path, journal: bool = False) -> Checkpoint:
        """Read the headers of all shards.

        Args:
            directory: of the checkpoint.
            journal: whether one may be open that a patch is half written into.

        Raises:
            NoShards: there is no safetensors file.
            ValueError: a shard is missing or damaged, a tensor is in none or in two, or a patch is half written.
        """
        if (directory / JOURNAL).exists() and not journal:
            raise ValueError(
                f"a patch was being written into {directory} when its process ended: run smt patch apply or smt patch "
                f"revert again with the patch that {directory / JOURNAL} names"
            )
        listed: dict[str, str] = {}
        if (directory / SINGLE).exists() or not (directory / INDEX).exists():
            if not (directory / SINGLE).exists():
                raise NoShards(f"{directory} has neither {SINGLE} nor {INDEX}")
            files = [SINGLE]
        else:
            listed = _weight_map(directory / INDEX)
            files = sorted(set(listed.values()))
        shards = {name: Shard.open(directory / name) for name in files}
        checkpoint = cls(directory, shards)
        for shard in shards.values():
            for tensor in shard.tensors:
                if tensor.name in checkpoint.tensors:
                    raise ValueError(f"{tensor.name} is in two shards of {directory}; download or save it again")
                checkpoint.tensors[tensor.name] = tensor
        if absent := [name for name in listed if name not in checkpoint.tensors]:
            raise ValueError(
                f"{directory / INDEX} names {absent[0]} in {listed[absent[0]]}, which has no such tensor; download or "
                "save the checkpoint again"
            )
        return checkpoint

    @property
    def nbytes(self) -> int:
        return sum(shard.file.stat().st_size for shard in self.shards.values())


def _weight_map(file: Path) -> dict[str, str]:
    try:
        listed = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
        # A name with a directory in it would lead out of the checkpoint.
        if not all(isinstance(name, str) and Path(name).name == name for name in listed.values()):
            raise ValueError("a shard is named by more than a file name")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is damaged ({error}); download or save the checkpoint again") from error
    return listed


def directory_of(name: str) -> Path:
    """The directory of a checkpoint: itself, or where the Hub's cache keeps it, downloaded if need be.

    Raises:
        ValueError: it is no directory, and the Hub has no such model or cannot be reached.
    """
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", *COMPANIONS]))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the base model {name}, named in the adapter's base_model_name_or_path, cannot be loaded: {error}"
        ) from error
