"""Channels chosen for several matrices at once: the same on every side, the best, and within the budget."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import batch, tiny_gpt2, tiny_llama
from torch import nn

from smt_peft import BlockSelection, SMTConfig, select_blocks
from smt_peft.bases.couplings import find_couplings

DATA = [batch(seed=1), batch(seed=2)]


def chosen(model: nn.Module, **settings) -> BlockSelection:
    config = SMTConfig(**{"coupled": "both", "density": 0.3} | settings)
    return select_blocks(model, config, DATA if config.needs_data else None, progress=False)


def channels(model: nn.Module, selection: BlockSelection) -> dict[str, list[set[int]]]:
    """Per coupling the channels in which each member's blocks lie."""
    found = {}
    for coupling in find_couplings(model):
        found[coupling.name] = sides = []
        for member in coupling.members:
            if member.name in selection.blocks:
                lines = selection.blocks[member.name][:, 0 if member.by_rows else 1]
                stripes = member.stripes(torch.arange(coupling.channels)).tolist()
                sides.append({stripes.index(line) for line in lines.tolist() if line in stripes})
    return found


@pytest.mark.parametrize("score", ["random", "grad_abs", "taylor", "magnitude", "activation", "grad_sum_abs"])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_all_matrices_hold_the_same_channels(make, score):
    model = make()
    for sides in channels(model, chosen(model, score=score)).values():
        assert len(sides) in (2, 3) and sides[0] and all(side == sides[0] for side in sides)


def test_query_heads_go_with_the_key_value_head_they_read():
    model = tiny_llama(layers=1)
    selection = chosen(model, score="random", density=0.5)
    v, o = (selection.layout(f"model.layers.0.self_attn.{name}") for name in ("v_proj", "o_proj"))
    # Four query heads of 8 read two key/value heads.
    assert (v.grid.block_shape, o.grid.block_shape) == ((8, 32), (32, 16))
    assert v.block_rows.tolist() == o.block_cols.tolist()


def test_the_values_of_a_fused_matrix_are_its_last_third():
    model = tiny_gpt2()
    selection = chosen(model, score="random", density=1.0)
    assert selection.blocks["transformer.h.0.attn.c_attn"][:, 0].tolist() == [8, 9, 10, 11]


@pytest.mark.parametrize("budget", ["per_module", "per_layer", "global"])
@pytest.mark.parametrize("coupled", ["both", "consumers"])
def test_the_best_channels_by_their_mean_score_within_the_budget(coupled, budget):
    """Against a choice made one channel at a time, in plain Python."""
    model = tiny_llama()
    settings = {"coupled": coupled, "budget": budget, "score": "grad_abs", "density": 0.4}
    selection = chosen(model, **settings)
    pools: dict[str, list] = {}
    for coupling in find_couplings(model):
        members = [m for m in coupling.members if coupled == "both" or not m.by_rows]
        group = {"per_module": coupling.name, "per_layer": coupling.name[:14], "global": ""}[budget]
        for channel in range(coupling.channels):
            total = cost = 0
            for member in members:
                size = selection.grids[member.name].block_rows * selection.grids[member.name].block_cols
                total += float(selection.scores[member.name].flatten()[channel].double()) * size
                cost += size
            pools.setdefault(group, []).append((total / cost, cost, coupling.name, channel))
    expected: dict[str, set[int]] = {}
    for pool in pools.values():
        left = math.floor(0.4 * sum(cost for _, cost, _, _ in pool) + 1e-9)
        for _, cost, name, channel in sorted(pool, key=lambda entry: -entry[0]):
            if cost <= left:
                left -= cost
                expected.setdefault(name, set()).add(channel)
        assert left >= 0
    if budget == "per_module":
        # One head of two is more than 0.4 of them; one is taken all the same.
        expected = {name: found for name, found in expected.items() if "mlp" in name}
    found = {name: sides[0] for name, sides in channels(model, selection).items() if sides}
    assert {name: found[name] for name in expected} == expected
    if budget != "per_module":
        assert found.keys() == expected.keys() and selection.density <= 0.4


def test_a_pattern_gives_heads_a_density_of_their_own():
    """S2FT's ratios: 0.052 of the heads and 0.02 of the channels of a model whose layers share them."""
    model = tiny_llama(hidden=64, layers=4)
    selection = chosen(
        model, coupled="consumers", score="random", budget="global", density=0.02, density_pattern={".*attn.*": 0.25}
    )
    heads, rows = (
        sum(len(blocks) for name, blocks in selection.blocks.items() if part in name) for part in ("attn", "mlp")
    )
    assert (heads, rows) == (math.floor(0.25 * 2 * 4), math.floor(0.02 * 128 * 4))


def test_a_pattern_that_matches_rows_alone_is_refused():
    with pytest.raises(
        ValueError, match=r"density_pattern\['up_proj'\] .*match none of the 4 modules that read coupled"
    ):
        chosen(tiny_llama(), score="random", density_pattern={"up_proj": 0.1})


def test_a_budget_below_one_channel_gives_one(caplog):
    selection = chosen(tiny_llama(layers=1), score="random", density=0.001)
    assert all(len(blocks) == 1 for blocks in selection.blocks.values())


def test_the_draw_hangs_on_the_seed_and_on_nothing_else():
    first, again, other = (chosen(tiny_llama(), score="random", seed=seed) for seed in (0, 0, 1))
    assert first == again and first != other


@pytest.mark.parametrize(
    "settings",
    [
        {"block_size": 8},
        {"num_blocks": 4},
        {"spread": "capped"},
        {"budget": {"attn": 0.5}},
        {"max_column_share": 0.5},
        {"max_lora_rank": 4},
        {"target_parameters": ["experts.down_proj"]},
        {"score": "diagonal"},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_what_contradicts_channels_is_refused_by_name(settings):
    (name,) = settings
    with pytest.raises(ValueError, match=rf"^{name}=.* contradicts coupled='both': .*Leave {name} out"):
        SMTConfig(coupled="both", **settings)


def test_another_word_is_refused():
    with pytest.raises(ValueError, match="coupled must be 'both' .* got True"):
        SMTConfig(coupled=True)
