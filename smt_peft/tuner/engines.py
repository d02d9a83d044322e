"""Where an engine shards the model: what the tuner refuses, and that blocks are saved whole, by their plain names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from ..bases.sharded import is_dtensor, plain_name, present
from ..bases.target import Target
from .delta import SMTBlocks
from .low_rank import LowRank

# Dimensions of a mesh over which FSDP2 shards or replicates; a mesh of `fully_shard` itself has no names.
_FSDP_MESH = {"fsdp", "dp", "dp_shard", "dp_replicate", "shard", "replicate"}


class PlainNames:
    """A model whose modules go by the names that its state dict has: those of engines' wrappers are left out.

    PEFT matches keys with module names and takes one wrapper off, the outermost; FSDP wraps layers inside, too.
    """

    def __init__(self, model: nn.Module):
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        for name, module in self._model.named_modules():
            yield plain_name(name), module


def check_whole(targets: Mapping[str, Target], inference_mode: bool) -> None:
    """Refuse layers whose weights are parts, where blocks would be wrong or each process would train its own.

    Raises:
        NotImplementedError: tensor parallelism: the layer computes with its part.
        ValueError: FSDP2: it gathers no parameter that is added later, and sums no gradient of one.
    """
    for name, target in targets.items():
        weight = target.stored
        if not is_dtensor(weight):
            continue
        if set(weight.device_mesh.mesh_dim_names or ()) - _FSDP_MESH:
            raise NotImplementedError(
                f"{name}: the weight is split by tensor parallelism (mesh {weight.device_mesh.mesh_dim_names}), which "
                "SMT does not support; load the model without a tensor-parallel plan and shard it with FSDP2 or ZeRO-3"
            )
        if not inference_mode:
            raise ValueError(
                f"{name}: the weight is sharded already, so the blocks would be left out of what FSDP2 gathers and "
                "reduces; put the adapter in first (get_peft_model), then shard (fully_shard)"
            )


def gather_blocks(tensors: dict[str, Tensor], blocks: Mapping[str, SMTBlocks | LowRank]) -> dict[str, Tensor]:
    """The tensors to save, with every sharded one gathered. Every process must call this where any is sharded.

    Args:
        tensors: by key. Empty: this process is not the one that saves, or there is nothing to save; taken as it is.
        blocks: the modules that must be complete, by the prefix of their keys.

    Raises:
        ValueError: a tensor is missing or is but a part; names the module.
    """
    if not tensors and not _is_saving(blocks):
        return {}
    whole = {key: tensor.full_tensor() if is_dtensor(tensor) else tensor for key, tensor in tensors.items()}
    for name, module in blocks.items():
        partitioned = {f"{name}.{part}": held for part, held in module.named_parameters() if hasattr(held, "ds_id")}
        if any(key in whole and whole[key].numel() == 0 for key in partitioned):
            with present(module):
                whole |= {key: held.detach().clone() for key, held in partitioned.items()}
        for part, shape in module.parts.items():
            found = whole.get(f"{name}.{part}")
            if found is None or tuple(found.shape) != shape:
                had = "nothing" if found is None else f"shape {tuple(found.shape)}"
                raise ValueError(
                    f"{module.name}: the state dict has {had} for {module.kind}.{part}, which is {shape} in full, so "
                    "nothing was saved; the model is sharded: gather the state dict on every process "
                    "(accelerator.get_state_dict(model)) and save with save_pretrained(..., state_dict=it)"
                )
    return whole


def _is_saving(blocks: Mapping[str, SMTBlocks | LowRank]) -> bool:
    """Whether it is this process whose tensors are saved: the first, unless it may not gather what ZeRO-3 has
    partitioned, when Trainer saves an empty adapter, deletes it, and lets DeepSpeed save the parts."""
    first = not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
    return first and not any(hasattr(module.weight, "ds_id") for module in blocks.values())
