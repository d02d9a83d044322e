"""Choosing blocks in the experts of a mixture: every expert's matrix is scored and spread over by itself."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from helpers import batch
from mixtures import EXPERTS, Bank, tiny_gpt_oss, tiny_llama4, tiny_mixtral, tiny_qwen3_moe

from smt_peft import BlockSelection, SMTConfig, select_blocks
from smt_peft.bases.targets import find_targets
from smt_peft.ops import block_sums
from smt_peft.selection import warmup
from smt_peft.selection.scores import low_rank_magnitude, magnitude

MODELS = [tiny_mixtral, tiny_qwen3_moe, tiny_gpt_oss, tiny_llama4]
CASES = [
    (make, how)
    for make in MODELS
    for how in (["eager", "batched_mm", "grouped_mm"] if make is not tiny_llama4 else ["eager"])
]
GRADIENT_SCORES = {
    "grad_abs": lambda w, gs: sum(g.abs() for g in gs) / len(gs),
    "grad_sq": lambda w, gs: sum(g.square() for g in gs) / len(gs),
    "taylor": lambda w, gs: sum((w * g).abs() for g in gs) / len(gs),
    "grad_sum_abs": lambda w, gs: (sum(gs) / len(gs)).abs(),
}
BATCHES = [batch(seed=seed) for seed in range(2)]


def config(**settings):
    defaults = {"target_modules": None, "target_parameters": EXPERTS, "block_size": 8, "density": 0.2}
    return SMTConfig(**defaults | settings)


def built(make, how):
    model = make()
    if make is not tiny_llama4:
        model.set_experts_implementation(how)
    return model


def dense_gradients(model):
    """Per batch the gradient of every expert parameter, from a copy in which they all train."""
    model = copy.deepcopy(model).eval()
    gradients = {name: [] for name, _ in model.named_parameters() if name.endswith(tuple(EXPERTS))}
    for each in BATCHES:
        model.zero_grad()
        model(**each).loss.backward()
        for name, parameter in model.named_parameters():
            if name in gradients:
                gradients[name].append(parameter.grad.flatten(0, 1).clone())
    return gradients


@pytest.mark.parametrize("score", GRADIENT_SCORES)
@pytest.mark.parametrize(("make", "how"), CASES)
def test_scores_are_those_of_dense_gradients(make, how, score):
    model = built(make, how)
    expected = dense_gradients(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    selection = select_blocks(model, config(score=score), BATCHES, progress=False)
    assert sorted(selection.grids) == sorted(expected)
    weights = dict(model.named_parameters())
    for name, gradients in expected.items():
        grid = selection.grids[name]
        truth = GRADIENT_SCORES[score](weights[name].detach().flatten(0, 1), gradients)
        means = block_sums(truth, grid) / grid.effective_sizes()
        torch.testing.assert_close(selection.scores[name], means, rtol=1e-4, atol=1e-9)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.grad is None and parameter.requires_grad
    assert type(weights[name]) is torch.nn.Parameter


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("how", ["eager", "batched_mm", "grouped_mm"])
def test_checkpointing_gives_the_same(how, reentrant):
    model = built(tiny_mixtral, how)
    plain = select_blocks(model, config(), BATCHES, progress=False)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    again = select_blocks(model, config(), BATCHES, progress=False)
    assert again == plain
    for name, score in plain.scores.items():
        torch.testing.assert_close(again.scores[name], score)


@pytest.mark.parametrize("make", MODELS)
def test_activation_scores_go_by_the_inputs(make):
    model = make()
    selection = select_blocks(model, config(score="activation", density=0.1), BATCHES, progress=False)
    flipped = make in (tiny_gpt_oss, tiny_llama4)
    for name, scores in selection.scores.items():
        one = scores.unflatten(0, (4, -1))
        # All blocks that read the same inputs have the same score, and inputs differ.
        along, across = (2, 1) if flipped else (1, 2)
        assert torch.allclose(one, one.mean(along, keepdim=True).expand_as(one)), name
        assert one.std(across).max() > 0, name


@pytest.mark.parametrize("spread", ["free", "capped", "assignment"])
@pytest.mark.parametrize("score", ["magnitude", "low_rank_magnitude", "random", "diagonal", "grad_abs"])
def test_density_counts_experts(score, spread):
    model = tiny_mixtral()
    wanted = config(score=score, spread=spread, target_modules=["q_proj"])
    selection = select_blocks(model, wanted, BATCHES, progress=False)
    numel = sum(p.numel() for name, p in model.named_parameters() if name.endswith((*EXPERTS, "q_proj.weight")))
    assert sum(grid.numel for grid in selection.grids.values()) == numel
    assert 0.17 < selection.density <= 0.2
    assert selection.provenance["target_parameters"] == sorted(EXPERTS)
    assert selection.provenance["num_targets"] == 6
    assert selection.provenance["target_modules"] == ["q_proj"]


def test_weights_are_scored_expert_by_expert():
    model = tiny_gpt_oss()
    for score, of in (("magnitude", magnitude), ("low_rank_magnitude", lambda w, g: low_rank_magnitude(w, g, 0))):
        selection = select_blocks(model, config(score=score))
        for name, scores in selection.scores.items():
            weight, grid = dict(model.named_parameters())[name], selection.grids[name]
            one = type(grid)(grid.rows // 4, grid.cols, *grid.block_shape)
            torch.testing.assert_close(scores, torch.cat([of(expert, one) for expert in weight]))


def test_the_diagonal_is_each_experts_own():
    selection = select_blocks(tiny_mixtral(), config(score="diagonal", num_blocks=4 * 12, density=None))
    blocks = selection.blocks["model.layers.0.mlp.experts.gate_up_proj"]
    # 96 x 32 in blocks of 8: twelve row stripes and four column stripes in each of four experts.
    expected = [(expert * 12 + row, row % 4) for expert in range(4) for row in range(12)]
    assert [tuple(block) for block in blocks.tolist()] == expected


def test_caps_and_rounds_count_within_an_expert():
    settings = {"score": "grad_abs", "max_lora_rank": 8, "density": 0.5}
    selection = select_blocks(tiny_mixtral(), config(**settings), BATCHES, progress=False)
    for name, blocks in selection.blocks.items():
        stripes = selection.grids[name].row_stripes // 4
        for expert in range(4):
            mine = blocks[blocks[:, 0] // stripes == expert]
            assert min(len(mine[:, 0].unique()), len(mine[:, 1].unique())) <= 1
    settings = {"score": "grad_abs", "spread": "assignment", "num_blocks": 4 * 4, "density": None}
    selection = select_blocks(tiny_mixtral(), config(**settings), BATCHES, progress=False)
    rows, cols = zip(*selection.blocks["model.layers.0.mlp.experts.gate_up_proj"].tolist(), strict=True)
    # One round: a column stripe may come up once in each expert.
    assert len(set(rows)) == 16
    assert len({(row // 12, col) for row, col in zip(rows, cols, strict=True)}) == 16


def test_a_budget_may_name_an_expert():
    budget = {r"gate_up_proj\[0\]": 0.5, r"down_proj": 0.5}
    selection = select_blocks(tiny_mixtral(), config(budget=budget, score="random", density=0.05))
    for name, blocks in selection.blocks.items():
        if "gate_up" in name:
            assert (blocks[:, 0] < selection.grids[name].row_stripes // 4).all()


def test_a_parameter_may_have_a_density_of_its_own():
    """Which its experts share."""
    settings = {"score": "grad_abs", "density": 0.1, "density_pattern": {"gate_up_proj": 0.4}}
    for block_size in (8, "auto"):
        wanted = config(**settings, block_size=block_size)
        selection = select_blocks(tiny_mixtral(), wanted, BATCHES[:1], progress=False)
        for name, blocks in selection.blocks.items():
            share = selection.grids[name].effective_numel(blocks) / selection.grids[name].numel
            assert share == pytest.approx(0.4 if "gate_up" in name else 0.1, abs=0.03)
            assert selection.grids[name].block_shape == ((8, 8) if "gate" in name or block_size == 8 else (4, 4))


def test_one_dense_gradient_of_one_expert_at_a_time(monkeypatch):
    largest = []
    real = warmup.GradientScore.add

    def add(self, pairs):
        largest.append((self.name, self.grid.numel, len(pairs)))
        real(self, pairs)

    monkeypatch.setattr(warmup.GradientScore, "add", add)
    select_blocks(tiny_mixtral(), config(), BATCHES[:1], progress=False)
    assert len({name for name, _, _ in largest}) == 16
    assert max(numel for _, numel, _ in largest) == 96 * 32


def test_experts_that_see_no_token_are_named():
    one = {"input_ids": torch.tensor([[3]]), "labels": torch.tensor([[3]])}
    one = {key: value.repeat(1, 2) for key, value in one.items()}
    with pytest.warns(UserWarning, match=r"targeted modules were not reached.*experts\.\w+\[\d\]"):
        selection = select_blocks(tiny_mixtral(experts=8), config(), [one], progress=False)
    assert (selection.scores["model.layers.1.mlp.experts.down_proj"] == 0).any()


def test_heights_that_do_not_divide_an_expert_are_lowered_and_said(caplog, monkeypatch):
    monkeypatch.setattr("smt_peft.say._said", set())
    caplog.set_level(logging.INFO, logger="smt_peft")
    selection = select_blocks(tiny_mixtral(), config(block_size=20, score="random"))
    heights = {name.rpartition(".")[2]: grid.block_shape for name, grid in selection.grids.items()}
    # 96 rows of 32, and 32 rows of 48.
    assert heights == {"gate_up_proj": (16, 20), "down_proj": (16, 20)}
    assert "blocks of gate_up_proj are 16 rows high instead of 20, which does not divide the 96 rows" in caplog.text
    assert len([line for line in caplog.messages if "high instead of" in line]) == 2
    whole = select_blocks(tiny_mixtral(), config(block_size=[-1, 1], score="random", density=0.5))
    assert {grid.block_rows for grid in whole.grids.values()} == {96, 32}


def test_a_selection_of_experts_is_used_saved_and_loaded(tmp_path):
    model = tiny_mixtral()
    selection = select_blocks(model, config(), BATCHES, progress=False)
    selection.save(tmp_path / "selection.safetensors")
    again = BlockSelection.load(tmp_path / "selection.safetensors")
    assert again == selection
    from peft import get_peft_model

    adapted = get_peft_model(model, config(selection=again))
    for name, blocks in selection.blocks.items():
        layer = adapted.get_base_model().get_submodule(name)
        assert torch.equal(layer.smt_blocks["default"].index, blocks)
    scored = select_blocks(adapted, config(), BATCHES, progress=False)
    assert scored == selection


def test_kernels_that_cannot_be_tapped_give_way_to_eager_meanwhile():
    model = tiny_mixtral()
    expected = select_blocks(model, config(), BATCHES, progress=False)
    for name in ("sonicmoe", "deepgemm"):
        model.config._experts_implementation_internal = name
        assert select_blocks(model, config(), BATCHES, progress=False) == expected
        assert model.config._experts_implementation == name


def test_a_use_that_cannot_be_tapped_is_an_error_and_leaves_the_model():
    model = Bank(lambda m, x: torch.einsum("tk,enk->etn", x, m.stack).square().sum())
    with pytest.raises(RuntimeError, match=r"bank\.stack: the module computes 'einsum'.*score without data"):
        select_blocks(model, config(target_parameters=["bank.stack"]), [torch.randn(2, 8)], progress=False)
    assert type(model.bank.stack) is torch.nn.Parameter and not model.bank._forward_hooks


def test_matrices_that_are_no_experts():
    model = Bank(lambda m, x: (x @ m.one.T).square().sum())
    settings = {"target_parameters": ["bank.one"], "block_size": 4, "density": 0.5}
    selection = select_blocks(model, config(**settings), [torch.randn(2, 8)], progress=False)
    assert list(selection.scores) == ["bank.one"] and selection.scores["bank.one"].shape == (3, 2)
    assert list(find_targets(model, config(**settings))) == ["bank.one"]


def test_the_meta_device():
    with torch.device("meta"):
        model = tiny_mixtral()
    selection = select_blocks(model, config(score="diagonal"))
    assert len(selection.blocks) == 4
