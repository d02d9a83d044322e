"""Drop and regrow, against a training in plain PyTorch in which every block has an AdamW of its own."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import Mlp, assert_no_worse_than_torch
from peft import get_peft_model
from torch import nn

from smt_peft import SMTConfig
from smt_peft.optim import SMTAdamW
from smt_peft.schedules import Regrowth
from smt_peft.schedules.trained import trained_blocks

STEPS = 24
SETTINGS = {"every": 6, "share": 0.5, "score_steps": 3}
NUMBERS = {"lr": 3e-2, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.1}


def batch(step: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    x, y = (torch.randn(16, size, generator=generator) for size in (20, 12))
    return x.to(dtype), y.to(dtype)


def small(**settings):
    """Two matrices of ragged grids, and the blocks of a few."""
    torch.manual_seed(0)
    base = Mlp()
    before = copy.deepcopy(base)
    config = {"target_modules": ["up", "down"], "block_size": 3, "density": 0.3, "score": "random", "spread": "free"}
    return before, get_peft_model(base, SMTConfig(**config | settings))


def run(model, schedule, optimizer, steps: int = STEPS, each=lambda step: None, first: int = 1, state=None) -> None:
    schedule.begin(model, optimizer, STEPS, state)
    for step in range(first, steps + 1):
        x, y = batch(step)
        (model(x) - y).square().mean().backward()
        schedule.before_update(step)
        optimizer.step()
        optimizer.zero_grad()
        schedule.after_update(step)
        each(step)


class Plain:
    """The same training from the definition: dense gradients by autograd, a dictionary of blocks, an AdamW for each."""

    def __init__(self, base: nn.Module, blocks: dict, dropped: str, dtype: torch.dtype):
        self.base = Mlp(dtype)
        self.base.load_state_dict(base.state_dict())
        self.grids = {name: module.grid for name, module in blocks.items()}
        self.live = {name: {tuple(b): self._new(name) for b in m.index.tolist()} for name, m in blocks.items()}
        self.retired = {name: {} for name in blocks}
        self.dropped = dropped
        self.weights = {}

    def _new(self, name, values=None):
        dtype = self.base.up.weight.dtype
        value = torch.zeros(self.grids[name].block_shape, dtype=dtype) if values is None else values.clone()
        parameter = nn.Parameter(value)
        return parameter, torch.optim.AdamW([parameter], **NUMBERS)

    def dense(self, name):
        grid = self.grids[name]
        whole = torch.zeros(
            grid.row_stripes * grid.block_rows, grid.col_stripes * grid.block_cols, dtype=self.base.up.weight.dtype
        )
        parts = {b: p for b, (p, _) in self.live[name].items()} | self.retired[name]
        for (row, col), values in parts.items():
            padded = torch.zeros_like(whole)
            padded[row * grid.block_rows :, col * grid.block_cols :][: grid.block_rows, : grid.block_cols] = 1
            tile = values.repeat(grid.row_stripes, grid.col_stripes)
            whole = whole + padded * tile
        return whole[: grid.rows, : grid.cols]

    def train(self):
        scores = {name: torch.zeros(grid.shape, dtype=torch.float64) for name, grid in self.grids.items()}
        for step in range(1, STEPS + 1):
            x, y = batch(step, self.base.up.weight.dtype)
            self.weights = {
                name: self.base.get_submodule(name).weight.detach() + self.dense(name) for name in self.grids
            }
            for weight in self.weights.values():
                weight.retain_grad()
            states = {f"{name}.weight": weight for name, weight in self.weights.items()}
            out = torch.func.functional_call(self.base, states, (x,))
            (out - y).square().mean().backward()
            for parts in self.live.values():
                for parameter, adamw in parts.values():
                    adamw.step()
                    parameter.grad = None
            every = SETTINGS["every"]
            if (step - 1) % every >= every - SETTINGS["score_steps"]:
                for name, weight in self.weights.items():
                    scores[name] += weight.grad.abs()
            if step % every == 0 and step < STEPS:
                for name in self.grids:
                    self.reselect(name, scores[name], step)
                    scores[name].zero_()

    def real(self, name, row, col, dense):
        grid = self.grids[name]
        return dense[row * grid.block_rows :, col * grid.block_cols :][: grid.block_rows, : grid.block_cols]

    def reselect(self, name, score, step):
        live, grid = self.live[name], self.grids[name]
        count = int(len(live) * SETTINGS["share"] * (1 - step / STEPS))
        delta = self.dense(name).detach()
        moved = sorted(live, key=lambda b: (float(self.real(name, *b, delta).abs().mean()), b))
        survivors = set(live) - set(moved[:count])
        places = [(r, c) for r in range(grid.row_stripes) for c in range(grid.col_stripes) if (r, c) not in survivors]
        places.sort(key=lambda b: -float(self.real(name, *b, score).mean()))
        chosen = survivors | set(places[:count])
        for block in set(live) - chosen:
            values = live.pop(block)[0].detach()
            if self.dropped == "keep":
                self.retired[name][block] = values
        for block in chosen - set(live):
            live[block] = self._new(name, self.retired[name].pop(block, None))


@pytest.mark.parametrize("dropped", ["revert", "keep"])
def test_it_is_the_training_of_masks_in_plain_pytorch(dropped):
    """Which blocks are dropped and grown, what becomes of their deltas, and moments that start with each block."""
    base, model = small()
    blocks = trained_blocks(model)
    truth, theirs = (Plain(base, blocks, dropped, dtype) for dtype in (torch.float64, torch.float32))
    counts = {name: len(module.index) for name, module in blocks.items()}
    seen = []

    def look(step):
        assert {name: len(module.index) for name, module in blocks.items()} == counts
        assert all(module.weight.grad is None for module in blocks.values())
        seen.append({name: module.index.clone() for name, module in blocks.items()})

    schedule = Regrowth(dropped=dropped, **SETTINGS)
    run(model, schedule, SMTAdamW(trainable(model), **NUMBERS), each=look)
    for plain in (truth, theirs):
        plain.train()
    changes = [any(not torch.equal(a[name], b[name]) for name in a) for a, b in zip(seen, seen[1:], strict=False)]
    assert [step for step, changed in enumerate(changes, start=2) if changed] == [6, 12, 18]
    assert schedule.replaced > 4
    for name, module in blocks.items():
        assert {tuple(b) for b in module.index.tolist()} == set(truth.live[name])
        retired = set() if module.retired is None else {tuple(b) for b in module.retired.index.tolist()}
        assert retired == set(truth.retired[name]) and bool(retired) == (dropped == "keep")
        ours = model.base_model.model.get_submodule(name).get_delta_weight("default")
        assert_no_worse_than_torch(ours, theirs.dense(name).detach(), truth.dense(name).detach())
    schedule.end()
    for name, module in blocks.items():
        ours = model.base_model.model.get_submodule(name).get_delta_weight("default")
        assert_no_worse_than_torch(ours, theirs.dense(name).detach(), truth.dense(name).detach())
        assert len(module.index) == counts[name] + len(truth.retired[name])


def trainable(model) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]
