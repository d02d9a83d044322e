"""`max_lora_rank` holds for what is chosen, whatever chooses it: no delta needs a higher rank to be LoRA exactly."""

from __future__ import annotations

import pytest
import torch
from helpers import Mlp
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from peft import get_peft_model

from smt_peft import SMTConfig, select_blocks
from smt_peft.config import BUDGETS, SCORES, SPREADS
from smt_peft.export.lora import convert_to_lora, exact_ranks

sides = st.integers(1, 12)
BATCHES = [torch.randn(4, 20, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(SCORES),
    st.sampled_from(SPREADS),
    st.sampled_from((*BUDGETS, {"up": 0.7, "down": 0.3})),
    st.one_of(sides, st.tuples(sides, sides), st.just((1, -1)), st.just((-1, 1)), st.just((-1, 3))),
    st.one_of(st.floats(0.001, 1.0), st.integers(1, 12)),
    st.sampled_from([1, 2, 4, 7, 8, 11, 16, 64]),
    st.sampled_from([None, 0.3]),
    st.booleans(),
)
def test_no_matrix_needs_a_higher_rank(score, spread, budget, size, amount, rank, share, avoids):
    model = Mlp()
    common = {"target_modules": ["up", "down"], "block_size": list(size) if isinstance(size, tuple) else size}
    amount = {"density": amount} if isinstance(amount, float) else {"num_blocks": amount}
    other = None
    if avoids:
        other = select_blocks(model, SMTConfig(**common, num_blocks=1, score="random", seed=1), progress=False)
    config = SMTConfig(
        **common,
        **amount,
        score=score,
        spread=spread,
        budget=budget,
        max_lora_rank=rank,
        max_column_share=share,
        avoid=other,
        init_weights=False,
    )
    try:
        made = select_blocks(model, config, BATCHES, loss_fn=lambda m, x: m(x).square().mean(), progress=False)
    except ValueError as error:
        # A block of this size has a higher rank, or there are not so many.
        assert "single block can have a higher rank" in str(error) or "are asked for, but" in str(error)
        assume(False)
    config.selection = made
    model = get_peft_model(model, config)
    ranks = exact_ranks(model)
    assert ranks and max(ranks.values()) <= rank
    form = convert_to_lora(model, "exact")
    assert form.config.r == max(form.ranks.values()) <= rank


@pytest.mark.parametrize("score", ["random", "diagonal", "magnitude"])
def test_blocks_that_are_chosen_without_a_selection_keep_to_it_too(score):
    config = SMTConfig(target_modules=["up", "down"], block_size=4, density=0.2, score=score, max_lora_rank=8)
    ranks = exact_ranks(get_peft_model(Mlp(), config))
    assert ranks.keys() == {"up", "down"} and max(ranks.values()) <= 8
