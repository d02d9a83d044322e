"""Merging: base + adapter as a plain checkpoint that anything loads.

Into a checkpoint of floats an adapter is merged as its files lie: shard by shard, one tensor in memory at a time, what
has no blocks copied byte for byte. A merge that changes more than values (onto a quantised base, a head that was tied)
is done by PEFT on the loaded model.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch
import transformers
from peft import PeftModel
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from ..bases.packed import quantization_of
from ..say import say
from .adapter import SavedAdapter, settings_of
from .aside import check_new_directory, directory_aside
from .checkpoint import COMPANIONS, INDEX, Checkpoint, NoShards, Shard, StoredTensor, directory_of
from .dequantised import dequantise_, quantization_config, round_to
from .edits import Edits, NotInPlace
from .head import Head, head_of
from .together import EditsTogether, base_of_all

ONTO = ("checkpoint", "dequantised", "quantised")


@dataclass
class MergeReport:
    """What a merge did to each tensor of the base's checkpoint.

    Args:
        changed: SHA-256 of the tensor's bytes in the base and in the merged file, by name.
        untouched: the one SHA-256 of both.
    """

    changed: dict[str, tuple[str, str]] = field(default_factory=dict)
    untouched: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{len(self.untouched):,} tensors untouched, byte-identical; {len(self.changed):,} changed"

    def save(self, file: str | Path) -> None:
        """Write every hash, as JSON."""
        changed = {name: {"before": before, "after": after} for name, (before, after) in self.changed.items()}
        content = {"hash": "sha256", "changed": changed, "untouched": self.untouched}
        Path(file).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def merge_adapter(
    adapter_dir: str | Path | Sequence[str | Path],
    out_dir: str | Path,
    onto: Literal["checkpoint", "dequantised", "quantised"] = "checkpoint",
) -> MergeReport | None:
    """Write the base model with the adapter merged, and its tokenizer if there is one, as a Transformers checkpoint.

    The base comes from `base_model_name_or_path` in the adapter's `adapter_config.json`. Merged weights are
    base + delta, rounded once. Everything is written aside and renamed at the end.

    Onto a checkpoint of safetensors the merge goes through its files: the output has the same shards, names and dtypes,
    and what is written is read back and hashed. It takes memory for the largest tensor and its blocks.

    Args:
        adapter_dir: where the adapter was saved; or where several were, of one base, that share no weight. They are
            merged as if one after the other; which is first does not matter.
        out_dir: new or empty.
        onto: what the blocks are added to. `"checkpoint"`: the base's own weights, in their own dtype. For an adapter
            that was trained on a quantised base also `"dequantised"`: the weights it was trained on, in the dtype they
            were loaded in, so that the merged model computes what was trained; `"quantised"`: those, quantised anew,
            which rounds: a line says by how much, and how much of the update is left.

    Returns:
        The hashes of all tensors; None where the merge had to build the model in memory, which a line says.

    Raises:
        FileNotFoundError: there is no adapter in `adapter_dir`.
        FileExistsError: `out_dir` exists and is not empty.
        OSError: the disk is full, or cannot be written.
        ValueError: the adapter names no base, or does not fit it; its base cannot be had in the way `onto` asks for;
            a file is damaged; or several adapters change the same weight (module named), train more than blocks, or
            name different bases.
    """
    if onto not in ONTO:
        raise ValueError(f"onto must be one of {', '.join(ONTO)}, got {onto!r}")
    if not isinstance(adapter_dir, (str, Path)):
        adapter_dirs = [Path(each) for each in adapter_dir]
        if len(adapter_dirs) != 1:
            return _merge_together(adapter_dirs, Path(out_dir), onto)
        adapter_dir = adapter_dirs[0]
    adapter_dir, out_dir = Path(adapter_dir), Path(out_dir)
    settings = settings_of(adapter_dir)
    base, record = settings["base_model_name_or_path"], settings.get("base_quantization")
    head = head_of(adapter_dir, settings.get("task_type"))
    # Now, and not when the work is done.
    check_new_directory(out_dir)
    if onto != "checkpoint":
        merged = _onto_quantised(adapter_dir, base, head, record, onto == "dequantised")
        _save(merged, adapter_dir, base, out_dir)
        return None
    if record is not None:
        say(
            "the adapter was trained on a quantised base and is merged into the weights that base was made from; "
            "onto='dequantised' gives exactly the model that was trained"
        )
    try:
        if settings.get("peft_type") != "SMT":
            raise NotInPlace(f"{adapter_dir} is an adapter of {settings.get('peft_type')}, which PEFT merges")
        checkpoint = Checkpoint.open(directory_of(base))
        edits = Edits(SavedAdapter.open(adapter_dir), checkpoint)
    except (NoShards, NotInPlace) as reason:
        say(f"the whole model is loaded for this merge, as {reason}")
        _save(_onto_loaded(adapter_dir, base, head), adapter_dir, base, out_dir)
        return None
    edits.check()
    return _through_the_files(edits, head, adapter_dir, out_dir)


def _merge_together(adapter_dirs: list[Path], out_dir: Path, onto: str) -> MergeReport:
    if onto != "checkpoint":
        raise ValueError(f"onto={onto!r} merges one adapter; merge several onto='checkpoint', the base's own floats")
    if not adapter_dirs:
        raise ValueError("there is no adapter to merge; name the directory of one at least")
    base = base_of_all(adapter_dirs)
    check_new_directory(out_dir)
    try:
        edits = EditsTogether(adapter_dirs, Checkpoint.open(directory_of(base)))
    except (NoShards, NotInPlace) as reason:
        raise ValueError(f"several adapters are merged through the files of a checkpoint, but {reason}") from reason
    edits.check()
    head = head_of(adapter_dirs[0], settings_of(adapter_dirs[0]).get("task_type"))
    return _through_the_files(edits, head, adapter_dirs[0], out_dir)


def load_adapter(adapter_dir: str | Path) -> PeftModel:
    """A saved adapter on the base that it names, in the floats of its checkpoint.

    Raises:
        FileNotFoundError: there is no adapter in `adapter_dir`.
        ValueError: the adapter names no base, or does not fit it.
    """
    settings = settings_of(Path(adapter_dir))
    head = head_of(Path(adapter_dir), settings.get("task_type"))
    return PeftModel.from_pretrained(_load_base(settings["base_model_name_or_path"], head), adapter_dir)


def merged_tensor(edits: Edits | EditsTogether, tensor: StoredTensor) -> Tensor:
    """The values of a stored tensor with the adapter merged, in one dimension."""
    return edits.apply_(tensor.name, tensor.read())


def _through_the_files(edits: Edits | EditsTogether, head: Head, adapter_dir: Path, out_dir: Path) -> MergeReport:
    checkpoint, report = edits.checkpoint, MergeReport()
    with directory_aside(out_dir, checkpoint.nbytes) as aside:
        for name, shard in tqdm(checkpoint.shards.items(), desc="merging", unit="shard", disable=None):
            hashes = _write_shard(shard, aside / name, edits)
            _read_back(Shard.open(aside / name), hashes, report)
        if (checkpoint.directory / INDEX).exists() and len(checkpoint.shards) > 1:
            shutil.copyfile(checkpoint.directory / INDEX, aside / INDEX)
        _copy_companions(checkpoint.directory, aside)
        _name_classes(aside / "config.json", head)
        _save_tokenizer(adapter_dir, aside)
    return report


def _write_shard(shard: Shard, file: Path, edits: Edits | EditsTogether) -> dict[str, tuple[str, str]]:
    """Copy a shard, changed tensors merged. Returns the hash of each tensor's bytes as read and as written."""
    touched, hashes = set(edits.touched), {}
    with file.open("wb") as out:
        out.write(shard.header)
        for tensor in shard.tensors:
            if tensor.name in touched:
                before = tensor.sha256()
                raw = merged_tensor(edits, tensor).view(torch.uint8).numpy().data
                out.write(raw)
                hashes[tensor.name] = before, hashlib.sha256(raw).hexdigest()
            else:
                digest = _copy(tensor, out)
                hashes[tensor.name] = digest, digest
    return hashes


def _copy(tensor: StoredTensor, out: BinaryIO) -> str:
    digest = hashlib.sha256()
    for chunk in tensor.chunks():
        digest.update(chunk)
        out.write(chunk)
    return digest.hexdigest()


def _read_back(written: Shard, hashes: dict[str, tuple[str, str]], report: MergeReport) -> None:
    """Hash what lies on the disk now."""
    for tensor in written.tensors:
        before, expected = hashes[tensor.name]
        after = tensor.sha256()
        if after != expected:
            raise OSError(f"{tensor.name} was not written as it should be into {written.file}; check the disk")
        if before == after:
            report.untouched[tensor.name] = before
        else:
            report.changed[tensor.name] = before, after


def _copy_companions(source: Path, out: Path) -> None:
    """Config, tokenizer and code of the base; not the lists of shards of other formats."""
    for file in source.iterdir():
        wanted = any(fnmatch(file.name, pattern) for pattern in COMPANIONS)
        if wanted and file.is_file() and not fnmatch(file.name, "*.index.json") and "adapter" not in file.name:
            shutil.copyfile(file, out / file.name)


def _name_classes(config: Path, head: Head) -> None:
    if head.labels:
        settings = json.loads(config.read_text(encoding="utf-8"))
        names = {key: value for key, value in head.settings().items() if key != "num_labels"}
        config.write_text(json.dumps(settings | names, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _save_tokenizer(directory: Path | str, out: Path) -> bool:
    """Write the tokenizer that lies in a directory, which may have been changed in training; none is no error."""
    if isinstance(directory, Path) and not (directory / "tokenizer_config.json").is_file():
        return False
    try:
        AutoTokenizer.from_pretrained(directory).save_pretrained(out)
    except (OSError, ValueError, KeyError):
        return False
    return True


def _save(merged: PreTrainedModel, adapter_dir: Path, base: str, out_dir: Path) -> None:
    with directory_aside(out_dir) as aside:
        merged.save_pretrained(aside)
        if not _save_tokenizer(adapter_dir, aside):
            _save_tokenizer(base, aside)


def _onto_loaded(adapter_dir: Path, base: str, head: Head) -> PreTrainedModel:
    model = _load_base(base, head)
    if quantization_of(model) is not None:
        raise ValueError(
            f"the base model {base} is stored quantised, so there are no floats of its own to merge into; use "
            "onto='dequantised' (--onto dequantised) or onto='quantised'"
        )
    return PeftModel.from_pretrained(model, adapter_dir).merge_and_unload(safe_merge=True)


def _onto_quantised(
    adapter_dir: Path, base: str, head: Head, record: dict[str, Any] | None, plain: bool
) -> PreTrainedModel:
    if record is None:
        raise ValueError(
            "the adapter's config has no base_quantization: it was trained on a base of floats; use onto='checkpoint'"
        )
    quantization, dtype = quantization_config(record)
    model = _load_base(base, head, quantization_config=quantization, dtype=dtype)
    dtype = model.config.dtype
    layers = dequantise_(model) if plain else []
    merged = PeftModel.from_pretrained(model, adapter_dir).merge_and_unload(safe_merge=True)
    # After merging, so that base + delta is rounded to the dtype it was trained in, as it was in training.
    round_to(layers, dtype)
    return merged


def _load_base(base: str, head: Head, **settings: Any) -> PreTrainedModel:
    try:
        names = AutoConfig.from_pretrained(base).architectures or []
        # The class the checkpoint was saved from: an Auto class would drop a head it does not know.
        loader = getattr(transformers, names[0], head.auto_class) if names and not head.labels else head.auto_class
        return loader.from_pretrained(base, **{"dtype": "auto", **head.settings(), **settings})
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(
            f"the base model {base}, named in the adapter's base_model_name_or_path, cannot be loaded: {error}"
        ) from error
