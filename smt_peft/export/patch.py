"""A patch: the values that merging an adapter changes in a checkpoint, as they were and as they will be.

One safetensors file. For every tensor NAME of the checkpoint that changes: `NAME.index`, the places of the changed
elements counted row by row, sorted, int32 (int64 in a tensor of 2**31 elements and more); `NAME.new` and `NAME.old`,
the values there in the dtype of the checkpoint. Its metadata has, under `smt_patch`, the format's version and per
tensor the dtype, the shape, and the SHA-256 of all its bytes before and after.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from .adapter import SavedAdapter
from .aside import check_new_file, file_aside
from .checkpoint import CHUNK, FLOATS, Checkpoint, NoShards, StoredTensor, directory_of
from .edits import Edits, NotInPlace
from .merge import merged_tensor

VERSION = 1


@dataclass(frozen=True)
class PatchedTensor:
    """One changed tensor.

    Args:
        name: in the checkpoint.
        dtype: as safetensors names it, `"BF16"`.
        shape: its sides.
        before, after: SHA-256 of all its bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    before: str
    after: str


@dataclass(frozen=True)
class Patch:
    """A patch on disk.

    Args:
        file: where it lies.
        sha256: of the file.
        tensors: what it changes.
    """

    file: Path
    sha256: str
    tensors: list[PatchedTensor]

    @classmethod
    def open(cls, file: str | Path) -> Patch:
        """Read what a patch changes, and check all of it.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no patch, is damaged, or holds what cannot be a change; says where.
        """
        file = Path(file)
        if not file.is_file():
            raise FileNotFoundError(f"there is no patch at {file}; smt export ADAPTER {file} --format patch makes one")
        try:
            with safe_open(file, framework="pt") as tensors:
                record = json.loads((tensors.metadata() or {})["smt_patch"])
            if record["version"] != VERSION:
                raise ValueError(f"its format is {record['version']}, this version of smt-peft reads {VERSION}")
            found = [_entry(name, entry) for name, entry in record["tensors"].items()]
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} is no patch, or is damaged ({error!r}); export it again") from error
        patch = cls(file, _sha256(file), found)
        for tensor in found:
            patch.changes(tensor)
        return patch

    def changes(self, tensor: PatchedTensor) -> tuple[Tensor, Tensor, Tensor]:
        """Places, int64 `(n,)`, with the values that were there and that will be.

        Raises:
            ValueError: they are not what they must be; names the tensor.
        """
        try:
            with safe_open(self.file, framework="pt") as tensors:
                index, old, new = (tensors.get_tensor(f"{tensor.name}.{part}") for part in ("index", "old", "new"))
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{self.file}: {tensor.name} is missing or damaged ({error}); export it again") from error
        index = index.long() if index.dtype in (torch.int32, torch.int64) else index
        numel = torch.Size(tensor.shape).numel()
        fits = old.shape == new.shape == index.shape and old.dtype == new.dtype == FLOATS[tensor.dtype]
        sorted_ = index.dtype == torch.int64 and index.ndim == 1 and len(index) > 0 and bool((index.diff() > 0).all())
        if not (fits and sorted_ and index[0] >= 0 and index[-1] < numel and bool(torch.isfinite(new).all())):
            raise ValueError(
                f"{self.file}: the changes of {tensor.name} are damaged: places must be sorted and within its "
                f"{numel} elements, values {tensor.dtype} and finite; export the patch again"
            )
        return index, old, new

    @property
    def num_values(self) -> int:
        with safe_open(self.file, framework="pt") as tensors:
            return sum(tensors.get_slice(f"{tensor.name}.index").get_shape()[0] for tensor in self.tensors)


def export_patch(adapter_dir: str | Path, file: str | Path) -> Patch:
    """Write what merging an adapter changes in its base's checkpoint; takes memory for the patch and one tensor.

    Args:
        adapter_dir: where the adapter was saved.
        file: the patch, which must not exist.

    Raises:
        FileNotFoundError: there is no adapter in `adapter_dir`.
        FileExistsError: `file` exists.
        OSError: the disk is full, or cannot be written.
        ValueError: the adapter does not fit its base, changes nothing in it, or changes more than the values of its
            tensors, so that only a merge can serve it.
    """
    adapter, file = SavedAdapter.open(Path(adapter_dir)), Path(file)
    check_new_file(file)
    if adapter.config.lora_rank is not None:
        raise ValueError(
            f"the adapter in {adapter_dir} has lora_rank={adapter.config.lora_rank}: a low-rank pair changes every "
            "value of its weights, so a patch would be larger than the model; merge it (smt merge), or export it as "
            "LoRA (smt export --format lora)"
        )
    try:
        edits = Edits(adapter, Checkpoint.open(directory_of(adapter.config.base_model_name_or_path)))
    except (NoShards, NotInPlace) as reason:
        raise ValueError(f"there is no patch of {adapter_dir}, as {reason}; merge it: smt merge") from reason
    edits.check()
    content: dict[str, Tensor] = {}
    record: dict[str, Any] = {}
    with file_aside(file) as aside:
        for name in tqdm(edits.touched, desc="exporting", unit="tensor", disable=None):
            tensor = edits.checkpoint.tensors[name]
            old, new = tensor.read(), merged_tensor(edits, tensor)
            bits = _bits(old.dtype)
            index = (old.view(bits) != new.view(bits)).nonzero()[:, 0]
            if len(index) == 0:
                continue
            short = index.to(torch.int32) if tensor.numel < 2**31 else index
            content |= {f"{name}.index": short, f"{name}.old": old[index], f"{name}.new": new[index]}
            record[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "before": _hash(old), "after": _hash(new)}
        if not content:
            raise ValueError(
                f"the adapter in {adapter_dir} changes no value of its base: it was never trained, or its deltas are "
                "below what the base's dtype can hold; there is nothing to patch"
            )
        metadata = {"version": VERSION, "base": adapter.config.base_model_name_or_path, "tensors": record}
        save_file(content, aside, metadata={"smt_patch": json.dumps(metadata)})
    return Patch.open(file)


def stored(patch: Patch, checkpoint: Checkpoint) -> Iterator[tuple[PatchedTensor, StoredTensor]]:
    """The tensors of a patch with those of a checkpoint.

    Raises:
        ValueError: the checkpoint lacks one, or has it in another shape or dtype; names it.
    """
    for tensor in patch.tensors:
        theirs = checkpoint.tensors.get(tensor.name)
        if theirs is None or (theirs.shape, theirs.dtype) != (tensor.shape, tensor.dtype):
            what = "no such tensor" if theirs is None else f"it as {theirs.dtype} {theirs.shape}"
            raise ValueError(
                f"{patch.file} changes {tensor.name}, {tensor.dtype} {tensor.shape}, and {checkpoint.directory} has "
                f"{what}; the patch was made for another model, nothing was written"
            )
        yield tensor, theirs


def _entry(name: str, entry: dict[str, Any]) -> PatchedTensor:
    dtype, shape = entry["dtype"], tuple(entry["shape"])
    if dtype not in FLOATS or not all(isinstance(side, int) and side > 0 for side in shape):
        raise ValueError(f"{name} is {dtype} of shape {shape}")
    return PatchedTensor(name, dtype, shape, str(entry["before"]), str(entry["after"]))


def _bits(dtype: torch.dtype) -> torch.dtype:
    """Compared as integers, so that zeros of different sign differ and NaN equals itself."""
    return {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]


def _hash(values: Tensor) -> str:
    return hashlib.sha256(values.view(torch.uint8).numpy().data).hexdigest()


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while chunk := content.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
