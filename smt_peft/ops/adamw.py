"""AdamW over many tensors in one call, in plain PyTorch: the truth for the compiled backends, and what runs anywhere.

With g the gradient, m and v the moving averages of g and g^2 (Loshchilov & Hutter, arXiv 1711.05101, Alg. 2):

    p <- p (1 - lr weight_decay)    m <- m + (g - m)(1 - beta1)    v <- beta2 v + (1 - beta2) g^2
    p <- p - lr / (1 - beta1^step) * m / (sqrt(v) / sqrt(1 - beta2^step) + eps)

Computed in fp32 (fp64 for fp64 parameters); narrower formats only store. bf16 is rounded stochastically, so that an
update below the spacing of bf16 happens with its probability instead of never. 8-bit moments are codes of a table times
the absolute maximum of every 256 consecutive elements (Dettmers et al., arXiv 2110.02861).

Shape suffix: n elements of a tensor, flat.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

# Consecutive elements that share a scale.
QUANT_BLOCK = 256
PARAM_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
GRAD_DTYPES = (*PARAM_DTYPES, torch.float16)
# What tells apart the random bits of the three tensors that one element is stored in.
_SALT_PARAM, _SALT_AVG, _SALT_SQ = 1, 2, 3
_MASK = 0xFFFFFFFF

Words = TypeVar("Words", int, Tensor)


@torch.no_grad()
def block_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    avg_scales: Sequence[Tensor],
    sq_scales: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    coefficient: Tensor | None = None,
    skip: Tensor | None = None,
    seed: int = 0,
) -> None:
    """One AdamW step of many tensors, in place.

    Args:
        params: fp32, bf16 or fp64, contiguous, all on one device.
        grads: of the same shapes; fp32, bf16, fp16 or fp64, contiguous.
        exp_avgs: m, of the same shapes: fp32 (fp64 for fp64 parameters), bf16, or uint8 codes.
        exp_avg_sqs: v, of the same kind as m.
        avg_scales: fp32 `(ceil(n / 256),)` for 8-bit moments, else empty tensors.
        sq_scales: likewise for v.
        steps: fp32, counting this step already: 1 at the first. A scalar, or `(len(param),)`: one for each block of a
            parameter whose blocks did not all begin at the same time.
        coefficient: fp32 scalar that every gradient is multiplied with: a clip factor, an inverse loss scale.
        skip: fp32 scalar; not zero: nothing is changed.
        seed: of the stochastic rounding; give every call another.

    Raises:
        ValueError: wrong counts, dtypes, shapes, devices, strides or numbers; nothing has been written then.
    """
    check_hyper_parameters(lr, beta1, beta2, eps, weight_decay)
    tensors = (params, grads, exp_avgs, exp_avg_sqs, avg_scales, sq_scales, steps)
    check_tensors(*tensors, coefficient=coefficient, skip=skip)
    for ordinal, (param, grad, exp_avg, exp_avg_sq, avg_scale, sq_scale, step) in enumerate(zip(*tensors, strict=True)):
        wide = torch.promote_types(param.dtype, torch.float32)
        p_n, g_n = param.view(-1).to(wide), grad.view(-1).to(wide)
        m_n, v_n = _load(exp_avg, avg_scale, wide, signed=True), _load(exp_avg_sq, sq_scale, wide, signed=False)
        if coefficient is not None:
            g_n = g_n * coefficient
        m_n = _lerp(m_n, g_n, 1 - beta1)
        v_n = beta2 * v_n + (1 - beta2) * g_n * g_n
        # Powers of numbers this close to 1 need fp64; on the device, so that the host need not wait for it.
        step = step.double()
        denominator_n = v_n.sqrt() / _per_element((1 - beta2**step).sqrt(), v_n) + eps
        p_n = p_n * (1 - lr * weight_decay) - _per_element(lr / (1 - beta1**step), p_n) * (m_n / denominator_n)
        key = _stream(seed, ordinal)
        _store(param, None, p_n, key + _SALT_PARAM, skip)
        _store(exp_avg, avg_scale, m_n, key + _SALT_AVG, skip, signed=True)
        _store(exp_avg_sq, sq_scale, v_n, key + _SALT_SQ, skip, signed=False)


def _per_element(number: Tensor, like_n: Tensor) -> Tensor:
    """A number of every block for each of its elements; one for all blocks stays one."""
    if number.ndim == 0:
        return number
    return number.to(like_n.dtype).repeat_interleave(like_n.numel() // max(1, len(number)))


def _lerp(start: Tensor, end: Tensor, weight: float) -> Tensor:
    """From the nearer end, as torch.lerp does, so that a weight of 1 gives `end` itself; nothing is fused."""
    if weight < 0.5:
        return start + weight * (end - start)
    return end - (end - start) * (1 - weight)


def _load(stored: Tensor, scales: Tensor, wide: torch.dtype, signed: bool) -> Tensor:
    if stored.dtype == torch.uint8:
        return dequantise(stored.view(-1), scales, _code_on(signed, stored.device)).to(wide)
    return stored.view(-1).to(wide)


def _store(
    stored: Tensor, scales: Tensor | None, values_n: Tensor, key: int, skip: Tensor | None, signed: bool = True
) -> None:
    if stored.dtype == torch.uint8:
        values_n, new_scales = quantise(values_n, _code_on(signed, stored.device))
        _write(scales, new_scales, skip)
    elif stored.dtype == torch.bfloat16:
        values_n = _round(values_n.float(), key)
    _write(stored.view(-1), values_n, skip)


def _write(target_n: Tensor, values_n: Tensor, skip: Tensor | None) -> None:
    target_n.copy_(values_n if skip is None else torch.where(skip != 0, target_n, values_n))


def fmix32(words: Words) -> Words:
    """The finaliser of MurmurHash3 (32 bits), on an int or an int64 tensor of values below 2^32."""
    words = words ^ words >> 16
    words = words * 0x85EBCA6B & _MASK
    words = words ^ words >> 13
    words = words * 0xC2B2AE35 & _MASK
    return words ^ words >> 16


def round_stochastically(values_n: Tensor, seed: int, ordinal: int, salt: int) -> Tensor:
    """fp32 to bf16, up or down with the probability that makes the mean right; NaN and infinity are kept.

    16 random bits, a hash of the element's flat index, are added below the last bit that is kept.

    Args:
        values_n: fp32, any shape.
        seed, ordinal, salt: choose the random bits: the call, the tensor in it, and which of its values.
    """
    return _round(values_n.reshape(-1), _stream(seed, ordinal) + salt).view(values_n.shape)


def _stream(seed: int, ordinal: int) -> int:
    return fmix32((seed ^ (ordinal + 1) * 0x9E3779B9) & _MASK)


def _round(values_n: Tensor, key: int) -> Tensor:
    index_n = torch.arange(values_n.numel(), device=values_n.device) & _MASK
    noise_n = fmix32(index_n ^ fmix32(key & _MASK)) >> 16
    # As int32: adding below bit 16 cannot overflow a finite number's bits, and the shift keeps the sign.
    bits_n = (values_n.contiguous().view(torch.int32) + noise_n.to(torch.int32)) >> 16
    rounded_n = bits_n.to(torch.int16).view(torch.bfloat16)
    return torch.where(values_n.isfinite(), rounded_n, values_n.to(torch.bfloat16))


def dynamic_code(signed: bool) -> Tensor:
    """The 256 values that 8 bits stand for, ascending, in fp32: dense near zero, up to 1 in magnitude.

    Dynamic tree quantisation (Dettmers et al., arXiv 2110.02861, section 1.3): e leading zero bits say 10^-e, the next
    set bit ends them, and the rest choose one of equal parts of [0.1, 1], by its middle; two patterns are 0 and 1.

    Unsigned (section 2.2, for v), the bit of the sign is one more bit of that fraction. Other than in the paper there
    is no 0, but one more exponent in its place: where m is not yet 0, a v of 0 leaves m / eps, which is no bound (a
    gradient of 2e-4 of its neighbours' every other step: 200 steps of lr 1e-3 moved 793, in fp32 0.14; 2026-11).
    """
    magnitudes = []
    for exponent in range(7 if signed else 8):
        parts = 2 ** (6 - exponent if signed else 7 - exponent)
        magnitudes += [10.0**-exponent * (0.1 + 0.9 * (part + 0.5) / parts) for part in range(parts)]
    rest = [0.0, *(-magnitude for magnitude in magnitudes)] if signed else []
    return torch.tensor(sorted([*rest, *magnitudes, 1.0]), dtype=torch.float32)


@cache
def _code_on(signed: bool, device: torch.device) -> Tensor:
    return dynamic_code(signed).to(device)


def quantise(values_n: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest code (of two as near, the lower) of every value over the absolute maximum of its 256 neighbours.

    Args:
        values_n: fp32 or fp64, flat.
        code: fp32 `(256,)`, ascending.

    Returns:
        uint8 `(n,)` and the fp32 scales `(ceil(n / 256),)`.
    """
    blocks = F.pad(values_n, (0, -len(values_n) % QUANT_BLOCK)).view(-1, QUANT_BLOCK)
    scales = torch.linalg.vector_norm(blocks, math.inf, dim=1, keepdim=True).float()
    # fp64 holds the middle between two fp32 codes exactly.
    middles = (code[:-1].double() + code[1:].double()) / 2
    codes = torch.bucketize((blocks / torch.where(scales == 0, 1, scales)).double(), middles)
    return codes.view(-1)[: len(values_n)].to(torch.uint8), scales.view(-1)


def dequantise(codes_n: Tensor, scales: Tensor, code: Tensor) -> Tensor:
    """fp32 `(n,)` from what `quantise` returned."""
    return code[codes_n.int()] * scales.repeat_interleave(QUANT_BLOCK)[: len(codes_n)]


def move_blocks_(stored: Tensor, scales: Tensor | None, sources: Tensor, signed: bool) -> None:
    """Rearrange the blocks of a moment in place; see `SMTAdamW.move_blocks`.

    Args:
        stored: `(num_blocks, ...)`, fp32, fp64, bf16, or uint8 codes.
        scales: fp32 `(ceil(n / 256),)` of codes.
        sources: int64 `(num_blocks,)`; -1: zeros.
        signed: whether the codes are.
    """
    if stored.dtype == torch.uint8 and stored[0].numel() % QUANT_BLOCK:
        code = _code_on(signed, stored.device)
        values = dequantise(stored.view(-1), scales, code).view(stored.shape)
        codes_n, new_scales = quantise(_taken(values, sources).view(-1), code)
        stored.view(-1).copy_(codes_n)
        scales.copy_(new_scales)
        return
    stored.copy_(_taken(stored, sources))
    if stored.dtype == torch.uint8:
        scales.copy_(_taken(scales.view(len(stored), -1), sources).view(-1))


def _taken(blocks: Tensor, sources: Tensor) -> Tensor:
    taken = blocks[sources.clamp(min=0)]
    taken[sources < 0] = 0
    return taken


def check_hyper_parameters(lr: float, beta1: float, beta2: float, eps: float, weight_decay: float) -> None:
    """ValueError unless `0 <= beta < 1` and the others are finite and not negative."""
    for name, value in {"lr": lr, "eps": eps, "weight_decay": weight_decay}.items():
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} must be a finite number of at least 0, got {value}")
    for name, value in {"beta1": beta1, "beta2": beta2}.items():
        if not 0 <= value < 1:
            raise ValueError(f"{name} must be at least 0 and below 1, got {value}")


def check_tensors(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    avg_scales: Sequence[Tensor],
    sq_scales: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    coefficient: Tensor | None,
    skip: Tensor | None,
) -> None:
    """ValueError unless these are tensors as `block_adamw_` wants them. Looks at values on a CPU only."""
    lists = {
        "params": params,
        "grads": grads,
        "exp_avgs": exp_avgs,
        "exp_avg_sqs": exp_avg_sqs,
        "avg_scales": avg_scales,
        "sq_scales": sq_scales,
        "steps": steps,
    }
    counts = {name: len(tensors) for name, tensors in lists.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"the lists must be equally long, got {counts}")
    if not params:
        return
    device = params[0].device
    for name, scalar in {"coefficient": coefficient, "skip": skip}.items():
        if scalar is not None:
            _check(name, scalar, (torch.float32,), torch.Size(), device)
    if coefficient is not None and device.type == "cpu" and not coefficient.isfinite():
        raise ValueError(
            f"coefficient is {coefficient.item()}: a gradient is not finite; leave the step out, or pass `skip`"
        )
    for i, (param, exp_avg) in enumerate(zip(params, exp_avgs, strict=True)):
        _check(f"params[{i}]", param, PARAM_DTYPES, param.shape, device)
        _check(f"grads[{i}]", grads[i], GRAD_DTYPES, param.shape, device)
        wide = torch.promote_types(param.dtype, torch.float32)
        _check(f"exp_avgs[{i}]", exp_avg, (wide, torch.bfloat16, torch.uint8), param.shape, device)
        _check(f"exp_avg_sqs[{i}]", exp_avg_sqs[i], (exp_avg.dtype,), param.shape, device)
        scales = torch.Size([-(-param.numel() // QUANT_BLOCK) if exp_avg.dtype == torch.uint8 else 0])
        _check(f"avg_scales[{i}]", avg_scales[i], (torch.float32,), scales, device)
        _check(f"sq_scales[{i}]", sq_scales[i], (torch.float32,), scales, device)
        _check(f"steps[{i}]", steps[i], (torch.float32,), param.shape[:1] if steps[i].ndim else torch.Size(), device)
        if device.type == "cpu" and not (steps[i] >= 1).all():
            raise ValueError(f"steps[{i}] is {steps[i].min().item()}; it counts this step already, so it is at least 1")


def _check(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], shape: torch.Size, device: torch.device) -> None:
    if tensor.layout != torch.strided:
        raise ValueError(f"{name} is {tensor.layout}; block_adamw_ needs dense tensors")
    if tensor.dtype not in dtypes:
        wanted = " or ".join(dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise ValueError(f"{name} must be {wanted}, got {str(tensor.dtype).removeprefix('torch.')}")
    if tensor.shape != shape:
        raise ValueError(f"{name} must have the shape {tuple(shape)}, got {tuple(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device} as params[0] is, got {tensor.device}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got the strides {tensor.stride()}; pass its .contiguous()")
