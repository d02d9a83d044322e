"""Experiments on the operations that move and update blocks: `block_gather`, `block_scatter_`, `block_adamw_`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from .. import ops
from ..blocks import BlockLayout
from ..ops.adamw import dequantise, dynamic_code, quantise
from .backends import ours
from .cases import Size, free
from .measure import Experiment, Route
from .products import slices

NUMBERS = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}
# Bytes read and written per weight: parameter and gradient in fp32, and the two moments in each format.
BYTES = {"float32": 28, "bfloat16": 20, "8bit": 16}
# Tensors that the weights of a model lie in: the linear layers of 32 decoder layers.
MODULES = 224


def block_gather(size: Size, device: torch.device) -> Iterator[Experiment]:
    layout, weight_NK, _, case = _copied(size, device)
    index = layout.blocks.tolist()
    yield Experiment(
        "block_gather",
        case,
        (weight_NK,),
        truth=lambda weight: slices(weight, layout),
        plain=lambda weight: slices(weight, layout),
        routes={
            **ours("block_gather", lambda weight: ops.block_gather(weight, layout), weight_NK, layout),
            "loop over blocks": Route(partial(_gather_loop, index=index, layout=layout)),
        },
        baseline="loop over blocks",
        bytes=2 * layout.effective_numel * weight_NK.element_size(),
        exact=True,
    )


def block_scatter_(size: Size, device: torch.device) -> Iterator[Experiment]:
    layout, weight_NK, packed_Brc, case = _copied(size, device)
    index = layout.blocks.tolist()
    loop = partial(_scatter_loop, index=index, layout=layout)
    yield Experiment(
        "block_scatter_",
        case,
        (weight_NK, packed_Brc),
        truth=loop,
        plain=loop,
        routes={
            **ours(
                "block_scatter_",
                lambda weight, packed: ops.block_scatter_(weight, packed, layout),
                *(weight_NK, packed_Brc, layout),
            ),
            "loop over blocks": Route(loop),
        },
        baseline="loop over blocks",
        bytes=layout.effective_numel * (weight_NK.element_size() + packed_Brc.element_size()),
        exact=True,
    )


def block_adamw_(size: Size, device: torch.device) -> Iterator[Experiment]:
    _, side, count = size.copied
    tensors = 25 if count % 25 == 0 else 1
    packed = [(count // tensors, side, side)] * tensors
    yield _adamw(f"{count} blocks of {side} x {side}", packed, "float32", device, loop=True)
    for moments in ("bfloat16", "8bit"):
        yield _adamw(f"{count} blocks of {side} x {side}, {moments} moments", packed, moments, device)
    for weights in size.weights:
        many = [(weights // MODULES // 4096, 64, 64)] * MODULES
        for moments in BYTES:
            yield _adamw(f"{weights / 1e6:.0f} M weights, {moments} moments", many, moments, device)


def _adamw(case: str, shapes: list[tuple[int, ...]], moments: str, device: torch.device, loop=False) -> Experiment:
    state = _state(shapes, moments, device)
    read = lambda params: params  # noqa: E731
    routes = ours("block_adamw_", _ours, *state[:-2])
    if loop:
        routes["loop over blocks"] = Route(_adamw_loop, read)
    if moments == "float32":
        routes["torch fused"] = Route(_torch_fused, read)
        routes["torch foreach"] = Route(_torch_foreach, read)
    else:
        routes["torch fused"] = routes["torch foreach"] = f"torch.optim.AdamW has no {moments} moments for fp32 weights"
    return Experiment(
        "block_adamw_",
        case,
        state,
        truth=partial(_plain, dtype=torch.float64),
        plain=partial(_plain, dtype=torch.float32),
        routes=routes,
        baseline="loop over blocks" if loop else "torch fused" if moments == "float32" else "smt reference",
        bytes=BYTES[moments] * sum(param.numel() for param in state[0]),
    )


def _ours(params, grads, exp_avgs, exp_avg_sqs, avg_scales, sq_scales, steps, *_) -> list[Tensor]:
    ops.block_adamw_(params, grads, exp_avgs, exp_avg_sqs, avg_scales, sq_scales, steps, **NUMBERS)
    return params


def _torch_fused(params, grads, exp_avgs, exp_avg_sqs, avg_scales, sq_scales, _, counts, host_counts) -> list[Tensor]:
    return _torch_adamw(params, grads, exp_avgs, exp_avg_sqs, counts, fused=True)


def _torch_foreach(params, grads, exp_avgs, exp_avg_sqs, avg_scales, sq_scales, _, counts, host_counts) -> list[Tensor]:
    return _torch_adamw(params, grads, exp_avgs, exp_avg_sqs, host_counts, foreach=True)


def _torch_adamw(params, grads, exp_avgs, exp_avg_sqs, counts, **kind) -> list[Tensor]:
    adamw(params, grads, exp_avgs, exp_avg_sqs, [], counts, **kind, amsgrad=False, maximize=False, **NUMBERS)
    return params


def _plain(params, grads, exp_avgs, exp_avg_sqs, avg_scales, sq_scales, _, counts, host_counts, dtype) -> list[Tensor]:
    """PyTorch's AdamW in a dtype, from the moments that the stored ones stand for."""
    moments = []
    for stored, scales, signed in ((exp_avgs, avg_scales, True), (exp_avg_sqs, sq_scales, False)):
        if stored[0].dtype == torch.uint8:
            code = dynamic_code(signed).to(stored[0].device)
            stored = [dequantise(s.view(-1), c, code).view(s.shape) for s, c in zip(stored, scales, strict=True)]
        moments.append([s.to(dtype) for s in stored])
    params, grads = ([tensor.to(dtype) for tensor in part] for part in (params, grads))
    return _torch_adamw(params, grads, *moments, host_counts, foreach=False)


def _adamw_loop(params, grads, exp_avgs, exp_avg_sqs, avg_scales, sq_scales, _, counts, host_counts) -> list[Tensor]:
    """AdamW written out, one block after the other."""
    lr, beta1, beta2 = NUMBERS["lr"], NUMBERS["beta1"], NUMBERS["beta2"]
    for *tensors, count in zip(params, grads, exp_avgs, exp_avg_sqs, host_counts, strict=True):
        step = float(count) + 1
        rate, root = lr / (1 - beta1**step), (1 - beta2**step) ** 0.5
        for p, g, m, v in zip(*tensors, strict=True):
            p.mul_(1 - lr * NUMBERS["weight_decay"])
            m.lerp_(g, 1 - beta1)
            v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            p.addcdiv_(m, (v.sqrt() / root).add_(NUMBERS["eps"]), value=-rate)
    return params


def _state(shapes: list[tuple[int, ...]], moments: str, device: torch.device) -> tuple:
    """Operands of `block_adamw_` in the middle of a training, and the counts that PyTorch's own advances.

    Its fused kind counts on the device, its others on the host.
    """
    generator = torch.Generator(device).manual_seed(3)
    normal = partial(torch.randn, device=device, generator=generator)
    params, grads = [0.01 * normal(shape) for shape in shapes], [0.1 * normal(shape) for shape in shapes]
    exp_avgs, exp_avg_sqs = [0.05 * normal(shape) for shape in shapes], [0.01 * normal(shape) ** 2 for shape in shapes]
    scales = [[torch.empty(0, device=device) for _ in shapes] for _ in range(2)]
    if moments == "8bit":
        exp_avgs, scales[0] = _quantised(exp_avgs, signed=True)
        exp_avg_sqs, scales[1] = _quantised(exp_avg_sqs, signed=False)
    else:
        dtype = getattr(torch, moments)
        exp_avgs, exp_avg_sqs = ([m.to(dtype) for m in part] for part in (exp_avgs, exp_avg_sqs))
    steps, counts = ([torch.full((), count, device=device) for _ in shapes] for count in (8.0, 7.0))
    return params, grads, exp_avgs, exp_avg_sqs, *scales, steps, counts, [count.cpu() for count in counts]


def _quantised(tensors: list[Tensor], signed: bool) -> tuple[list[Tensor], list[Tensor]]:
    code = dynamic_code(signed).to(tensors[0].device)
    codes, scales = zip(*(quantise(tensor.view(-1), code) for tensor in tensors), strict=True)
    return [c.view(t.shape) for c, t in zip(codes, tensors, strict=True)], list(scales)


def _copied(size: Size, device: torch.device) -> tuple[BlockLayout, Tensor, Tensor, str]:
    """A layout, a matrix (fp32 on a CPU, bf16 elsewhere), packed fp32 blocks for it, and the name of the case."""
    shape, side, count = size.copied
    layout = free(shape, side, count, device)
    weight_NK = torch.randn(shape, device=device).to(torch.float32 if device.type == "cpu" else torch.bfloat16)
    packed_Brc = torch.randn(len(layout), side, side, device=device)
    return layout, weight_NK, packed_Brc, f"{count} blocks of {side} x {side} in {shape[0]} x {shape[1]}"


def _gather_loop(weight_NK: Tensor, index: list[list[int]], layout: BlockLayout) -> Tensor:
    rows, cols = layout.grid.block_shape
    blocks = weight_NK.new_empty(len(index), rows, cols)
    for block, (row, col) in zip(blocks, index, strict=True):
        block.copy_(weight_NK[row * rows : (row + 1) * rows, col * cols : (col + 1) * cols])
    return blocks


def _scatter_loop(weight_NK: Tensor, packed_Brc: Tensor, index: list[list[int]], layout: BlockLayout) -> Tensor:
    rows, cols = layout.grid.block_shape
    for block, (row, col) in zip(packed_Brc, index, strict=True):
        weight_NK[row * rows : (row + 1) * rows, col * cols : (col + 1) * cols].copy_(block)
    return weight_NK
