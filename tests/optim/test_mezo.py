"""`MeZO` against Algorithm 1 with stored noise, and what it promises of seeds, memory, padding and restoring."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from helpers import Mlp, assert_no_worse_than_torch
from peft import get_peft_model
from torch import Tensor, nn

from smt_peft import SMTConfig
from smt_peft.optim import MeZO
from smt_peft.tuner.delta import SMTBlocks
from smt_peft.tuner.padding import padding_masks

SHAPES = [(6, 8, 8), (37, 5), (300,), ()]
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def parameters(dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype)) for shape in SHAPES]


def loss_of(params: list[Tensor], part: float = 1.0) -> Tensor:
    """Smooth, and of another curvature in every parameter."""
    return part * sum((i + 1) * torch.sin(param.double()).square().sum() for i, param in enumerate(params))


def equal(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def adapted() -> tuple[nn.Module, list[SMTBlocks]]:
    """Layers of 36 x 20 and 12 x 36 in blocks of 8, which tile neither."""
    torch.manual_seed(0)
    config = SMTConfig(target_modules=["up", "down"], block_size=8, density=0.5, score="random")
    model = get_peft_model(Mlp(), config)
    return model, [module for module in model.modules() if isinstance(module, SMTBlocks)]


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_are_those_of_algorithm_1_with_stored_noise(dtype, samples):
    ours, eps, lr, decay = parameters(dtype), 1e-2, 2e-4, 0.3
    optimizer = MeZO(ours, lr, eps, decay, samples=samples, seed=5)
    for _ in range(4):
        stored = [[optimizer.noise(i, sample).double() for i in range(len(ours))] for sample in range(samples)]
        starts = [param.detach().double() for param in ours]
        truth = [start * (1 - lr * decay) for start in starts]
        same = [param.detach() * (1 - lr * decay) for param in ours]
        losses = []
        for noise in stored:
            # Displaced in their own dtype, so that the losses can be the same to the last bit.
            sides = [
                loss_of(
                    [torch.add(param.detach(), z.to(dtype), alpha=side) for param, z in zip(ours, noise, strict=True)]
                )
                for side in (eps, -eps)
            ]
            losses += sides
            gradient = (sides[0] - sides[1]) / (2 * eps)
            truth = [t - lr / samples * gradient * z for t, z in zip(truth, noise, strict=True)]
            same = [s - (lr / samples * gradient).to(dtype) * z.to(dtype) for s, z in zip(same, noise, strict=True)]
        loss = optimizer.step(lambda: loss_of(ours))
        assert loss.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-12)
        for param, other, expected in zip(ours, same, truth, strict=True):
            assert_no_worse_than_torch(param.detach(), other, expected)
    assert not equal(ours, parameters(dtype))


def test_the_mean_estimate_is_the_gradient():
    """Of a quadratic, where the difference is exact: |mean of N estimates - gradient|^2 is (d + 1) / N of its square in
    the mean, which of Gaussian directions is the variance."""
    torch.manual_seed(0)
    matrix = torch.randn(20, 20, dtype=torch.float64)
    matrix, start = matrix @ matrix.T, torch.randn(20, dtype=torch.float64)
    param, samples = nn.Parameter(start.clone()), 4000
    MeZO([param], lr=1.0, samples=samples).step(lambda: param @ matrix @ param / 2)
    gradient, estimate = matrix @ start, start - param.detach()
    # Three times the root of that mean.
    assert (estimate - gradient).norm() <= 3 * (21 / samples) ** 0.5 * gradient.norm()


def test_the_logged_norm_estimates_that_of_the_gradient():
    torch.manual_seed(0)
    param, slope = nn.Parameter(torch.zeros(50, dtype=torch.float64)), torch.randn(50, dtype=torch.float64)
    optimizer = MeZO([param], samples=4000)
    optimizer.estimate(lambda: param @ slope)
    # g^2 / |gradient|^2 is chi-squared of one degree: of variance 2.
    assert optimizer.gradient_norm() ** 2 == pytest.approx(slope.square().sum().item(), rel=3 * (2 / 4000) ** 0.5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_perturbing_restoring_and_updating_use_one_noise(dtype, device):
    ours, before = parameters(dtype, device), parameters(dtype, device)
    optimizer = MeZO(ours, lr=1.0, eps=0.5)
    noise = [optimizer.noise(i) for i in range(len(ours))]
    seen = []

    def loss() -> Tensor:
        seen.append([param.detach().clone() for param in ours])
        torch.randn(3, device=device)
        return torch.tensor(float(len(seen) == 1))

    optimizer.estimate(loss)
    assert equal(ours, before)
    for side, displaced in zip((0.5, -0.5), seen, strict=True):
        assert equal(displaced, [(b + side * z).to(dtype) for b, z in zip(before, noise, strict=True)])
    assert optimizer.projected.tolist() == [1.0]
    assert equal(noise, [optimizer.noise(i) for i in range(len(ours))])
    optimizer.step()
    if dtype != torch.bfloat16:
        assert equal(ours, [b - z for b, z in zip(before, noise, strict=True)])
    assert not equal(noise, [optimizer.noise(i) for i in range(len(ours))])


@pytest.mark.parametrize("device", DEVICES)
def test_noise_hangs_on_seed_step_sample_and_parameter_alone(device):
    def noise(dtype: torch.dtype = torch.float32, seed: int = 0, steps: int = 0, sample: int = 0, i: int = 0) -> Tensor:
        torch.randn(7, device=device)
        optimizer = MeZO([nn.Parameter(torch.zeros(64, 64, dtype=dtype, device=device)) for _ in range(2)], seed=seed)
        for _ in range(steps):
            optimizer.step(lambda: torch.randn((), device=device))
        return optimizer.noise(i, sample)

    expected = noise()
    assert all(torch.equal(noise(dtype), expected) for dtype in DTYPES)
    others = [noise(seed=1), noise(steps=1), noise(sample=1), noise(i=1)]
    for left, right in zip([expected, *others], [*others, expected], strict=True):
        # Of 4096 pairs without correlation the mean product is 1/64 give or take.
        assert (left * right).mean().abs() < 5 / 64
    assert abs(expected.mean()) < 5 / 64 and expected.std() == pytest.approx(1, abs=0.06)


def test_parts_of_a_batch_add_up_to_the_batch():
    whole, parts = parameters(), parameters()
    optimizers = [MeZO(params, lr=1e-3) for params in (whole, parts)]
    for _ in range(3):
        optimizers[0].step(lambda: loss_of(whole))
        for share in (0.25, 0.75):
            optimizers[1].estimate(lambda share=share: loss_of(parts, share))
        optimizers[1].step()
        for ours, expected in zip(parts, whole, strict=True):
            torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_both_passes_draw_the_same_dropout_and_the_next_step_another(device):
    param = nn.Parameter(torch.zeros(3, device=device))
    optimizer, drawn = MeZO([param], samples=2), []

    def loss() -> Tensor:
        drawn.append(torch.rand((), device=device))
        return drawn[-1]

    for _ in range(2):
        optimizer.estimate(loss)
    assert optimizer.projected.tolist() == [0, 0]
    assert len({value.item() for value in drawn[:4]}) == 1 == len({value.item() for value in drawn[4:]})
    assert drawn[0] != drawn[4]


def test_a_saved_state_goes_on_with_the_same_noise():
    straight, resumed = parameters(), parameters()
    optimizer = MeZO(straight, lr=1e-3, seed=11)
    for _ in range(3):
        optimizer.step(lambda: loss_of(straight))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    with torch.no_grad():
        for param, saved in zip(resumed, straight, strict=True):
            param.copy_(saved)
    for _ in range(3):
        optimizer.step(lambda: loss_of(straight))
    file.seek(0)
    other = MeZO(resumed, lr=1e-3, seed=0)
    other.load_state_dict(torch.load(file))
    for _ in range(3):
        other.step(lambda: loss_of(resumed))
    assert equal(resumed, straight)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
def test_a_copy_goes_on_alone(copied):
    params = parameters()
    optimizer = MeZO(params, lr=1e-3, eps=1e-2, samples=2)
    optimizer.estimate(lambda: loss_of(params))
    other = copied(optimizer)
    theirs = other.param_groups[0]["params"]
    for each in (optimizer, other):
        each.step()
    assert equal(theirs, params) and not equal(params, parameters())
    assert (other.eps, other.samples) == (1e-2, 2)


def test_nothing_is_saved_for_backward_and_nothing_is_kept():
    model, blocks = adapted()
    optimizer = MeZO(trained(model), lr=1e-3, masks=padding_masks(model))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        x = torch.randn(4, 20)
        for _ in range(2):
            loss = optimizer.step(lambda: model(x).square().mean())
        assert not saved and not loss.requires_grad
        # The hook does see what a backward pass saves.
        model(x).square().mean()
        assert saved
    assert all(param.grad is None for param in model.parameters())
    assert not optimizer.state and all(not state for state in optimizer.state_dict()["state"].values())
    kept = [value for value in vars(optimizer).values() if isinstance(value, Tensor)]
    assert sum(tensor.untyped_storage().nbytes() for tensor in kept) == 8 * optimizer.samples


def test_padding_is_never_touched():
    model, blocks = adapted()
    inside = [each.layout().padding_mask() for each in blocks]
    assert all(not mask.all() for mask in inside)
    optimizer = MeZO(trained(model), lr=1e-2, weight_decay=0.1, masks=padding_masks(model))
    x = torch.randn(4, 20)

    def loss() -> Tensor:
        assert all(each.weight[~mask].eq(0).all() for each, mask in zip(blocks, inside, strict=True))
        assert all(each.weight[mask].ne(0).all() for each, mask in zip(blocks, inside, strict=True))
        return model(x).square().mean()

    for _ in range(5):
        optimizer.step(loss)
    assert all(each.weight[~mask].eq(0).all() for each, mask in zip(blocks, inside, strict=True))


def test_a_model_learns():
    """What another setting of the same blocks computes."""
    (model, blocks), x = adapted(), torch.randn(64, 20, generator=torch.Generator().manual_seed(2))
    starts = [each.weight.detach().clone() for each in blocks]
    with torch.no_grad():
        for each in blocks:
            each.weight.copy_(torch.randn_like(each.weight) * each.layout().padding_mask() * 0.2)
        y = model(x)
        for each, start in zip(blocks, starts, strict=True):
            each.weight.copy_(start)
    optimizer = MeZO(trained(model.train()), lr=4e-2, masks=padding_masks(model))
    losses = [optimizer.step(lambda: (model(x) - y).square().mean()).item() for _ in range(300)]
    assert losses[-1] < 0.5 * losses[0]


def test_updates_below_the_spacing_of_bf16_happen_in_the_mean():
    param = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
    optimizer = MeZO([param], lr=1e-3)
    noise = optimizer.noise(0)
    optimizer.projected.fill_(1.0)
    optimizer._estimated = True
    optimizer.step()
    moved = (1 - param.detach().float()) @ noise / (noise @ noise)
    # A rounding up or down by at most 2^-7 is off by half of that in the mean square at most.
    assert moved == pytest.approx(1e-3, abs=4 * 2**-8 / 64)


def test_the_rounding_of_bf16_hangs_on_the_seed_too():
    def decayed(seed: int) -> Tensor:
        param = nn.Parameter(torch.linspace(1, 2, 4096).bfloat16())
        # No difference of losses: the decay alone moves, by less than the spacing.
        MeZO([param], lr=1e-3, weight_decay=0.5, seed=seed).step(lambda: torch.zeros(()))
        return param.detach()

    assert torch.equal(decayed(0), decayed(0)) and not torch.equal(decayed(0), decayed(1))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_without_a_finite_loss_is_left_out(value):
    params = parameters()
    optimizer = MeZO(params, lr=1e-3, weight_decay=0.5)
    noise = optimizer.noise(0)
    optimizer.step(lambda: torch.tensor(value))
    assert equal(params, parameters()) and not torch.equal(optimizer.noise(0), noise)
    optimizer.step(lambda: loss_of(params))
    assert not equal(params, parameters())


def test_what_interrupts_a_pass_leaves_the_parameters_as_they_were():
    params = parameters()

    def loss() -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        MeZO(params).step(loss)
    assert equal(params, parameters())


def test_what_requires_no_gradient_rests():
    params = parameters()
    optimizer = MeZO(params, lr=1e-3, weight_decay=0.1)
    noise = [optimizer.noise(i) for i in range(len(params))]
    params[1].requires_grad_(False)
    optimizer.step(lambda: loss_of(params))
    assert torch.equal(params[1], parameters()[1]) and not torch.equal(params[0], parameters()[0])
    # The others have the noise that they would have had.
    moved = (params[2] - parameters()[2] * (1 - 1e-4)).detach()
    assert torch.corrcoef(torch.stack([moved, noise[2]]))[0, 1].abs() > 0.99


def test_groups_have_their_own_numbers():
    params = parameters()
    groups = [{"params": params[:2], "lr": 0.0}, {"params": params[2:], "lr": 1e-3}]
    MeZO(groups).step(lambda: loss_of(params))
    assert equal(params[:2], parameters()[:2])
    assert not equal(params[2:], parameters()[2:])


def test_a_step_needs_a_loss():
    params = parameters()
    optimizer = MeZO(params)
    loss_of(params).backward()
    with pytest.raises(ValueError, match="hand it a closure"):
        optimizer.step()
    assert equal(params, parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "lr must be a finite number of at least 0, got -1.0"),
        ({"weight_decay": float("nan")}, "weight_decay must be"),
        ({"lr": "1e-4"}, "lr must be a finite number of at least 0, got '1e-4'"),
        ({"eps": 0.0}, "eps must be a finite number above 0"),
        ({"eps": "1e-3"}, "eps must be a finite number above 0, got '1e-3'"),
        ({"seed": None}, "seed must be a whole number, got None"),
        ({"samples": 0}, "samples must be a whole number of at least 1, got 0"),
        ({"samples": 1.5}, "samples must be"),
    ],
)
def test_numbers_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        MeZO(parameters(), **settings)


@pytest.mark.parametrize(
    ("returned", "what"),
    [(None, "NoneType"), ({"loss": 1.0}, "dict"), (torch.zeros(3), r"a tensor of shape \(3,\)")],
)
def test_a_closure_that_returns_no_loss_is_refused_and_leaves_the_parameters(returned, what):
    params = parameters()
    before = [param.detach().clone() for param in params]
    optimizer = MeZO(params)
    with pytest.raises(ValueError, match=f"must return the loss, one number, got {what}"):
        optimizer.step(lambda: returned)
    assert all(torch.equal(param, old) for param, old in zip(params, before, strict=True))


def test_float16_is_refused():
    with pytest.raises(ValueError, match=r"parameter 0 of group 0 is torch.float16; MeZO trains"):
        MeZO([nn.Parameter(torch.zeros(3, dtype=torch.float16))])
