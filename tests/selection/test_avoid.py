"""Blocks that are not to be chosen: none is, the budget is met all the same, and where it cannot be, that is said."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import Mlp, tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from mixtures import tiny_mixtral
from peft import get_peft_model

from smt_peft import BlockSelection, SMTConfig, select_blocks
from smt_peft.blocks import BlockGrid
from smt_peft.selection.budget import choose_blocks
from smt_peft.tuner.layer import SMTLayer

TARGETS = ["up", "down"]
grids = st.builds(BlockGrid, st.integers(1, 24), st.integers(1, 24), st.integers(1, 6), st.integers(1, 6)).filter(
    lambda grid: grid.block_rows <= grid.rows and grid.block_cols <= grid.cols
)


def mlp() -> Mlp:
    """Always the same."""
    torch.manual_seed(0)
    return Mlp()


def mlp_selection(**changed) -> BlockSelection:
    config = {"target_modules": TARGETS, "density": 0.2, "block_size": 4, "score": "magnitude", **changed}
    return select_blocks(mlp(), SMTConfig(**config))


def weights_of(selection: BlockSelection) -> dict[str, torch.Tensor]:
    return {name: selection.layout(name).mask() for name in selection.blocks}


def assert_disjoint(one: BlockSelection, other: BlockSelection) -> None:
    masks, others = weights_of(one), weights_of(other)
    assert not any(bool((mask & others[name]).any()) for name, mask in masks.items() if name in others)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(grids, min_size=1, max_size=3),
    st.sampled_from(["free", "capped", "assignment"]),
    st.sampled_from(["global", "per_module"]),
    st.floats(0.01, 1.0),
    st.floats(0.0, 1.0),
    st.sampled_from([None, 1, 5]),
    st.integers(0, 9),
)
def test_no_avoided_block_is_chosen_and_the_budget_is_spent_or_refused(
    several, spread, budget, density, share, rank, seed
):
    generator = np.random.default_rng(seed)
    named = {f"m{i}": grid for i, grid in enumerate(several)}
    if rank is not None and any(rank < min(grid.block_shape) and rank < min(grid.shape) for grid in several):
        rank = None
    scores = {name: torch.from_numpy(generator.integers(0, 4, grid.stripes) * 1.0) for name, grid in named.items()}
    blocked = {name: generator.random(grid.stripes) < share for name, grid in named.items()}
    config = SMTConfig(density=density, block_size=1, spread=spread, budget=budget, max_lora_rank=rank)
    costs = {name: grid.effective_sizes().numpy() for name, grid in named.items()}
    scopes = [list(named)] if budget == "global" else [[name] for name in named]
    wanted = [int(density * sum(named[name].numel for name in scope)) for scope in scopes]
    left = [sum(int(costs[name][~blocked[name]].sum()) for name in scope) for scope in scopes]
    try:
        chosen = choose_blocks(scores, named, config, blocked=blocked)
    except ValueError as error:
        assert "among those to avoid" in str(error) and any(
            room < max(1, budget) for room, budget in zip(left, wanted, strict=True)
        )
        return
    for scope, budget, room in zip(scopes, wanted, left, strict=True):
        spent = 0
        for name in scope:
            rows, cols = chosen.get(name, torch.empty(0, 2)).long().unbind(1)
            assert not blocked[name][rows, cols].any()
            spent += int(costs[name][rows, cols].sum())
        assert spent > 0 and room >= budget
        dearest = max(int(costs[name][~blocked[name]].max(initial=0)) for name in scope)
        assert rank is not None or spent > budget - dearest


@settings(max_examples=60, deadline=None)
@given(grids, st.sampled_from(["free", "capped", "assignment"]), st.floats(0.01, 1.0), st.integers(0, 9))
def test_with_nothing_to_avoid_the_choice_is_as_without(grid, spread, density, seed):
    scores = {"m": torch.from_numpy(np.random.default_rng(seed).random(grid.stripes))}
    config = SMTConfig(density=density, block_size=1, spread=spread)
    plain = choose_blocks(scores, {"m": grid}, config)
    marked = choose_blocks(scores, {"m": grid}, config, blocked={"m": np.zeros(grid.stripes, dtype=bool)})
    assert torch.equal(plain["m"], marked["m"])


@pytest.mark.parametrize("score", ["magnitude", "random", "diagonal", "grad_abs", "activation"])
@pytest.mark.parametrize("size", [4, 8, [-1, 1]], ids=str)
def test_every_score_and_block_size_avoids(score, size):
    other, model = mlp_selection(score="random", block_size=8 if size == 4 else 4), mlp()
    config = SMTConfig(target_modules=TARGETS, density=0.2, block_size=size, score=score, avoid=other)
    if size == [-1, 1]:
        # Whole columns: those that hold no block of the other, which has many.
        config.avoid = mlp_selection(density=0.1, spread="free", max_column_share=0.4)
    batches = [torch.randn(4, 20) for _ in range(2)]
    made = select_blocks(model, config, batches, loss_fn=lambda model, x: model(x).square().mean(), progress=False)
    assert_disjoint(made, config.avoid)
    budget = [int(0.2 * grid.numel) for grid in made.grids.values()]
    assert made.effective_numel > sum(budget) - 2 * 20 * 4 and set(made.blocks) == set(TARGETS)


def test_a_list_of_selections_and_files_is_avoided_one_after_the_other(tmp_path):
    made, files = [], []
    for number in range(4):
        made.append(mlp_selection(avoid=[*files] or None))
        files.append(tmp_path / f"{number}.safetensors" if number % 2 else made[-1])
        made[-1].save(tmp_path / f"{number}.safetensors")
    for number, one in enumerate(made):
        for other in made[:number]:
            assert_disjoint(one, other)
    with pytest.raises(
        ValueError, match=r"module up: \d+ weights are asked for, but of its \d+ only \d+ are not among"
    ):
        mlp_selection(avoid=files, density=0.3)


def test_it_is_for_blocks_that_are_chosen_without_a_selection_too():
    other = mlp_selection()
    config = SMTConfig(target_modules=TARGETS, density=0.2, block_size=4, score="random", avoid=other)
    model = get_peft_model(mlp(), config)
    layers = [layer for layer in model.modules() if isinstance(layer, SMTLayer)]
    assert len(layers) == 2
    for layer in layers:
        assert not layer.smt_blocks["default"].layout().meets(other.layout(layer.smt_name))


def test_a_selection_made_before_that_meets_one_to_avoid_is_refused():
    made = mlp_selection()
    model = mlp()
    with pytest.raises(ValueError, match="avoid: up: the selection given has blocks of one to avoid"):
        get_peft_model(model, SMTConfig(target_modules=TARGETS, selection=made, avoid=made))
    get_peft_model(model, SMTConfig(target_modules=TARGETS, selection=mlp_selection(avoid=made), avoid=made))


def test_beside_a_selection_made_before_those_of_another_model_are_refused_by_module():
    made, other = mlp_selection(), mlp()
    with torch.no_grad():
        other.up.weight.mul_(1.5)
    scaled = select_blocks(other, SMTConfig(target_modules=TARGETS, density=0.2, block_size=4, score="magnitude"))
    larger = BlockSelection({"up": torch.tensor([[99, 99]], dtype=torch.int32)}, {"up": BlockGrid.fit((400, 400), 4)})
    for avoid, said in (
        (scaled, "avoid: up: the base weights are not those expected"),
        (larger, "avoid: up: the selection to avoid is for a 400 x 400 weight"),
    ):
        with pytest.raises(ValueError, match=said):
            get_peft_model(mlp(), SMTConfig(target_modules=TARGETS, selection=made, avoid=avoid))


def test_selections_of_another_model_are_refused_by_module():
    other = mlp()
    with torch.no_grad():
        other.up.weight.mul_(1.5)
    config = {"target_modules": TARGETS, "density": 0.2, "block_size": 4, "score": "magnitude"}
    made = select_blocks(other, SMTConfig(**config))
    with pytest.raises(ValueError, match="avoid: up: the base weights are not those expected"):
        select_blocks(mlp(), SMTConfig(**config, avoid=made))
    wide = BlockSelection({"up": torch.zeros(1, 2, dtype=torch.int32)}, {"up": BlockGrid.fit((4, 4), 4)})
    with pytest.raises(ValueError, match="avoid: up: the selection to avoid is for a 4 x 4 weight"):
        mlp_selection(avoid=wide)
    with pytest.raises(FileNotFoundError, match="there is no selection file at none"):
        mlp_selection(avoid="none")
    with pytest.raises(ValueError, match="avoid must be a BlockSelection"):
        SMTConfig(avoid=[3])


def test_experts_are_avoided_one_by_one():
    settings = {"target_modules": [], "target_parameters": ["experts.down_proj"], "block_size": 4, "density": 0.4}
    model = tiny_mixtral()
    first = select_blocks(model, SMTConfig(**settings, score="magnitude"))
    second = select_blocks(model, SMTConfig(**settings, score="magnitude", avoid=first))
    assert first.blocks.keys() == second.blocks.keys() and second.num_blocks == first.num_blocks
    assert_disjoint(first, second)


def test_it_is_saved_nowhere(tmp_path):
    model = tiny_llama()
    other = select_blocks(model, SMTConfig(density=0.1, score="random"))
    config = SMTConfig(density=0.1, score="random", seed=1, avoid=other)
    assert "avoid" not in config.to_dict()
    get_peft_model(model, config).save_pretrained(tmp_path)
    assert "avoid" not in (tmp_path / "adapter_config.json").read_text()
