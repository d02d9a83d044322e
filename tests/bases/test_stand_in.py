"""Stand-ins for a weight: every use that a module may make of one."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from mixtures import (
    Bank,
    adapted,
    blocks_of,
    layers,
)

from smt_peft.bases.stand_in import StandIn


class TestStandIn:
    """Each use a module may make of a weight, against the same use of the merged weight."""

    USES = {
        "linear": lambda m, x: torch.stack([F.linear(x[e], m.stack[e]) for e in range(3)]),
        "linear with bias": lambda m, x: torch.stack([F.linear(x[e], m.stack[e], m.vector) for e in range(3)]),
        "tensor index": lambda m, x: torch.stack([F.linear(x[e], m.stack[torch.tensor(e)]) for e in range(3)]),
        "negative index": lambda m, x: F.linear(x[0], m.stack[-1]),
        "matmul": lambda m, x: torch.stack([x[e] @ m.stack[e].T for e in range(3)]),
        "from the left": lambda m, x: torch.stack([(m.stack[e] @ x[e].T).T for e in range(3)]),
        "mm": lambda m, x: torch.mm(x[1], m.stack[1].t()),
        "bmm": lambda m, x: torch.bmm(x, m.stack.transpose(1, 2)),
        "bmm from the left": lambda m, x: torch.bmm(m.stack, x.mT).mT,
        "batched matmul": lambda m, x: x @ m.stack.mT,
        "permuted": lambda m, x: torch.matmul(x, m.stack.permute(0, 2, 1)),
        "gathered": lambda m, x: torch.bmm(m.stack[torch.tensor([2, 0, 2])], x.mT).mT,
        "gathered, none": lambda m, x: torch.bmm(m.stack[torch.tensor([], dtype=torch.long)], x[:0].mT).mT + x.sum(),
        "grouped": lambda m, x: F.grouped_mm(
            x.flatten(0, 1), m.stack.mT, offs=torch.tensor([4, 4, 15], dtype=torch.int32)
        ),
        "converted to itself": lambda m, x: F.linear(x[0], m.stack[0].to(x.dtype).to(x.device).contiguous()),
        "operands by name": lambda m, x: (
            F.linear(input=x[0], weight=m.stack[0], bias=m.vector) + torch.mm(input=x[0], mat2=m.stack[1].t())
        ),
        "turned, then indexed": lambda m, x: x[0] @ m.stack.mT[1] + x[1] @ m.stack.transpose(-1, -2)[torch.tensor(2)],
        "one matrix": lambda m, x: F.linear(x, m.one),
        "one matrix, several times": lambda m, x: F.linear(x, m.one) + x @ m.one.T,
        "one row of x": lambda m, x: F.linear(x[0, 0], m.one),
    }
    UNKNOWN = {
        "einsum": lambda m, x: torch.einsum("etk,enk->etn", x, m.stack),
        "into another tensor": lambda m, x: (
            torch.mm(x[0].detach(), m.stack[0].t().detach(), out=torch.empty(5, 12)) + x.sum()
        ),
        "a vector from the right": lambda m, x: m.stack @ x[0, 0],
        "other axes": lambda m, x: x[0] @ m.stack.transpose(0, 1)[0].T,
        "chunks": lambda m, x: torch.cat([F.linear(x[0], part) for part in m.stack[0].chunk(2)], -1),
        "slices": lambda m, x: F.linear(x[0], m.stack[:, :4].sum(0)),
        "embedding": lambda m, x: F.embedding(torch.tensor([[1, 5]]), m.one),
        "a list": lambda m, x: F.linear(x, torch.cat([m.one, m.one])),
        "double": lambda m, x: F.linear(x.double(), m.stack[0].double()),
        "sum of a gathered": lambda m, x: m.stack[torch.tensor([0, 0, 1])].sum(0) * x.sum(),
    }

    @staticmethod
    def compare(use, training=True, forward="auto"):
        module = Bank(use)
        truth = copy.deepcopy(module)
        names = ["bank.stack", "bank.one"]
        settings = {"target_parameters": names, "block_size": 4, "density": 0.6, "forward": forward}
        model = adapted(module, **settings).train(training)
        parameters = dict(truth.named_parameters())
        with torch.no_grad():
            for name, layer in layers(model).items():
                parameters[name] += layer.get_delta_weight("default")
        x = torch.randn(3, 5, 8, requires_grad=True)
        x_truth = x.detach().clone().requires_grad_()
        y, expected = model(x), truth(x_truth)
        assert type(y) is torch.Tensor
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        upstream = torch.randn_like(expected)
        y.backward(upstream)
        expected.backward(upstream)
        torch.testing.assert_close(x.grad, x_truth.grad, rtol=1e-5, atol=1e-4)
        for name, layer in layers(model).items():
            ours, dense = layer.smt_blocks["default"].weight.grad, parameters[name].grad
            if dense is None or ours is None:
                assert (dense is None or not dense.any()) and (ours is None or not ours.any())
                continue
            torch.testing.assert_close(ours, blocks_of(dense, layer).to(ours.dtype), rtol=1e-5, atol=1e-4)

    @pytest.mark.parametrize("forward", ["swap", "additive"])
    @pytest.mark.parametrize("use", USES.values(), ids=list(USES))
    def test_known_uses(self, use, forward, caplog):
        caplog.set_level(logging.INFO, logger="smt_peft")
        self.compare(use, forward=forward)
        assert "dense copy" not in caplog.text

    @pytest.mark.parametrize("use", UNKNOWN.values(), ids=list(UNKNOWN))
    def test_other_uses_take_a_dense_copy_and_say_so(self, use, caplog, monkeypatch):
        monkeypatch.setattr("smt_peft.say._said", set())
        caplog.set_level(logging.INFO, logger="smt_peft")
        self.compare(use)
        assert len([line for line in caplog.messages if "dense copy" in line]) == 1

    def test_metadata_is_the_weights(self):
        seen = {}

        def use(m, x):
            if seen:
                return F.linear(x, m.one)
            seen.update(type=type(m.stack), shape=m.stack.shape, dtype=m.stack.dtype, device=m.stack.device)
            seen.update(size=m.stack.size(0), dim=m.stack.dim(), one=m.stack[0].shape, length=len(m.stack))
            seen.update(some=m.stack[torch.tensor([0, 1])].shape, turned=m.stack.mT.shape)
            return F.linear(x, m.one)

        self.compare(use)
        assert seen == {
            **{"type": StandIn, "shape": (3, 12, 8), "dtype": torch.float32, "device": torch.device("cpu")},
            **{"size": 3, "dim": 3, "one": (12, 8), "length": 3, "some": (2, 12, 8), "turned": (3, 8, 12)},
        }

    def test_a_gradient_that_is_not_recorded_is_an_error(self):
        class Hidden(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x, weight):
                return F.linear(x, weight)

            @staticmethod
            def backward(ctx, grad):
                return None, None

        model = adapted(Bank(lambda m, x: Hidden.apply(x, m.one)), target_parameters=["bank.one"], block_size=4)
        with pytest.raises(RuntimeError, match=r"bank\.one: .*silently stay frozen"):
            model(torch.randn(2, 8, requires_grad=True))
        with torch.no_grad():
            model(torch.randn(2, 8))

    def test_reading_the_memory_is_an_error(self):
        model = adapted(Bank(lambda m, x: m.one.untyped_storage()), target_parameters=["bank.one"], block_size=4)
        with pytest.raises(RuntimeError, match=r"bank\.one: untyped_storage reads the weight past"):
            model(torch.randn(2, 8))

    def test_a_weight_kept_beyond_the_call_is_an_error(self):
        kept = []
        model = adapted(Bank(lambda m, x: kept.append(m.one) or x), target_parameters=["bank.one"], block_size=4)
        model(torch.randn(2, 8))
        with pytest.raises(RuntimeError, match="after the call of its module"):
            F.linear(torch.randn(2, 8), kept[0])

    def test_the_module_is_as_before_after_an_exception(self):
        def fail(m, x):
            assert type(m.stack) is StandIn
            raise ArithmeticError

        model = adapted(Bank(fail), target_parameters=["bank.stack", "bank.one"], block_size=4)
        bank = model.get_base_model().bank.base_layer
        before = {name: id(p) for name, p in bank.named_parameters()}
        with pytest.raises(ArithmeticError):
            model(torch.randn(2, 8))
        assert {name: id(p) for name, p in bank.named_parameters()} == before
