"""Budgets, scopes and messages of the choice."""

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from smt_peft.bases.target import Target
from smt_peft.blocks import BlockGrid
from smt_peft.config import SMTConfig
from smt_peft.selection import select_without_data, spread
from smt_peft.selection.budget import choose_blocks, choose_pattern, make_scopes, module_seed

SHAPES = {
    "layers.0.q": (16, 16),
    "layers.0.up": (24, 16),
    "layers.1.q": (16, 16),
    "layers.1.up": (24, 16),
    "head": (10, 20),
}


def prepared(seed=0, shapes=SHAPES, **settings_):
    config = SMTConfig(**{"block_size": 4} | settings_)
    grids = {name: config.grid(shape) for name, shape in shapes.items()}
    generator = torch.Generator().manual_seed(seed)
    scores = {name: torch.rand(grid.stripes, generator=generator) for name, grid in grids.items()}
    return scores, grids, config


def weights(chosen, grids):
    return sum(grids[name].effective_numel(blocks) for name, blocks in chosen.items())


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.INFO, logger="smt_peft")
    return lambda: [record.message for record in caplog.records]


@settings(max_examples=60, deadline=None)
@given(
    st.floats(0.001, 1),
    st.sampled_from(["global", "per_module", "per_layer"]),
    st.sampled_from(["free", "capped", "assignment"]),
    st.integers(1, 9),
    st.integers(0, 3),
)
def test_density_is_an_upper_bound_and_is_met(density, budget, spread, side, seed):
    scores, grids, config = prepared(seed, density=density, budget=budget, spread=spread, block_size=side)
    for chosen in (
        choose_blocks(scores, grids, config),
        choose_pattern("random", grids, config),
        choose_pattern("diagonal", grids, config),
    ):
        for name, blocks in chosen.items():
            grids[name].check_blocks(blocks, name)
            assert len(blocks)
        for scope in make_scopes(grids, config):
            mine = {name: chosen[name] for name in scope.names if name in chosen}
            full = max(grids[name].block_rows * grids[name].block_cols for name in scope.names)
            spent = weights(mine, grids)
            total = sum(grids[name].numel for name in scope.names)
            assert spent <= density * total + 1e-6 or sum(map(len, mine.values())) == 1
            assert spent > density * total - 1 - full
            assert mine


@pytest.mark.parametrize("spread", ["free", "capped", "assignment"])
@pytest.mark.parametrize("budget", ["global", "per_module", "per_layer", {"": 1.0}])
def test_density_one_takes_everything(spread, budget):
    scores, grids, config = prepared(density=1.0, spread=spread, budget=budget, block_size=(3, 7))
    for chosen in (choose_blocks(scores, grids, config), choose_pattern("random", grids, config)):
        assert {name: len(blocks) for name, blocks in chosen.items()} == {n: g.num_blocks for n, g in grids.items()}


@pytest.mark.parametrize("spread", ["free", "capped", "assignment"])
def test_num_blocks_counts_within_the_scope(spread):
    for budget, scopes in (("global", 1), ("per_module", 5), ("per_layer", 3)):
        scores, grids, config = prepared(num_blocks=7, budget=budget, spread=spread)
        for chosen in (choose_blocks(scores, grids, config), choose_pattern("random", grids, config)):
            assert sum(map(len, chosen.values())) == 7 * scopes


def test_per_layer_groups_by_the_first_number():
    _, grids, config = prepared(num_blocks=1, budget="per_layer")
    assert {scope.label: scope.names for scope in make_scopes(grids, config)} == {
        "layer layers.0": ["layers.0.q", "layers.0.up"],
        "layer layers.1": ["layers.1.q", "layers.1.up"],
        "module head": ["head"],
    }


def test_global_free_takes_the_best_of_all():
    scores, grids, config = prepared(num_blocks=9, budget="global", spread="free")
    chosen = choose_blocks(scores, grids, config)
    best = sorted(torch.cat([score.flatten() for score in scores.values()]).tolist(), reverse=True)[:9]
    got = [scores[name][r, c].item() for name, blocks in chosen.items() for r, c in blocks.tolist()]
    assert sorted(got, reverse=True) == best


def test_map_spends_shares_of_the_whole_budget():
    scores, grids, config = prepared(density=0.2, budget={r"\.q$": 0.25, r"layers": 0.75})
    total = sum(grid.numel for grid in grids.values())
    chosen = choose_blocks(scores, grids, config)
    assert "head" not in chosen
    q = weights({n: b for n, b in chosen.items() if n.endswith("q")}, grids)
    up = weights({n: b for n, b in chosen.items() if n.endswith("up")}, grids)
    assert 0.25 * 0.2 * total - 16 < q <= 0.25 * 0.2 * total
    assert 0.75 * 0.2 * total - 16 < up <= 0.75 * 0.2 * total
    scores, grids, config = prepared(num_blocks=8, budget={"q": 0.5, "up": 0.25})
    assert sum(map(len, choose_blocks(scores, grids, config).values())) == 6


def test_map_errors_name_the_regex():
    scores, grids, config = prepared(density=0.1, budget={"nothing": 0.5})
    with pytest.raises(ValueError, match="budget\\['nothing'\\] matches none .* layers.0.q"):
        choose_blocks(scores, grids, config)
    scores, grids, config = prepared(density=0.1, budget={"q": 0.5, r"0\.q": 0.5})
    with pytest.raises(ValueError, match="earlier entry has taken, such as layers.0.q"):
        choose_blocks(scores, grids, config)


def test_more_than_there_is_is_an_error():
    scores, grids, config = prepared(num_blocks=17)
    with pytest.raises(ValueError, match=r"module layers.0.q: 17 blocks are asked for, but it has only 16"):
        choose_blocks(scores, grids, config)
    scores, grids, config = prepared(density=0.9, budget={"head": 1.0})
    with pytest.raises(ValueError, match=r"budget\['head'\]: .* weights are asked for, but it has only 200"):
        choose_pattern("random", grids, config)


def test_decimal_density_is_exact():
    grid = BlockGrid(10, 10, 1, 1)
    chosen = choose_blocks({"m": torch.rand(10, 10)}, {"m": grid}, SMTConfig(block_size=1, density=0.29))
    assert len(chosen["m"]) == 29


def test_a_budget_below_one_block_gives_one_and_says_so(lines):
    scores, grids, config = prepared(density=0.001)
    chosen = choose_blocks(scores, grids, config)
    for name, blocks in chosen.items():
        assert grids[name].flatten(blocks).tolist() == [int(scores[name].argmax())]
    assert [line for line in lines() if "below one block in 5 places (the first: module layers.0.q)" in line]
    scores, grids, config = prepared(density=0.001, budget="global")
    [(name, blocks)] = choose_blocks(scores, grids, config).items()
    assert scores[name].max() == max(score.max() for score in scores.values())
    assert sum(map(len, choose_pattern("diagonal", grids, config).values())) == 1


def test_clipped_blocks_are_said(lines):
    scores, grids, config = prepared(density=0.5, block_size=18)
    choose_blocks(scores, grids, config)
    assert [line for line in lines() if "block_size=18 is larger" in line and "layers.0.q" in line]


def test_caps_that_leave_too_little_are_said(lines):
    scores, grids, config = prepared(density=0.5, max_column_share=0.25)
    chosen = choose_blocks(scores, grids, config)
    assert all(len(torch.unique(blocks[:, 1])) == 1 for blocks in chosen.values())
    assert {n: len(b) for n, b in chosen.items()} == {n: g.row_stripes for n, g in grids.items()}
    assert [line for line in lines() if "leave fewer blocks than the budget wants in 5 places" in line]


def test_max_lora_rank_bounds_the_rank_of_the_delta():
    scores, grids, config = prepared(density=0.4, max_lora_rank=9)
    for name, blocks in choose_blocks(scores, grids, config).items():
        delta = torch.zeros(grids[name].shape)
        for r, c in blocks.tolist():
            delta[r * 4 : r * 4 + 4, c * 4 : c * 4 + 4].normal_()
        assert torch.linalg.matrix_rank(delta) <= 9


def test_counts_override_budget_and_caps():
    scores, grids, config = prepared(density=0.01, max_column_share=0.1)
    counts = {"layers.1.up": 5, "head": 1}
    for chosen in (choose_blocks(scores, grids, config, counts), choose_pattern("diagonal", grids, config, counts)):
        assert {name: len(blocks) for name, blocks in chosen.items()} == counts
    with pytest.raises(ValueError, match="'elsewhere'.*another model"):
        choose_blocks(scores, grids, config, {"elsewhere": 1})
    with pytest.raises(ValueError, match="module head: 16 blocks are asked for"):
        choose_blocks(scores, grids, config, {"head": 16})


def test_module_seed_is_stable():
    assert module_seed(0, "layers.0.q") == 4285544669
    assert module_seed(1, "layers.0.q") != module_seed(0, "layers.0.q")


def targets_of(shapes, device="cpu"):
    torch.manual_seed(0)
    return {
        name: Target(name, nn.Linear(cols, rows, bias=False, device=device), False)
        for name, (rows, cols) in shapes.items()
    }


@pytest.mark.parametrize(
    "score", ["random", "diagonal", "magnitude", "small_magnitude", "low_rank_magnitude", "grad_abs"]
)
@pytest.mark.parametrize("how", ["free", "capped", "assignment"])
def test_without_data(score, how):
    config = SMTConfig(score=score, density=0.3, block_size=4, spread=how)
    first, again = (select_without_data(targets_of(SHAPES), config) for _ in range(2))
    assert first == again
    assert first.blocks.keys() == SHAPES.keys()
    assert 0.2 < first.density <= 0.3
    assert first.provenance["score"] == ("random" if score == "grad_abs" else score)
    counts = {"head": 3, "layers.0.q": 2}
    grids = {"head": BlockGrid(10, 20, 2, 5)}
    counted = select_without_data(targets_of(SHAPES), config, counts, grids)
    assert {name: len(blocks) for name, blocks in counted.blocks.items()} == counts
    assert counted.grids["head"] == grids["head"]


def test_small_magnitude_takes_the_blocks_of_least_mean_in_every_matrix():
    targets = targets_of({"a": (16, 24), "b": (12, 20)})
    targets["b"].module.weight.data.mul_(100)
    config = SMTConfig(score="small_magnitude", density=0.25, block_size=4, spread="free", budget="per_module")
    chosen = select_without_data(targets, config)
    for name, target in targets.items():
        rows, cols = target.module.weight.shape
        means = target.module.weight.detach().abs().view(rows // 4, 4, cols // 4, 4).mean((1, 3))
        least = means.flatten().argsort()[: len(chosen.blocks[name])]
        found = chosen.blocks[name][:, 0] * (cols // 4) + chosen.blocks[name][:, 1]
        assert sorted(found.tolist()) == sorted(least.tolist()) and len(least) == means.numel() // 4


def test_random_hangs_on_the_seed_alone():
    first, second = (
        select_without_data(targets_of(SHAPES), SMTConfig(score="random", density=0.3, seed=seed)) for seed in (1, 2)
    )
    assert first != second
    torch.manual_seed(7)
    state = torch.get_rng_state()
    select_without_data(targets_of({"big": (300, 300)}), SMTConfig(score="low_rank_magnitude"))
    torch.manual_seed(7)
    assert torch.equal(state, torch.get_rng_state())


def test_weightless_scores_work_on_the_meta_device(lines, monkeypatch):
    shapes = {f"layers.{i}.up": (8192, 8192) for i in range(8)}
    targets = targets_of(shapes, device="meta")

    def never(*args, **kwargs):
        raise AssertionError("a matching of 2048 x 2048 blocks takes seconds; a random one is a permutation")

    monkeypatch.setattr(spread, "linear_sum_assignment", never)
    for score in ("random", "diagonal"):
        for budget in ("per_module", "global"):
            config = SMTConfig(score=score, density=0.01, block_size=4, budget=budget)
            selection = select_without_data(targets, config)
            assert selection.num_blocks == 8 * 41943 if budget == "per_module" else 335544
            rows, cols = selection.stripe_coverage()
            assert rows == cols == 1
    fallen = select_without_data(targets, SMTConfig(score="magnitude", density=0.01))
    assert fallen.provenance["score"] == "random"
    assert sum("meta device" in line for line in lines()) <= 1


def test_wrapped_diagonal_under_caps():
    targets = targets_of({"m": (32, 32)})
    capped = select_without_data(
        targets, SMTConfig(score="diagonal", density=0.25, block_size=4, spread="capped", max_column_share=0.5)
    ).blocks["m"]
    assert len(torch.unique(capped[:, 1])) <= 4
    assert sum(int(row == col) for row, col in capped.tolist()) == 4
    plain = select_without_data(targets, SMTConfig(score="diagonal", density=0.125, block_size=4)).blocks["m"]
    assert plain.tolist() == [[i, i] for i in range(8)]
