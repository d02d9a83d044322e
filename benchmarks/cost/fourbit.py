"""The same over a base whose linear layers are packed to four bits (bitsandbytes, nf4): SMT's overlay and QLoRA.

Ratios are to the frozen pass through the packed model, which dequantises as well; the model in floats stands beside it.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from importlib.util import find_spec

import torch
from torch import nn

from . import methods
from .methods import Method, equal_rank, lora, smt
from .model import Case, checkpointed
from .result import Result
from .step import compare

ABSENT = "bitsandbytes is not installed; `make cost` brings it"


def suite(result: Result, case: Case, rounds: int, warmup: int) -> None:
    for point, variant in (("nf4", case), ("nf4, checkpointed", replace(case, checkpointing=True))):
        if find_spec("bitsandbytes") is None:
            result.add(point, [{"method": "all", "reason": ABSENT}])
        elif not result.has(point):
            result.add(point, compare(four_bit_methods(variant), variant, rounds, warmup, partial(packed, variant)))


def four_bit_methods(case: Case) -> dict[str, Method]:
    rank = equal_rank(case.build(), case.density, case.targets)
    return {
        "frozen": methods.frozen(),
        "frozen, in floats": replace(methods.frozen(), build=case.build),
        "smt matched": smt(case.density, case.targets),
        "smt clustered": smt(case.density, case.targets, **methods.large_blocks(case)),
        f"qlora r{rank}, equal parameters": lora(rank, case.targets),
        "qlora r16": lora(16, case.targets),
    }


def packed(case: Case) -> nn.Module:
    """The model of the case, its decoder's linear layers in nf4 with absmax in fp32; it computes in fp32."""
    import bitsandbytes as bnb

    model = case.build()
    for owner in list(model.model.modules()):
        for name, child in list(owner.named_children()):
            if type(child) is nn.Linear:
                setattr(owner, name, _packed_linear(child, bnb))
    return checkpointed(model, case.checkpointing).requires_grad_(False).train()


def _packed_linear(linear: nn.Linear, bnb) -> nn.Module:
    settings = {"quant_type": "nf4", "compress_statistics": False}
    layer = bnb.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=False, compute_dtype=torch.float32, **settings
    )
    layer.weight = bnb.nn.Params4bit(linear.weight.detach(), requires_grad=False, module=layer, **settings).to("cpu")
    return layer
