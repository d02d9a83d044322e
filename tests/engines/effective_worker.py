"""Two processes: the effective update of a model, whole, and again after FSDP2 has sharded it."""

from __future__ import annotations

import torch
import torch.distributed as dist
from helpers import tiny_llama
from peft import get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from smt_peft import SMTConfig
from smt_peft.bases.sharded import is_dtensor
from smt_peft.tuner.delta import SMTBlocks
from smt_peft.tuner.effective import effective_update

if __name__ == "__main__":
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    config = SMTConfig(target_modules="all-linear", block_size=8, density=0.3, score="random")
    model = get_peft_model(tiny_llama().to(torch.bfloat16), config)
    for module in model.modules():
        if isinstance(module, SMTBlocks):
            # Some of it above half a step of bf16, some below.
            module.weight.data = 2e-4 * torch.randn_like(module.weight)
    whole = effective_update(model)
    assert 0 < sum(each.changed for each in whole.values()) < sum(each.moved for each in whole.values())
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(is_dtensor(parameter) for parameter in model.parameters())
    assert effective_update(model) == whole
    dist.destroy_process_group()
