"""AdamW in plain PyTorch: its step against `torch.optim.AdamW`, its narrow formats against the definition."""

from __future__ import annotations

import math
import struct

import pytest
import torch
from helpers import assert_no_worse_than_torch
from hypothesis import given
from hypothesis import strategies as st

from smt_peft.ops.adamw import block_adamw_, dequantise, dynamic_code, quantise, round_stochastically

NUMBERS = {"lr": 3e-3, "beta1": 0.9, "beta2": 0.99, "eps": 1e-6, "weight_decay": 0.1}
KINDS = ["float32", "bfloat16", "uint8"]
NAMES = ("params", "grads", "exp_avgs", "exp_avg_sqs", "avg_scales", "sq_scales", "steps")
SHAPES = [(3, 8, 8), (5,), (), (2, 300), (0, 4)]


def tensors(shapes=SHAPES, dtype=torch.float32, moments="float32", step=7.0) -> dict[str, list]:
    """Arguments in the middle of a training: moments that are not zero."""
    given = {name: [] for name in NAMES}
    for shape in shapes:
        given["params"].append(torch.randn(shape).to(dtype))
        given["grads"].append(torch.randn(shape).to(dtype))
        for name, scale, values, signed in (
            ("exp_avgs", "avg_scales", torch.randn(shape) * 0.3, True),
            ("exp_avg_sqs", "sq_scales", torch.rand(shape), False),
        ):
            scales = torch.empty(0)
            if moments == "uint8":
                codes, scales = quantise(values.view(-1), dynamic_code(signed))
                values = codes.view(shape)
            elif moments == "bfloat16":
                values = values.bfloat16()
            else:
                values = values.to(torch.promote_types(dtype, torch.float32))
            given[name].append(values)
            given[scale].append(scales)
        given["steps"].append(torch.tensor(step))
    return given


def cloned(given: dict[str, list]) -> dict[str, list]:
    return {name: [tensor.clone() for tensor in tensors] for name, tensors in given.items()}


def same(left: dict[str, list], right: dict[str, list]) -> bool:
    return all(torch.equal(a, b) for name in left for a, b in zip(left[name], right[name], strict=True))


def moments_of(given: dict[str, list], name: str, scales: str) -> list[torch.Tensor]:
    code = dynamic_code(name == "exp_avgs")
    return [
        dequantise(stored.view(-1), scale, code).view(stored.shape) if stored.dtype == torch.uint8 else stored
        for stored, scale in zip(given[name], given[scales], strict=True)
    ]


def torch_step(given: dict[str, list], dtype: torch.dtype, coefficient: float = 1.0) -> dict[str, torch.Tensor]:
    """PyTorch's own step in `dtype` from the same state; every kind of tensor flat, of all tensors together."""
    params = [torch.nn.Parameter(param.to(dtype)) for param in given["params"]]
    adamw = torch.optim.AdamW(
        params,
        lr=NUMBERS["lr"],
        betas=(NUMBERS["beta1"], NUMBERS["beta2"]),
        eps=NUMBERS["eps"],
        weight_decay=NUMBERS["weight_decay"],
    )
    averages, squares = moments_of(given, "exp_avgs", "avg_scales"), moments_of(given, "exp_avg_sqs", "sq_scales")
    for i, param in enumerate(params):
        param.grad = given["grads"][i].to(dtype) * coefficient
        adamw.state[param] = {
            "step": given["steps"][i] - 1,
            "exp_avg": averages[i].to(dtype, copy=True),
            "exp_avg_sq": squares[i].to(dtype, copy=True),
        }
    adamw.step()
    return {
        "params": flat(params),
        "exp_avgs": flat([adamw.state[param]["exp_avg"] for param in params]),
        "exp_avg_sqs": flat([adamw.state[param]["exp_avg_sq"] for param in params]),
    }


def flat(tensors) -> torch.Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


@given(
    shapes=st.lists(st.lists(st.integers(0, 20), max_size=3).map(tuple), min_size=1, max_size=4),
    step=st.integers(1, 10_000),
    coefficient=st.sampled_from([None, 0.25, 1.7]),
)
def test_a_step_is_that_of_torch(shapes, step, coefficient):
    torch.manual_seed(step)
    before = tensors([*shapes, (64,)], step=float(step))
    after = cloned(before)
    block_adamw_(**after, **NUMBERS, coefficient=None if coefficient is None else torch.tensor(coefficient))
    truth = torch_step(before, torch.float64, coefficient or 1.0)
    theirs = torch_step(before, torch.float32, coefficient or 1.0)
    for name in truth:
        assert_no_worse_than_torch(flat(after[name]), theirs[name], truth[name])
    assert same({name: after[name] for name in ("grads", "steps")}, before)


def test_fp64_stays_fp64():
    before = tensors(dtype=torch.float64)
    after = cloned(before)
    block_adamw_(**after, **NUMBERS)
    truth = torch_step(before, torch.float64)
    for name in truth:
        torch.testing.assert_close(flat(after[name]), truth[name], rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("moments", ["bfloat16", "uint8"])
def test_narrow_moments_are_rounded_after_the_update_not_before(moments):
    """The parameters are those of an fp32 step from the same moments; only what is stored of the moments is rounded."""
    before = tensors(moments=moments)
    after = cloned(before)
    block_adamw_(**after, **NUMBERS)
    truth, theirs = torch_step(before, torch.float64), torch_step(before, torch.float32)
    assert_no_worse_than_torch(flat(after["params"]), theirs["params"], truth["params"])
    for name, scales in (("exp_avgs", "avg_scales"), ("exp_avg_sqs", "sq_scales")):
        start = 0
        for i, got in enumerate(moments_of(after, name, scales)):
            want = truth[name][start : start + got.numel()].float()
            start += got.numel()
            if moments == "bfloat16":
                spacing = torch.finfo(torch.bfloat16).eps * want.abs()
                assert ((got.view(-1) - want).abs() <= spacing * 1.001).all()
            else:
                codes, scale = quantise(want, dynamic_code(name == "exp_avgs"))
                torch.testing.assert_close(after[scales][i], scale, rtol=1e-6, atol=0)
                # A rounding error of the fp32 step may lie across the middle between two codes.
                apart = (after[name][i].view(-1).int() - codes.int()).abs()
                assert (apart <= 1).all() and (apart > 0).sum() <= 0.01 * len(apart)


@pytest.mark.parametrize("moments", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_skip_changes_nothing_and_zero_is_no_skip(dtype, moments):
    before = tensors(dtype=dtype, moments=moments)
    skipped, done, plain = cloned(before), cloned(before), cloned(before)
    skipped["grads"][0].fill_(math.nan)
    before["grads"][0].fill_(math.nan)
    block_adamw_(**skipped, **NUMBERS, skip=torch.tensor(1.0))
    block_adamw_(**done, **NUMBERS, skip=torch.tensor(0.0))
    block_adamw_(**plain, **NUMBERS)
    del skipped["grads"], before["grads"]
    assert same(skipped, before)
    assert same(done, plain) and not same({"params": plain["params"]}, before)


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_gradients_of_any_float_dtype(grad_dtype):
    before = tensors()
    before["grads"] = [grad.to(grad_dtype) for grad in before["grads"]]
    after, wide = cloned(before), cloned(before)
    wide["grads"] = [grad.float() for grad in wide["grads"]]
    block_adamw_(**after, **NUMBERS)
    block_adamw_(**wide, **NUMBERS)
    assert same({name: after[name] for name in NAMES if name != "grads"}, wide)


@pytest.mark.parametrize("moments", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_stays_exactly_zero(dtype, moments):
    """Zero weights whose gradients were always zero, beside others that train."""
    given = tensors([(4, 300)], dtype, moments, step=1.0)
    for name in ("exp_avgs", "exp_avg_sqs", "avg_scales", "sq_scales"):
        given[name][0].zero_()
    padding = torch.zeros(4, 300, dtype=torch.bool)
    padding[1:, 200:] = True
    padding[3] = True
    for name in ("params", "grads"):
        given[name][0][padding] = 0
    for step in range(1, 30):
        given["steps"][0].fill_(step)
        block_adamw_(**given, **NUMBERS, seed=step)
    assert (given["params"][0][padding] == 0).all()
    assert (moments_of(given, "exp_avgs", "avg_scales")[0][padding] == 0).all()
    # The 8-bit code of v has no 0, so padding that shares a scale with weights has the smallest.
    assert (moments_of(given, "exp_avg_sqs", "sq_scales")[0][padding] <= (1e-6 if moments == "uint8" else 0)).all()
    assert (given["params"][0][~padding] != 0).all()


def hashed(word: int) -> int:
    """The finaliser of MurmurHash3, written out."""
    word ^= word >> 16
    word = word * 0x85EBCA6B % 2**32
    word ^= word >> 13
    word = word * 0xC2B2AE35 % 2**32
    return word ^ (word >> 16)


def test_the_finaliser_of_murmurhash3():
    assert hashed(0) == 0 and hashed(1) == 0x514E28B7


@pytest.mark.parametrize(("seed", "ordinal", "salt"), [(0, 0, 1), (1, 41, 2), (2**31 + 5, 3, 3), (-7, 10**6, 1)])
def test_the_random_bits_are_the_documented_hash(seed, ordinal, salt):
    values = torch.randn(500) * torch.logspace(-38, 37, 500)
    key = hashed((hashed(seed % 2**32 ^ (ordinal + 1) * 0x9E3779B9 % 2**32) + salt) % 2**32)
    expected = []
    for index, value in enumerate(values.tolist()):
        bits = struct.unpack("<I", struct.pack("<f", value))[0]
        kept = (bits + (hashed(index ^ key) >> 16)) >> 16 << 16
        expected.append(struct.unpack("<f", struct.pack("<I", kept))[0])
    got = round_stochastically(values, seed, ordinal, salt)
    assert got.dtype == torch.bfloat16 and got.float().tolist() == expected


def test_stochastic_rounding_is_right_in_the_mean():
    spacing = 2.0**-7
    for share in (0.01, 0.25, 0.9):
        values = torch.full((1 << 16,), 1 + share * spacing)
        for sign in (1, -1):
            rounded = round_stochastically(sign * values, 3, 0, 1).float() * sign
            assert set(rounded.tolist()) == {1.0, 1 + spacing}
            deviation = math.sqrt(share * (1 - share) / len(values)) * spacing
            assert abs(rounded.double().mean() - values[0].double()) < 5 * deviation


def test_what_bf16_can_hold_is_not_changed():
    values = torch.cat([torch.randn(4096), torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan])]).bfloat16()
    rounded = round_stochastically(values.float(), 0, 0, 1)
    assert torch.equal(rounded.view(torch.int16), values.view(torch.int16))


def test_the_seed_the_ordinal_and_the_salt_each_change_the_bits():
    values = torch.randn(4096)
    rounded = [round_stochastically(values, *key) for key in [(0, 0, 1), (0, 0, 1), (1, 0, 1), (0, 1, 1), (0, 0, 2)]]
    assert torch.equal(rounded[0], rounded[1])
    assert all(0.2 < (rounded[0] != other).float().mean() < 0.8 for other in rounded[2:])


@pytest.mark.parametrize("signed", [True, False])
def test_the_code_is_the_papers(signed):
    code = dynamic_code(signed)
    assert code.dtype == torch.float32 and len(code) == 256
    assert (code[1:] > code[:-1]).all() and code[-1] == 1
    positive = code[(code > 0) & (code < 1)]
    rest = [-positive.flip(0), torch.zeros(1)] if signed else []
    assert torch.equal(code, torch.cat([*rest, positive, torch.ones(1)]))
    # Each decade has twice the values of the one below, evenly over [0.1, 1] of its power of ten.
    decades = torch.bucketize(positive.double(), 10.0 ** torch.arange(-6 if signed else -7, 1).double())
    assert decades.bincount().tolist() == [2**e for e in range(7 if signed else 8)]
    top = positive[positive > 0.1].double()
    step = 0.9 / len(top)
    torch.testing.assert_close(top, 0.1 + step * (torch.arange(len(top)).double() + 0.5), rtol=1e-6, atol=0)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("n", [0, 1, 255, 256, 257, 1000])
def test_quantising_takes_the_nearest_code_of_every_256(signed, n):
    code = dynamic_code(signed)
    values = torch.randn(n) * torch.logspace(-6, 3, n)
    values = values if signed else values.abs()
    values[100:140] = 0
    codes, scales = quantise(values, code)
    assert codes.dtype == torch.uint8 and codes.shape == (n,)
    assert scales.shape == (math.ceil(n / 256),) and scales.dtype == torch.float32
    for part, scale in zip(values.split(256) if n else (), scales, strict=True):
        assert scale == part.abs().max()
    each = scales.repeat_interleave(256)[:n]
    distance = ((values / each).double()[:, None] - code.double()).abs()
    assert torch.equal(codes.long(), distance.argmin(1))
    assert torch.equal(dequantise(codes, scales, code), code[codes.long()] * each)


def test_a_gradient_far_smaller_than_its_neighbours_does_not_blow_up_in_8_bits():
    """Its v is below all codes while its m is not: with a v of 0 the update would be m / eps."""
    given = tensors([(256,)], moments="uint8")
    for name in ("params", "exp_avgs", "exp_avg_sqs", "avg_scales", "sq_scales"):
        given[name][0].zero_()
    exact = tensors([(256,)])
    for name in ("params", "exp_avgs", "exp_avg_sqs"):
        exact[name][0].zero_()
    sizes = torch.logspace(0, -8, 256)
    for step in range(1, 101):
        for arguments in (given, exact):
            arguments["steps"][0].fill_(step)
            arguments["grads"][0].copy_(sizes * (step % 2))
            block_adamw_(**arguments, **NUMBERS | {"eps": 1e-12})
    assert (given["params"][0].abs() <= 2 * exact["params"][0].abs()).all()


def test_a_tie_takes_the_lower_code_and_zeros_stay_zero():
    code = torch.arange(-128, 128) / 128
    codes, scales = quantise(torch.tensor([1.0, 2.5 / 128, -2.5 / 128]), code)
    assert code[codes.long()].mul(128).tolist() == [127, 2, -3] and scales.tolist() == [1.0]
    codes, scales = quantise(torch.zeros(300), dynamic_code(True))
    assert (dequantise(codes, scales, dynamic_code(True)) == 0).all() and scales.tolist() == [0, 0]


def test_every_code_is_itself():
    for signed in (True, False):
        code = dynamic_code(signed)
        codes, scales = quantise(code, code)
        assert codes.tolist() == list(range(256)) and scales.tolist() == [1.0]


def test_memory_that_nobody_wrote_is_not_read(poisoned):
    for moments in KINDS:
        given = tensors(dtype=torch.bfloat16, moments=moments)
        block_adamw_(**given, **NUMBERS)
        assert all(torch.isfinite(tensor).all() for name in NAMES for tensor in given[name])


def test_no_tensors_are_fine():
    block_adamw_(**{name: [] for name in NAMES}, **NUMBERS)


def replaced(name: str, change):
    """Arguments whose last tensor of a list is another: what comes before must not be written either."""

    def apply(given, options):
        given[name][-1] = change(given[name][-1])

    return apply


def option(**values):
    return lambda given, options: options.update(values)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (option(lr=math.nan), "lr must be a finite number of at least 0, got nan"),
        (option(lr=-1.0), "lr must be a finite"),
        (option(weight_decay=math.inf), "weight_decay must be a finite"),
        (option(eps=-1e-8), "eps must be a finite"),
        (option(beta1=1.0), "beta1 must be at least 0 and below 1, got 1.0"),
        (option(beta2=math.nan), "beta2 must be at least 0 and below 1, got nan"),
        (option(coefficient=torch.tensor(math.nan)), "coefficient is nan"),
        (option(coefficient=torch.tensor(math.inf)), "coefficient is inf"),
        (option(coefficient=torch.tensor([1.0])), r"coefficient must have the shape \(\), got \(1,\)"),
        (option(skip=torch.tensor(1)), "skip must be float32, got int64"),
        (option(skip=torch.tensor(1.0, device="meta")), "skip must be on cpu as params.0. is, got meta"),
        (lambda given, options: given["grads"].pop(), "the lists must be equally long.*'grads': 1"),
        (replaced("params", torch.Tensor.half), r"params\[1\] must be float32 or bfloat16 or float64, got float16"),
        (replaced("params", torch.Tensor.t), r"params\[1\] must be contiguous, got the strides \(1, 300\)"),
        (replaced("grads", torch.Tensor.int), r"grads\[1\] must be float32 or .*, got int32"),
        (replaced("grads", torch.Tensor.to_sparse), r"grads\[1\] is torch.sparse_coo"),
        (replaced("grads", lambda grad: grad[:1]), r"grads\[1\] must have the shape \(2, 300\), got \(1, 300\)"),
        (replaced("grads", lambda grad: grad[:1].expand(2, 300)), r"grads\[1\] must be contiguous"),
        (replaced("grads", lambda grad: grad.to("meta")), r"grads\[1\] must be on cpu .* got meta"),
        (replaced("exp_avgs", torch.Tensor.double), r"exp_avgs\[1\] must be float32 or bfloat16 or uint8, got float64"),
        (replaced("exp_avg_sqs", torch.Tensor.bfloat16), r"exp_avg_sqs\[1\] must be float32, got bfloat16"),
        (
            replaced("avg_scales", lambda scale: torch.ones(3)),
            r"avg_scales\[1\] must have the shape \(0,\), got \(3,\)",
        ),
        (replaced("steps", torch.Tensor.double), r"steps\[1\] must be float32"),
        (replaced("steps", torch.zeros_like), r"steps\[1\] is 0.0; it counts this step already"),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(spoil, message):
    given, options = tensors([(5,), (2, 300)]), dict(NUMBERS)
    spoil(given, options)
    kept = {name: list(given[name]) for name in NAMES}
    before = {name: [tensor.clone() for tensor in kept[name] if tensor.device.type != "meta"] for name in NAMES}
    with pytest.raises(ValueError, match=message):
        block_adamw_(**given, **options)
    after = {name: [tensor for tensor in kept[name] if tensor.device.type != "meta"] for name in NAMES}
    for name in NAMES:
        for left, right in zip(after[name], before[name], strict=True):
            assert torch.equal(left.to_dense(), right.to_dense())


def test_8bit_scales_of_the_wrong_size_are_an_error():
    given = tensors([(2, 300)], moments="uint8")
    given["sq_scales"][0] = given["sq_scales"][0][:2].clone()
    with pytest.raises(ValueError, match=r"sq_scales\[0\] must have the shape \(3,\), got \(2,\)"):
        block_adamw_(**given, **NUMBERS)


@pytest.mark.parametrize("moments", KINDS)
def test_blocks_that_count_their_steps_apart_take_steps_of_their_own(moments):
    """Each as if it were alone with its step; with 8 bits where its elements share a scale with no other block."""
    before = tensors([(4, 16, 16), (3, 32, 8)], moments=moments)
    counts = [torch.tensor([1.0, 9.0, 9.0, 200.0]), torch.tensor([7.0, 1.0, 2.0])]
    together = cloned(before) | {"steps": [count.clone() for count in counts]}
    block_adamw_(**together, **NUMBERS)
    for i, count in enumerate(counts):
        for block, step in enumerate(count.tolist()):
            alone = {name: [before[name][i][block].clone()] for name in NAMES[:4]}
            for name in ("avg_scales", "sq_scales"):
                scales = before[name][i]
                alone[name] = [scales[block : block + 1].clone() if len(scales) else scales]
            alone["steps"] = [torch.tensor(step)]
            truth, theirs = torch_step(alone, torch.float64), torch_step(alone, torch.float32)
            assert_no_worse_than_torch(together["params"][i][block].reshape(-1), theirs["params"], truth["params"])


@pytest.mark.parametrize(("steps", "message"), [([1.0, 2.0], r"shape \(3,\), got \(2,\)"), ([1.0, 0.0, 1.0], "is 0.0")])
def test_steps_by_block_that_cannot_be_are_refused(steps, message):
    given = tensors([(3, 8, 8)]) | {"steps": [torch.tensor(steps)]}
    with pytest.raises(ValueError, match=rf"steps\[0\].*{message}"):
        block_adamw_(**given, **NUMBERS)
