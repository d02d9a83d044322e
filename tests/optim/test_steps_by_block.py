"""`SMTAdamW` over blocks that began at different times and change places."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from smt_peft.ops.adamw import dequantise, dynamic_code
from smt_peft.optim.adamw import STATE_DTYPES, SMTAdamW

NUMBERS = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}
MOMENTS = ("exp_avg", "exp_avg_sq")


def stepped(shape, state_dtype: str, steps: int = 5) -> tuple[nn.Parameter, SMTAdamW]:
    torch.manual_seed(0)
    param = nn.Parameter(torch.randn(shape))
    optimizer = SMTAdamW([param], state_dtype=state_dtype, **NUMBERS)
    optimizer.count_by_block(param)
    for _ in range(steps):
        param.grad = torch.randn(shape)
        optimizer.step()
    return param, optimizer


def moment(state: dict[str, Tensor], name: str) -> Tensor:
    stored = state[name]
    if stored.dtype != torch.uint8:
        return stored
    return dequantise(stored.view(-1), state[f"{name}_scale"], dynamic_code(name == "exp_avg")).view(stored.shape)


def test_counting_by_block_changes_nothing_while_all_blocks_are_as_old():
    torch.manual_seed(1)
    shapes = [(3, 5, 7), (4, 16, 16)]
    for state_dtype in STATE_DTYPES:
        params = [[nn.Parameter(torch.ones(shape)) for shape in shapes] for _ in range(2)]
        plain, by_block = (SMTAdamW(each, state_dtype=state_dtype, **NUMBERS) for each in params)
        for param in params[1]:
            by_block.count_by_block(param)
        for _ in range(5):
            for left, right in zip(*params, strict=True):
                left.grad = torch.randn(left.shape)
                right.grad = left.grad.clone()
            plain.step()
            by_block.step()
        assert all(torch.equal(left, right) for left, right in zip(*params, strict=True))
        assert [by_block.state[param]["step"].tolist() for param in params[1]] == [[5.0] * 3, [5.0] * 4]


def test_a_block_that_begins_later_equals_one_with_an_optimizer_of_its_own():
    param, optimizer = stepped((4, 6, 6), "float32")
    sources = torch.tensor([0, -1, 2, -1])
    with torch.no_grad():
        param[1], param[3] = 0, 0
    optimizer.move_blocks(param, sources)
    assert optimizer.state[param]["step"].tolist() == [5, 0, 5, 0]
    alone = [nn.Parameter(param[i].detach().clone()) for i in (1, 3)]
    theirs = torch.optim.AdamW(alone, **NUMBERS)
    for _ in range(20):
        param.grad = torch.randn(param.shape)
        for i, own in zip((1, 3), alone, strict=True):
            own.grad = param.grad[i].clone()
        optimizer.step()
        theirs.step()
    for i, own in zip((1, 3), alone, strict=True):
        # As far apart as the two optimizers are anyway, see test_optim.py.
        assert (param[i] - own).abs().max() <= 1e-6


@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
@pytest.mark.parametrize("side", [16, 5])
def test_the_state_of_blocks_moves_with_them(state_dtype, side):
    """Bit for bit, but for 8-bit moments of blocks that share a scale, which keep the precision of one."""
    param, optimizer = stepped((5, side, side), state_dtype)
    before = copy.deepcopy(optimizer.state[param])
    sources = torch.tensor([1, 2, -1, 4, 0])
    optimizer.move_blocks(param, sources)
    state = optimizer.state[param]
    assert state["step"].tolist() == [5, 5, 0, 5, 5]
    for name in MOMENTS:
        now, was = moment(state, name), moment(before, name)
        moved, kept = now[sources >= 0], was[sources[sources >= 0]]
        if state_dtype == "8bit" and side == 5:
            assert ((moved - kept).abs() <= 0.02 * was.abs().max()).all()
            # The smallest code of a second moment stands for a little more than 0.
            assert now[2].abs().max() <= 1e-7 * was.abs().max()
        else:
            assert torch.equal(moved, kept) and not now[2].any()


@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
def test_the_state_by_block_is_saved_and_goes_on(state_dtype, tmp_path):
    param, optimizer = stepped((4, 6, 6), state_dtype)
    optimizer.move_blocks(param, torch.tensor([-1, 0, 1, 3]))
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    again = nn.Parameter(param.detach().clone())
    fresh = SMTAdamW([again], state_dtype=state_dtype, **NUMBERS)
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for _ in range(3):
        param.grad = torch.randn(param.shape)
        again.grad = param.grad.clone()
        optimizer.step()
        fresh.step()
    assert torch.equal(param, again)
    assert fresh.state[again]["step"].tolist() == [3, 8, 8, 8]


def test_a_count_for_other_blocks_is_refused():
    param, optimizer = stepped((4, 6, 6), "float32")
    state = optimizer.state_dict()
    state["state"][0]["step"] = torch.ones(3)
    with pytest.raises(ValueError, match=r"step of parameter 0 must have the shape \(\), got \(3,\)"):
        SMTAdamW([nn.Parameter(param.detach().clone())], **NUMBERS).load_state_dict(state)
