"""The operations as a compiler sees them."""

from __future__ import annotations

import pytest
import torch
from helpers import Mlp, random_layout
from peft import get_peft_model

from smt_peft import SMTConfig
from smt_peft.blocks import BlockGrid

LAYOUT = random_layout(BlockGrid.fit((30, 50), 8), 5)
BLOCKS = LAYOUT.blocks


def _operands():
    dy, x, weight = torch.randn(9, 30), torch.randn(9, 50), torch.randn(30, 50)
    return dy, x, weight, torch.randn(5, 8, 8) * LAYOUT.padding_mask()


def _calls():
    dy, x, weight, delta = _operands()
    moments = [[torch.zeros(5, 8, 8)], [torch.zeros(5, 8, 8)], [torch.zeros(0)], [torch.zeros(0)], [torch.ones(())]]
    numbers = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1, "seed": 0}
    return {
        "block_gather": ((weight, BLOCKS, 8, 8), {}),
        "block_scatter_": ((weight, delta, BLOCKS), {}),
        "block_grad": ((dy, x, BLOCKS, 8, 8), {}),
        "block_grad_": ((torch.zeros(5, 8, 8), dy, x, BLOCKS, True), {}),
        "block_scores": (([x], [dy], 8, 8, "abs"), {}),
        "block_matmul_": ((dy, x, delta, BLOCKS), {}),
        "block_matmul_ transposed": ((x, dy, delta, BLOCKS), {"transposed": True}),
        "swap_linear": ((x, weight, None, delta, BLOCKS), {}),
        "swap_matmul": ((dy, weight, delta, BLOCKS), {}),
        "block_adamw_": (([delta], [torch.randn(5, 8, 8)], *moments, None, None), numbers),
    }


@pytest.mark.parametrize("operation", _calls())
def test_opcheck(operation):
    args, kwargs = _calls()[operation]
    torch.library.opcheck(getattr(torch.ops.smt_peft, operation.split()[0]).default, args, kwargs)


class TestCompiled:
    """Forward and backward through SMT layers in one graph, with the numbers of eager code, compiled once."""

    @staticmethod
    def steps(model, batches, compiled, loss_of):
        run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        losses = []
        for batch in batches:
            loss = loss_of(run(**batch))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        return torch.stack(losses)

    @pytest.mark.parametrize("forward", ["swap", "additive"])
    def test_one_graph_without_break_and_without_recompiling(self, forward):
        torch._dynamo.reset()
        settings = {"target_modules": ["up", "down"], "block_size": 4, "num_blocks": 6, "score": "random"}
        base = Mlp()
        batches = [{"x": torch.randn(5, 20)} for _ in range(5)]
        losses = []
        for compiled in (False, True):
            torch.manual_seed(1)
            model = Mlp()
            model.load_state_dict(base.state_dict())
            model = get_peft_model(model, SMTConfig(**settings, forward=forward)).train()
            torch._dynamo.utils.counters.clear()
            losses.append(self.steps(model, batches, compiled, lambda y: y.square().mean()))
            weights = {name: p for name, p in model.named_parameters() if "base_layer" in name}
            assert all(torch.equal(p, dict(base.named_parameters())[_plain(name)]) for name, p in weights.items())
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
        assert not torch._dynamo.utils.counters["graph_break"]
        torch.testing.assert_close(*losses, rtol=1e-6, atol=1e-7)


def _plain(name):
    return name.removeprefix("base_model.model.").replace(".base_layer", "")


def test_dynamic_shapes_and_inductor():
    torch._dynamo.reset()
    torch.manual_seed(1)
    settings = {"target_modules": ["up", "down"], "block_size": 4, "num_blocks": 6, "score": "random"}
    model = get_peft_model(Mlp(), SMTConfig(**settings, init_weights=False)).train()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    delta = next(p for p in model.parameters() if p.requires_grad)
    for tokens in (5, 7, 12):
        x = torch.randn(tokens, 20)
        expected = model(x)
        (true,) = torch.autograd.grad(expected.square().sum(), delta)
        y = compiled(x)
        (ours,) = torch.autograd.grad(y.square().sum(), delta)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(ours, true)
