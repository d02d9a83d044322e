"""Is a merged checkpoint base + adapter? Compared tensor by tensor, byte for byte."""

from __future__ import annotations

import hashlib

import torch
from tqdm.auto import tqdm

from .checkpoint import Checkpoint
from .edits import Edits
from .merge import MergeReport, merged_tensor


def compare_merged(edits: Edits, merged: Checkpoint) -> MergeReport:
    """The hashes of every tensor of the base, and of a merged checkpoint when it is what merging anew gives.

    Raises:
        ValueError: the merged checkpoint is not; names the first tensor that differs.
    """
    base, report, touched = edits.checkpoint, MergeReport(), set(edits.touched)
    if other := sorted(base.tensors.keys() ^ merged.tensors.keys()):
        where = base.directory if other[0] in base.tensors else merged.directory
        raise ValueError(f"{other[0]} is in {where} only ({len(other)} such tensors)")
    for name, tensor in tqdm(base.tensors.items(), desc="comparing", unit="tensor", disable=None):
        theirs, before = merged.tensors[name], tensor.sha256()
        expected, after = before, theirs.sha256()
        if name in touched:
            values = merged_tensor(edits, tensor)
            expected = hashlib.sha256(values.view(torch.uint8).numpy().data).hexdigest()
        if (tensor.shape, tensor.dtype, expected) != (theirs.shape, theirs.dtype, after):
            what = "base + delta, rounded once" if name in touched else "the base's, which has no blocks there"
            raise ValueError(f"{name} in {merged.directory} is not {what}")
        if before == after:
            report.untouched[name] = before
        else:
            report.changed[name] = before, after
    return report
