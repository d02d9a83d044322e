"""Scores that are gathered while a model trains."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from helpers import batch as llama_batch
from helpers import tiny_llama
from peft import get_peft_model
from regrown import batch, small
from scheduled import adapted
from torch import nn

from smt_peft import SMTConfig
from smt_peft.schedules.trained import trained_blocks
from smt_peft.selection.scores import GradientScore, block_means
from smt_peft.selection.taps import TrainingTaps
from smt_peft.tuner.layer import SMTLayer


class TestScores:
    """What the taps see while somebody else trains, against dense gradients of a model whose weights require them."""

    @staticmethod
    def watched(model, blocks):
        layers = {m.smt_name: m for m in model.modules() if isinstance(m, SMTLayer)}
        return TrainingTaps(
            {name: layers[name] for name in blocks},
            {name: GradientScore(name, b.weight, b.grid, "grad_abs") for name, b in blocks.items()},
        )

    @staticmethod
    def dense(base, batches):
        """Mean |gradient| of the blocks' grids, summed over batches."""
        base.requires_grad_(True)
        sums = {}
        for inputs in batches:
            base.zero_grad()
            base(**inputs).loss.backward()
            for name, parameter in base.named_parameters():
                sums[name] = sums.get(name, 0) + parameter.grad.abs()
        return sums

    @pytest.mark.parametrize("reentrant", [None, False, True])
    def test_they_are_the_dense_gradients_of_every_micro_batch(self, reentrant):
        torch.manual_seed(0)
        model = tiny_llama().train()
        base = copy.deepcopy(model)
        batches = [llama_batch(seed=seed) for seed in range(3)]
        model = get_peft_model(model, SMTConfig(block_size=8, density=0.1, score="random"))
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        blocks = trained_blocks(model)
        taps = self.watched(model, blocks)
        with taps.installed():
            for inputs in batches:
                # Also passes that nobody learns from.
                with torch.no_grad():
                    model(**inputs)
                model(**inputs).loss.backward()
        truth = self.dense(base, batches)
        for name, module in blocks.items():
            wanted = block_means(truth[f"{name}.weight"], module.grid)
            torch.testing.assert_close(taps.scores[name].sums, wanted, rtol=1e-4, atol=1e-8)
        assert not taps._pairs and not any(m._forward_hooks for m in taps.layers.values())

    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_after_an_evaluation_a_module_is_let_go_as_soon_as_backward_has_left_it(self, checkpointing):
        model = adapted(layers=2).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        taps, held = self.watched(model, trained_blocks(model)), []
        for score in taps.scores.values():
            score.add = lambda pairs: held.append(len(taps._pairs))
        with taps.installed():
            with torch.no_grad():
                model.eval()(**llama_batch())
            model.train()(**llama_batch()).loss.backward()
        assert held == [0] * len(taps.scores)

    def test_uses_of_a_shared_module_are_one_gradient(self):
        torch.manual_seed(0)
        shared = nn.Sequential(nn.Linear(12, 12), nn.Tanh())
        model = nn.ModuleDict({"shared": shared})
        model.forward = lambda x: shared(shared(x))
        reference = copy.deepcopy(shared)
        adapted_model = get_peft_model(
            model, SMTConfig(target_modules=["0"], block_size=4, density=0.3, score="random")
        )
        blocks = trained_blocks(adapted_model)
        [name] = blocks
        taps = self.watched(adapted_model, blocks)
        x = torch.randn(5, 12)
        inner = adapted_model.base_model.model["shared"]
        with taps.installed():
            inner(inner(x)).square().sum().backward()
        reference(reference(x)).square().sum().backward()
        wanted = block_means(reference[0].weight.grad.abs(), blocks[name].grid)
        torch.testing.assert_close(taps.scores[name].sums, wanted)

    def test_a_batch_that_overflows_is_left_out(self):
        _, model = small()
        blocks = trained_blocks(model)
        taps = self.watched(model, blocks)
        x, y = batch(1)
        with taps.installed():
            (model(x) - y).square().mean().backward()
            before = {name: score.sums.clone() for name, score in taps.scores.items()}
            ((model(x) - y).square().mean() * math.inf).backward()
        assert all(torch.equal(score.sums, before[name]) for name, score in taps.scores.items())
        assert all(sums.any() for sums in before.values())

    def test_under_autocast_they_are_near(self):
        torch.manual_seed(0)
        model = tiny_llama().train()
        base = copy.deepcopy(model)
        model = get_peft_model(model, SMTConfig(block_size=8, density=0.1, score="random"))
        blocks = trained_blocks(model)
        taps = self.watched(model, blocks)
        with taps.installed(), torch.autocast("cpu", torch.bfloat16):
            loss = model(**llama_batch()).loss
        loss.backward()
        truth = self.dense(base, [llama_batch()])
        for name, module in blocks.items():
            wanted = block_means(truth[f"{name}.weight"], module.grid)
            assert (taps.scores[name].sums - wanted).norm() < 0.1 * wanted.norm()
