"""A model in the hands of one of PyTorch's engines."""

from __future__ import annotations

import torch
import torch.distributed as dist
from peft.utils.other import fsdp_auto_wrap_policy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard


def fsdp1(model: nn.Module, use_orig_params: bool) -> FullyShardedDataParallel:
    """As PEFT asks for: decoder layers in units of their own, and every trainable leaf in one."""
    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=fsdp_auto_wrap_policy(model),
        use_orig_params=use_orig_params,
        device_id=torch.device("cpu"),
    )


def fsdp2(model: nn.Module, **settings) -> nn.Module:
    """Decoder layers one by one, then the rest."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    for layer in inner.model.layers:
        fully_shard(layer, mesh=mesh, **settings)
    return fully_shard(model, mesh=mesh, **settings)
