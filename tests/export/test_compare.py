"""A merged checkpoint is held against base + delta to the byte, wherever its shards are cut."""

from __future__ import annotations

import pytest
import torch
from helpers import tiny_llama
from safetensors.torch import load_file, save_file
from saved import save
from transformers import AutoModelForCausalLM

from smt_peft.export.adapter import SavedAdapter
from smt_peft.export.checkpoint import Checkpoint
from smt_peft.export.compare import compare_merged
from smt_peft.export.edits import Edits
from smt_peft.export.merge import merge_adapter


@pytest.fixture
def ready(tmp_path):
    save(tmp_path, tiny_llama, dtype=torch.bfloat16)
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    return tmp_path


def compared(ready):
    edits = Edits(SavedAdapter.open(ready / "adapter"), Checkpoint.open(ready / "base"))
    return compare_merged(edits, Checkpoint.open(ready / "merged"))


def rewrite(ready, change):
    file = ready / "merged" / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_what_merge_wrote_passes_in_other_shards_too(ready):
    report = compared(ready)
    assert (len(report.untouched), len(report.changed)) == (7, 14)
    model = AutoModelForCausalLM.from_pretrained(ready / "merged", dtype="auto")
    (ready / "merged" / "model.safetensors").unlink()
    model.save_pretrained(ready / "merged", max_shard_size="20KB")
    assert compared(ready) == report


NORM, DOWN = "model.norm.weight", "model.layers.1.mlp.down_proj.weight"


def test_one_bit_in_an_untouched_tensor_is_found(ready):
    rewrite(ready, lambda tensors: tensors[NORM].view(torch.int16)[3].bitwise_xor_(1))
    with pytest.raises(ValueError, match=rf"{NORM} in .* is not the base's, which has no blocks there"):
        compared(ready)


def test_a_tensor_left_as_it_was_is_found(ready):
    base = load_file(ready / "base" / "model.safetensors")
    rewrite(ready, lambda tensors: tensors.update({DOWN: base[DOWN]}))
    with pytest.raises(ValueError, match=rf"{DOWN} in .* is not base \+ delta, rounded once"):
        compared(ready)


def test_another_dtype_is_found(ready):
    rewrite(ready, lambda tensors: tensors.update({NORM: tensors[NORM].float()}))
    with pytest.raises(ValueError, match=rf"{NORM} in .* is not the base's"):
        compared(ready)


def test_tensors_too_few_or_too_many_are_found(ready):
    rewrite(ready, lambda tensors: tensors.pop(NORM))
    with pytest.raises(ValueError, match=rf"{NORM} is in .*base only \(1 such tensors\)"):
        compared(ready)
    rewrite(ready, lambda tensors: tensors.update({NORM: torch.ones(32), "more": torch.ones(1)}))
    with pytest.raises(ValueError, match=r"more is in .*merged only"):
        compared(ready)
