"""Blocks of an embedding table are scored as dense gradients would score them, one row per token id at a time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import batch, tiny_llama
from torch import nn

from smt_peft import SMTConfig, select_blocks
from smt_peft.config import SCORES
from smt_peft.selection.tables import look_ups_tapped

SETTINGS = {"target_modules": ["embed_tokens", "q_proj"], "density": 0.2, "block_size": 8}
BATCHES = [batch(seed=seed) for seed in range(3)]


class Scaled(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) * 3.0


class Tagger(nn.Module):
    """A table used twice in a pass, with a scaled one beside it."""

    def __init__(self, **rules):
        super().__init__()
        self.words, self.tags = nn.Embedding(30, 12, **rules), Scaled(7, 12)
        self.out = nn.Linear(12, 5)

    def forward(self, ids):
        return self.out(self.words(ids) * self.words(ids.flip(1)) + self.tags(ids % 7)).square().mean()


def dense_scores(model, names, batches, score, grids):
    """Scores by autograd over the whole tables."""
    sums = dict.fromkeys(names, 0)
    for each in batches:
        for name in names:
            model.get_submodule(name).weight.grad = None
            model.get_submodule(name).weight.requires_grad_(True)
        (model(**each).loss if isinstance(each, dict) else model(each)).backward()
        for name in names:
            weight = model.get_submodule(name).weight
            grad = weight.grad.double()
            dense = {"grad_abs": grad.abs(), "grad_sq": grad**2, "taylor": (weight.detach() * grad).abs()}
            sums[name] = sums[name] + dense.get(score, grad) / len(batches)
    scores = {}
    for name, dense in sums.items():
        grid = grids[name]
        dense = dense.abs() if score == "grad_sum_abs" else dense
        padded = F.pad(dense, (0, -grid.cols % grid.block_cols, 0, -grid.rows % grid.block_rows))
        blocks = padded.unflatten(1, (-1, grid.block_cols)).unflatten(0, (-1, grid.block_rows))
        scores[name] = (blocks.sum((1, 3)) / grid.effective_sizes()).abs()
    return scores


GRADIENT_SCORES = ["grad_abs", "grad_sq", "taylor", "mean_abs", "grad_sum_abs"]


@pytest.mark.parametrize("score", GRADIENT_SCORES)
@pytest.mark.parametrize("rules", [{}, {"padding_idx": 3, "scale_grad_by_freq": True}], ids=["plain", "ruled"])
def test_scores_are_those_of_dense_gradients(score, rules):
    model = Tagger(**rules)
    batches = [torch.randint(0, 30, (4, 6)) for _ in range(3)]
    config = SMTConfig(target_modules=["words", "tags"], density=0.3, block_size=8, score=score, budget="global")
    selection = select_blocks(model, config, batches, progress=False)
    truth = dense_scores(model, ["words", "tags"], batches, score, selection.grids)
    for name, expected in truth.items():
        atol = 1e-5 * expected.max().item()
        torch.testing.assert_close(selection.scores[name].double(), expected, rtol=1e-4, atol=atol)


@pytest.mark.parametrize("score", [score for score in SCORES if score != "activation"])
@pytest.mark.parametrize("tied", [False, True])
def test_every_score_but_activation_chooses_blocks_of_a_language_models_table(score, tied):
    selection = select_blocks(tiny_llama(tied=tied), SMTConfig(**SETTINGS, score=score), BATCHES, progress=False)
    assert len(selection.blocks["model.embed_tokens"]) == 6


def test_the_table_of_a_tied_model_is_scored_by_its_look_ups_alone():
    # The head's gradient reaches every row of the shared weight; look-ups reach the rows of the batch only.
    ids = {name: tensor % 16 for name, tensor in BATCHES[0].items()}
    config = SMTConfig(target_modules=["embed_tokens"], density=0.2, block_size=8)
    scores = select_blocks(tiny_llama(tied=True), config, [ids], progress=False).scores["model.embed_tokens"]
    assert scores[:2].all() and not scores[2:].any()


def test_activation_is_refused_by_name():
    with pytest.raises(ValueError, match=r"model\.embed_tokens: score='activation'.*token ids.*exclude_modules"):
        select_blocks(tiny_llama(), SMTConfig(**SETTINGS, score="activation"), BATCHES, progress=False)


def test_a_callable_sees_the_whole_table():
    seen = []

    def score(weight, grad):
        seen.append(tuple(grad.shape))
        return grad.abs()

    config = SMTConfig(**SETTINGS | {"target_modules": ["embed_tokens"]}, score=score)
    select_blocks(tiny_llama(), config, BATCHES, progress=False)
    assert seen == [(64, 32)] * 3


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_model_is_handed_back_as_it_was(checkpointing):
    model = tiny_llama().train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    plain = select_blocks(tiny_llama_like(model), SMTConfig(**SETTINGS), BATCHES, progress=False)
    own = model.model.embed_tokens.forward
    model.model.embed_tokens.forward = replaced = lambda *args, **kwargs: own(*args, **kwargs)
    selection = select_blocks(model, SMTConfig(**SETTINGS), BATCHES, progress=False)
    assert selection == plain
    assert model.model.embed_tokens.forward is replaced
    del model.model.embed_tokens.forward
    with pytest.raises(RuntimeError, match="no"), look_ups_tapped(model.model.embed_tokens, None):
        raise RuntimeError("no")
    assert "forward" not in vars(model.model.embed_tokens)


def tiny_llama_like(model):
    copy = tiny_llama()
    copy.load_state_dict(model.state_dict())
    return copy
