"""Drop and regrow: which blocks give way to which, with what deltas and moments, and what is refused."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from helpers import Mlp, assert_no_worse_than_torch, tiny_llama
from helpers import batch as llama_batch
from peft import get_peft_model
from regrown import NUMBERS, SETTINGS, STEPS, batch, run, small, trainable
from scheduled import adapted
from torch import nn

from smt_peft import BlockSelection, SMTConfig, select_blocks
from smt_peft.optim import SMTAdamW
from smt_peft.schedules import LayerSampling, Regrowth, ScheduleCallback
from smt_peft.schedules.regrowth import check_movable, least_moved
from smt_peft.schedules.trained import trained_blocks
from smt_peft.tuner.held import held_selection
from smt_peft.tuner.layer import SMTLayer


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


def test_layers_are_watched_in_the_score_steps_alone():
    _, model = small()
    layers = [module for module in model.modules() if isinstance(module, SMTLayer)]
    watched = []
    schedule = Regrowth(every=6, share=0.5, score_steps=2)
    run(
        model,
        schedule,
        SMTAdamW(trainable(model)),
        each=lambda _: watched.append(any(m._forward_hooks for m in layers)),
    )
    # After step n, for the update n + 1; the share falls to 0 with the last step, which needs no scores.
    assert [step + 1 for step, on in enumerate(watched, start=1) if on] == [5, 6, 11, 12, 17, 18]
    schedule.end()
    assert not any(m._forward_hooks for m in layers)


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "8bit"])
def test_survivors_keep_delta_and_moments_bit_for_bit(state_dtype):
    """In blocks of 16 x 16, which share no scale of 8-bit moments with others."""
    model = adapted(layers=1, block_size=16, density=0.5)
    blocks = trained_blocks(model)
    optimizer = SMTAdamW(trainable(model), lr=1e-2, state_dtype=state_dtype)
    before = {}
    fresh = kept = 0
    schedule = Regrowth(every=3, share=0.7, score_steps=1)
    schedule.begin(model, optimizer, 12)
    for step in range(1, 12):
        model(**llama_batch(seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for name, module in blocks.items():
            state = {k: v.view(len(module.index), -1).clone() for k, v in optimizer.state[module.weight].items()}
            before[name] = module.index.tolist(), module.weight.detach().clone(), state
        schedule.after_update(step)
        for name, module in blocks.items():
            places, weight, state = before[name]
            now = optimizer.state[module.weight]
            for i, place in enumerate(module.index.tolist()):
                old = places.index(place) if place in places else None
                kept, fresh = kept + (old is not None), fresh + (old is None)
                assert torch.equal(module.weight[i], weight[old] if old is not None else torch.zeros(16, 16))
                for key, value in now.items():
                    part = value.view(len(places), -1)[i]
                    assert torch.equal(part, state[key][old] if old is not None else torch.zeros_like(part)), key
            layer = model.base_model.model.get_submodule(name)
            assert torch.equal(layer.smt_blocks["default"].layout().blocks, module.index)
    assert fresh > 2 and kept > 5


def test_padding_stays_zero_and_does_not_count():
    _, model = small(block_size=[7, 9])
    blocks = trained_blocks(model)
    run(model, Regrowth(dropped="keep", **SETTINGS), SMTAdamW(trainable(model), **NUMBERS))
    for module in blocks.values():
        for part in (module, module.retired):
            if part is not None:
                assert not part.weight[~part.layout().padding_mask()].any()
        with torch.no_grad():
            module.weight.copy_(module.layout().padding_mask().float())
        # All entries of all blocks alike: none has moved less than another for being ragged.
        assert torch.equal(least_moved(module, 2), torch.tensor([0, 1]))


@pytest.mark.parametrize("cap", [{}, {"max_column_share": 0.5}])
def test_blocks_to_avoid_stay_avoided(cap):
    """Also after a resume by a config that knows no `avoid`, as a saved one."""
    config = {"target_modules": ["up", "down"], "block_size": 3, "spread": "free", "score": "magnitude"}
    others = select_blocks(small()[0], SMTConfig(**config | {"density": 0.4, "score": "random"}))
    _, model = small(density=0.2, avoid=others, **cap)
    schedule = Regrowth(**SETTINGS)
    optimizer = SMTAdamW(trainable(model), **NUMBERS)
    run(model, schedule, optimizer, STEPS // 2)
    state = schedule.state_dict()
    model.peft_config["default"].avoid = None
    run(model, schedule, optimizer, first=STEPS // 2 + 1, state=state)
    schedule.end()
    held = held_selection(model, others)
    assert schedule.replaced > 0 and held.num_common(others) == 0


@pytest.mark.parametrize("cap", [{"max_column_share": 0.5}, {"max_lora_rank": 6}])
@pytest.mark.parametrize("dropped", ["revert", "keep"])
def test_the_caps_of_the_config_hold(cap, dropped):
    _, model = small(density=0.15, score="magnitude", **cap)
    blocks = trained_blocks(model)
    schedule = Regrowth(dropped=dropped, **SETTINGS)
    run(model, schedule, SMTAdamW(trainable(model), **NUMBERS))
    schedule.end()
    assert schedule.replaced > 0
    for module in blocks.values():
        rows, cols = module.index.T
        touched = [len(rows.unique()) * 3, len(cols.unique()) * 3]
        if "max_column_share" in cap:
            assert len(cols.unique()) <= max(1, module.grid.col_stripes // 2)
        else:
            assert min(touched) <= 6


@pytest.mark.parametrize("cap", [{}, {"max_column_share": 0.5}])
@pytest.mark.parametrize("dropped", ["revert", "keep"])
def test_blocks_to_avoid_are_never_grown(cap, dropped):
    """In a larger block size; without `avoid` the same training grows some of them."""
    base, other = small(block_size=4, density=0.4, score="magnitude")
    theirs = BlockSelection(
        {name: module.index for name, module in trained_blocks(other).items()},
        {name: module.grid for name, module in trained_blocks(other).items()},
    )
    met = {}
    for avoid in (None, theirs):
        _, model = small(density=0.15, avoid=avoid, **cap)
        schedule = Regrowth(dropped=dropped, **SETTINGS)
        run(model, schedule, SMTAdamW(trainable(model), **NUMBERS))
        schedule.end()
        assert schedule.replaced > 0
        blocks = trained_blocks(model)
        met[avoid is None] = any(blocks[name].layout().meets(theirs.layout(name)) for name in blocks)
    assert met == {True: True, False: False}


@pytest.mark.parametrize("forward", ["swap", "additive"])
def test_retired_blocks_act_on_every_route(forward):
    """Of a base in bf16: the output of base + live + retired delta, and the gradient of the input."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(24, 16, dtype=torch.bfloat16))
    config = SMTConfig(target_modules=["0"], block_size=4, density=0.3, score="random", init_weights=False)
    config.forward = forward
    model = get_peft_model(base, config).train()
    [module] = trained_blocks(model).values()
    free = torch.ones(module.grid.num_blocks, dtype=torch.bool)
    free[module.grid.flatten(module.index)] = False
    places = module.grid.unflatten(free.nonzero().squeeze(1)[:3])
    module.retire(places, torch.randn(3, 4, 4) * 0.1)
    layer = model.base_model.model[0]
    x = torch.randn(5, 24, dtype=torch.bfloat16, requires_grad=True)
    y = model(x)
    [dx] = torch.autograd.grad(y.float().square().sum(), [x])
    weight = layer.get_base_layer().weight.double() + layer.get_delta_weight("default").double()
    exact = x.detach().double().requires_grad_()
    truth = exact @ weight.t() + layer.get_base_layer().bias.double()
    [d_exact] = torch.autograd.grad(truth.square().sum(), [exact])
    rounding = torch.finfo(torch.bfloat16).eps
    assert (y.double() - truth).abs().max() <= 4 * rounding * truth.abs().max()
    assert (dx.double() - d_exact).abs().max() <= 8 * rounding * d_exact.abs().max()
    assert module.weight.shape == (len(module.index), 4, 4) and not module.retired.weight.requires_grad
    with pytest.raises(ValueError, match="blocks that a schedule has retired would be left out"):
        layer.merge()
    module.take_in_retired()
    assert torch.equal(weight, layer.get_base_layer().weight.double() + layer.get_delta_weight("default").double())
    layer.merge()


def test_copies_and_moves_take_retired_blocks_along():
    _, model = small()
    [module, *_] = trained_blocks(model).values()
    free = next(b for b in range(module.grid.num_blocks) if b not in module.grid.flatten(module.index))
    module.retire(module.grid.unflatten(torch.tensor([free])), torch.ones(1, 3, 3))
    twin = copy.deepcopy(model).double()
    [moved, *_] = trained_blocks(twin).values()
    assert moved.retired.weight.dtype == torch.float64 and moved.retired is not module.retired
    assert not any("retired" in name for name in model.state_dict())
    module.retire(module.retired.index[:0], module.retired.weight[:0])
    assert module.retired is None


class TestRefused:
    def test_other_optimizers(self):
        _, model = small()
        with pytest.raises(ValueError, match=r"which AdamW cannot; use SMTAdamW \(optim: smt_adamw\)"):
            Regrowth().begin(model, torch.optim.AdamW(trainable(model)), 10)

    def test_an_optimizer_of_something_else(self):
        _, model = small()
        with pytest.raises(ValueError, match="does not hold the blocks of up"):
            Regrowth().begin(model, SMTAdamW([nn.Parameter(torch.zeros(2))]), 10)

    def test_layers_that_are_not_linear(self):
        model = get_peft_model(tiny_llama(), SMTConfig(target_modules=["embed_tokens"], score="random", block_size=8))
        with pytest.raises(ValueError, match=r"embed_tokens: regrowth moves blocks of linear layers.*leave it out of"):
            Regrowth().begin(model, SMTAdamW(trainable(model)), 10)

    def test_another_schedule_that_decides_what_trains(self):
        with pytest.raises(ValueError, match="regrowth and layer_sampling both decide which blocks train"):
            ScheduleCallback(Regrowth(), LayerSampling())

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"every": 0}, "every must be at least 1, got 0"),
            ({"score_steps": 0}, "score_steps must be at least 1"),
            ({"every": 4, "score_steps": 5}, "score_steps=5 do not fit between two reselections, every=4"),
            ({"share": 0}, "share must be above 0 and at most 1, got 0"),
            ({"share": 1.5}, "share must be above 0"),
            ({"share": True}, "share must be above 0"),
            ({"every": 20.0}, "every must be a whole number, got 20.0"),
            ({"score_steps": "5"}, "score_steps must be a whole number, got '5'"),
            ({"score": "taylor"}, "score must be grad_abs or grad_sq or mean_abs, got 'taylor'"),
            ({"dropped": "burn"}, "dropped must be revert or keep, got 'burn'"),
        ],
    )
    def test_settings_out_of_range(self, settings, message):
        with pytest.raises(ValueError, match=message):
            Regrowth(**settings)

    @pytest.mark.parametrize(
        ("settings", "arguments", "message"),
        [
            ({}, {"torch_compile": True}, "torch_compile has compiled without it"),
            ({"dropped": "keep"}, {"load_best_model_at_end": True}, "load_best_model_at_end reads.*dropped='revert'"),
        ],
    )
    def test_arguments_of_a_trainer(self, settings, arguments, message):
        with pytest.raises(ValueError, match=message):
            Regrowth(**settings).check_arguments(SimpleNamespace(**arguments))

    def test_channels_that_matrices_share(self):
        with pytest.raises(ValueError, match="coupled='both' chooses channels that several matrices share"):
            check_movable(SimpleNamespace(coupled="both"))

    def test_a_model_whose_gradients_nobody_sees(self):
        _, model = small()
        schedule, optimizer = Regrowth(every=2, share=1.0, score_steps=1), SMTAdamW(trainable(model))
        schedule.begin(model, optimizer, 10)
        schedule.after_update(1)
        with pytest.raises(RuntimeError, match="regrowth saw no gradient of any of its 2 modules"):
            schedule.after_update(2)


def test_where_every_watched_batch_overflows_no_block_gives_way():
    """As under a loss scale that has yet to come down."""
    _, model = small()
    blocks = trained_blocks(model)
    before = {name: module.index.clone() for name, module in blocks.items()}
    schedule, optimizer = Regrowth(every=2, share=1.0, score_steps=1), SMTAdamW(trainable(model))
    schedule.begin(model, optimizer, 10)
    for step in (1, 2):
        x, y = batch(step)
        ((model(x) - y).square().mean() * math.inf).backward()
        model.zero_grad()
        schedule.after_update(step)
    assert schedule.replaced == 0 and all(torch.equal(module.index, before[n]) for n, module in blocks.items())
    run(model, schedule, optimizer)
    assert schedule.replaced > 0
