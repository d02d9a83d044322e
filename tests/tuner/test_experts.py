"""Blocks of bare parameters: the experts of a mixture, and any other 2-D or 3-D parameter."""

from __future__ import annotations

import copy
import logging
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_no_worse_than_torch, batch, tiny_llama
from mixtures import EXPERTS, Bank, tiny_gpt_oss, tiny_llama4, tiny_mixtral, tiny_qwen3_moe
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, Llama4ForCausalLM

from smt_peft import BlockSelection, SMTConfig, ops
from smt_peft.bases.stand_in import StandIn
from smt_peft.blocks import BlockGrid
from smt_peft.export.lora import convert_to_lora
from smt_peft.ops import swap
from smt_peft.optim import SMTAdamW
from smt_peft.tuner.experts import ParameterLayer, ParamWrapper
from smt_peft.tuner.layer import SMTLayer

SETTINGS = {
    "target_modules": None,
    "target_parameters": EXPERTS,
    "block_size": 8,
    "density": 0.3,
    "score": "random",
    "init_weights": False,
}
MODELS = [tiny_mixtral, tiny_qwen3_moe, tiny_gpt_oss, tiny_llama4]
IMPLEMENTATIONS = ["eager", "batched_mm", "grouped_mm"]
CASES = [(make, how) for make in MODELS for how in (IMPLEMENTATIONS if make is not tiny_llama4 else ["eager"])]


def built(make, how="eager"):
    model = make()
    if make is not tiny_llama4:
        model.set_experts_implementation(how)
    return model


def adapted(model, **settings):
    return get_peft_model(model, SMTConfig(**{**SETTINGS, **settings}))


def layers(model) -> dict[str, ParameterLayer]:
    return {module.smt_name: module for module in model.modules() if isinstance(module, ParameterLayer)}


def parameter_of(layer: SMTLayer) -> str:
    return layer.smt_name if isinstance(layer, ParameterLayer) else f"{layer.smt_name}.weight"


def with_deltas(base, model):
    """A copy of the base with the adapter's dense delta added in fp32, every expert trained in full."""
    truth = copy.deepcopy(base)
    parameters = dict(truth.named_parameters())
    with torch.no_grad():
        for name, layer in layers(model).items():
            parameters[name].copy_(parameters[name].double() + layer.get_delta_weight("default").double())
    return truth, parameters


def in_double(model):
    """PyTorch's grouped product knows no fp64."""
    if not isinstance(model, Llama4ForCausalLM):
        model.set_experts_implementation("eager")
    return model.double()


def blocks_of(dense, layer):
    layout = layer.smt_blocks["default"].layout()
    return ops.block_gather(dense.reshape(layout.grid.shape), layout)


class TestGradients:
    @pytest.mark.parametrize("forward", ["swap", "additive"])
    @pytest.mark.parametrize(("make", "how"), CASES)
    def test_they_are_the_dense_gradients_sub_blocks(self, make, how, forward):
        base = built(make, how)
        plain = copy.deepcopy(base)
        model = adapted(base, forward=forward).train()
        exact, _ = with_deltas(plain, model)
        ours = model(**batch())
        ours.loss.backward()
        torch_model, same = with_deltas(plain, model)
        theirs = torch_model.train()(**batch())
        theirs.loss.backward()
        exact = in_double(exact).train()
        expected = exact(**batch())
        expected.loss.backward()
        truth = dict(exact.named_parameters())
        assert_no_worse_than_torch(ours.logits.detach(), theirs.logits.detach(), expected.logits.detach())
        assert len(layers(model)) == 4
        for name, layer in layers(model).items():
            ours = layer.smt_blocks["default"].weight.grad
            assert ours.any()
            assert_no_worse_than_torch(ours, blocks_of(same[name].grad, layer), blocks_of(truth[name].grad, layer))

    @pytest.mark.parametrize("how", IMPLEMENTATIONS)
    def test_experts_that_see_no_token_get_none(self, how):
        base = built(lambda: tiny_mixtral(experts=8), how)
        model = adapted(base, density=1.0).train()
        model(input_ids=torch.tensor([[3]]), labels=torch.tensor([[3]])).loss.backward()
        model(input_ids=torch.tensor([[3, 4]]), labels=torch.tensor([[3, 4]])).loss.backward()
        for name, layer in layers(model).items():
            used = layer.smt_blocks["default"].weight.grad.unflatten(0, (8, -1)).flatten(1).any(1)
            # Two tokens of two experts each.
            assert 0 < used.sum() <= 4, name

    def test_blocks_in_no_expert_that_is_used_get_zeros(self):
        """Not None: DDP waits for the gradient of every parameter, and momentum goes on."""
        model = Bank(lambda m, x: F.linear(x, m.stack[2]))
        grid = BlockGrid(36, 8, 4, 4)
        blocks = {"bank.stack": torch.tensor([[0, 0], [5, 1]], dtype=torch.int32)}
        selection = BlockSelection(blocks, {"bank.stack": grid})
        model = adapted(model, target_parameters=["bank.stack"], block_size=4, selection=selection).train()
        x = torch.randn(2, 8, requires_grad=True)
        upstream = torch.randn(2, 12)
        model(x).backward(upstream)
        assert not layers(model)["bank.stack"].smt_blocks["default"].weight.grad.any()
        expected = upstream @ model.get_base_model().bank.base_layer.stack[2]
        assert torch.equal(x.grad, expected)

    @pytest.mark.parametrize("reentrant", [False, True])
    @pytest.mark.parametrize("how", IMPLEMENTATIONS)
    def test_checkpointing_changes_none(self, how, reentrant):
        def gradients(checkpointing):
            torch.manual_seed(0)
            model = adapted(built(tiny_mixtral, how)).train()
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
                model.enable_input_require_grads()
            model(**batch()).loss.backward()
            return [p.grad for p in model.parameters() if p.requires_grad and p.ndim == 3]

        for with_it, without in zip(gradients(True), gradients(False), strict=True):
            assert torch.equal(with_it, without)

    @pytest.mark.parametrize(("make", "how"), CASES)
    def test_autocast(self, make, how):
        base = built(make, how)
        plain = copy.deepcopy(base)
        model = adapted(base).train()
        torch_model, same = with_deltas(plain, model)
        exact, truth = with_deltas(plain, model)
        exact(**batch()).loss.backward()
        with torch.autocast("cpu", torch.bfloat16):
            torch_model(**batch()).loss.backward()
            model(**batch()).loss.backward()
        for name, layer in layers(model).items():
            ours = layer.smt_blocks["default"].weight.grad
            assert ours.dtype == torch.float32
            assert_no_worse_than_torch(
                ours, blocks_of(same[name].grad, layer).bfloat16(), blocks_of(truth[name].grad, layer)
            )

    @pytest.mark.parametrize(("make", "how"), CASES)
    def test_a_bf16_base(self, make, how):
        base = built(make, how).bfloat16()
        plain = copy.deepcopy(base)
        model = adapted(base).train()
        torch_model, same = with_deltas(plain, model)
        torch_model(**batch()).loss.backward()
        exact = in_double(copy.deepcopy(torch_model))
        exact.zero_grad()
        exact(**batch()).loss.backward()
        truth = dict(exact.named_parameters())
        model(**batch()).loss.backward()
        for name, layer in layers(model).items():
            blocks = layer.smt_blocks["default"].weight
            assert blocks.dtype == blocks.grad.dtype == torch.float32
            assert_no_worse_than_torch(
                blocks.grad, blocks_of(same[name].grad, layer), blocks_of(truth[name].grad, layer)
            )

    @pytest.mark.parametrize("how", IMPLEMENTATIONS)
    def test_all_blocks_train_like_the_whole_parameter(self, how):
        base = built(tiny_mixtral, how)
        full = copy.deepcopy(base).requires_grad_(False).train()
        model = adapted(base, density=1.0, init_weights=True).train()
        trained = [p for name, p in full.named_parameters() if name.endswith(tuple(EXPERTS))]
        for parameter in trained:
            parameter.requires_grad_(True)
        ours = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5, momentum=0.9)
        theirs = torch.optim.SGD(trained, lr=0.5, momentum=0.9)
        for step in range(4):
            losses = []
            for each, optimizer in ((model, ours), (full, theirs)):
                loss = each(**batch(seed=step)).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
            assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        merged = dict(model.merge_and_unload().named_parameters())
        for name, parameter in full.named_parameters():
            assert torch.allclose(merged[name], parameter, rtol=1e-4, atol=1e-6), name

    def test_the_loss_falls_with_the_packages_optimizer(self):
        model = adapted(tiny_qwen3_moe(), init_weights=True, density=0.1).train()
        optimizer = SMTAdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
        losses = []
        for _ in range(6):
            loss = model(**batch()).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < 0.95 * losses[0]

    def test_no_dense_weight_or_gradient_is_made(self):
        """On every known road: no merged copy, and no gradient of the size of one expert's matrix."""
        sizes = []

        class Seen(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                given = {t.untyped_storage().data_ptr() for t in args if type(t) in (torch.Tensor, nn.Parameter)}
                made = func(*args, **(kwargs or {}))
                for tensor in made if isinstance(made, (tuple, list)) else [made]:
                    if type(tensor) is torch.Tensor and tensor.untyped_storage().data_ptr() not in given:
                        sizes.append(tensor.numel())
                return made

        for make, how in CASES:
            model = adapted(make(hidden_size=128, intermediate_size=128), density=0.01, block_size=4).train()
            if make is not tiny_llama4:
                model.get_base_model().set_experts_implementation(how)
            experts = next(iter(layers(model).values()))
            with Seen():
                model(input_ids=torch.tensor([[1, 2]]), labels=torch.tensor([[1, 2]])).loss.backward()
            assert max(sizes) < experts.stored_weight()[0].numel(), (make, how)
            sizes.clear()


class TestMerging:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize(("make", "how"), CASES)
    def test_swap_is_merged_and_the_base_comes_back_bit_for_bit(self, make, how, dtype):
        base = built(make, how).to(dtype)
        before = {name: p.clone() for name, p in base.named_parameters()}
        plain_logits = base.eval()(**batch()).logits
        model = adapted(base, forward="swap").eval()
        with torch.no_grad():
            swapped = model(**batch()).logits
            model.merge_adapter()
            merged = model(**batch()).logits
            for layer in layers(model).values():
                stored = layer.stored_weight()
                delta = layer.get_delta_weight("default")
                assert torch.equal(stored, (before[layer.smt_name].float() + delta).to(dtype))
            model.unmerge_adapter()
            if how != "batched_mm":
                # There every sample has a product of its own, and runs of samples share one here.
                assert torch.equal(swapped, merged)
            else:
                assert torch.allclose(swapped, merged, rtol=2e-2, atol=2e-2 if dtype == torch.bfloat16 else 1e-5)
            assert not torch.equal(merged, plain_logits)
            with model.disable_adapter():
                assert torch.equal(model(**batch()).logits, plain_logits)
        unloaded = model.unload()
        assert not [m for m in unloaded.modules() if isinstance(m, (ParamWrapper, ParameterLayer))]
        for name, parameter in unloaded.named_parameters():
            assert torch.equal(parameter, before[name]) and type(parameter) is nn.Parameter

    def test_safe_merge_leaves_the_base_when_a_block_is_not_finite(self):
        base = tiny_mixtral()
        before = {name: p.clone() for name, p in base.named_parameters()}
        model = adapted(base)
        list(layers(model).values())[-1].smt_blocks["default"].weight.data[0, 0, 0] = float("nan")
        with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts\.down_proj"):
            model.merge_and_unload(safe_merge=True)
        for layer in layers(model).values():
            assert torch.equal(layer.stored_weight(), before[layer.smt_name])

    def test_disabling_while_merged_takes_the_delta_out(self):
        base = tiny_mixtral().eval()
        logits = base(**batch()).logits
        model = adapted(base).eval()
        model.merge_adapter()
        with model.disable_adapter():
            assert torch.equal(model(**batch()).logits, logits)

    def test_unload_while_merged(self):
        base = tiny_gpt_oss()
        before = copy.deepcopy(base.state_dict())
        model = adapted(base)
        model.merge_adapter()
        after = model.unload().state_dict()
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


class TestInterruption:
    @pytest.mark.parametrize("way_out", ["state_dict", "unload", "double", "merge", "forward", "delta"])
    @pytest.mark.parametrize("how", ["eager", "grouped_mm"])
    def test_every_way_out_heals_an_interrupted_swap(self, monkeypatch, way_out, how):
        base = built(tiny_mixtral, how)
        before = {name: p.clone() for name, p in base.named_parameters()}
        model = adapted(base).train()
        calls = []

        def interrupted(*args):
            calls.append(1)
            if len(calls) in (2, 3):
                raise KeyboardInterrupt
            return scatter(*args)

        scatter = swap.block_scatter_
        monkeypatch.setattr(swap, "block_scatter_", interrupted)
        # The compiled swap cannot be interrupted; the one in PyTorch can.
        with ops.use_backend("reference"), pytest.raises(KeyboardInterrupt):
            model(**batch())
        name = "model.layers.0.mlp.experts.gate_up_proj"
        weight = layers(model)[name].stored_weight()
        assert type(weight) is nn.Parameter and not torch.equal(weight, before[name])
        if way_out == "state_dict":
            model.state_dict()
        elif way_out == "unload":
            model.unload()
        elif way_out == "double":
            weight = layers(model.double())[name].stored_weight().float()
        elif way_out == "merge":
            model.merge_adapter()
            model.unmerge_adapter()
        elif way_out == "delta":
            with model.disable_adapter():
                model(**batch())
        else:
            model(**batch())
        assert torch.equal(weight, before[name])


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


class TestAdapters:
    def test_with_modules(self):
        model = adapted(tiny_mixtral(), target_modules=["q_proj"]).train()
        model(**batch()).loss.backward()
        trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert len(trained) == 6 and all(grad is not None and grad.any() for grad in trained.values())

    @pytest.mark.parametrize("modules", [None, []])
    def test_alone(self, modules):
        model = adapted(tiny_mixtral(), target_modules=modules)
        assert len(layers(model)) == 4
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        assert len(trained) == 4 and all("experts" in name for name in trained)

    def test_layers_to_transform_and_exclusion(self):
        model = adapted(tiny_mixtral(), layers_to_transform=[1])
        assert sorted(layers(model)) == [f"model.layers.1.mlp.experts.{part}_proj" for part in ("down", "gate_up")]
        model = adapted(tiny_mixtral(), exclude_modules=["gate_up_proj"])
        assert sorted(layers(model)) == [f"model.layers.{i}.mlp.experts.down_proj" for i in range(2)]

    def test_a_matrix_that_is_a_modules_weight(self):
        """Blocks of `q_proj.weight` are those of `q_proj`."""
        settings = {"target_parameters": ["q_proj.weight", "mlp.gate.weight"], "block_size": 4, "density": 0.2}
        model = adapted(tiny_mixtral(), **settings).train()
        model(**batch()).loss.backward()
        assert len(layers(model)) == 4
        for layer in layers(model).values():
            assert layer.smt_blocks["default"].weight.grad.any()
        assert str(layers(model)["model.layers.0.self_attn.q_proj.weight"])
        torch.manual_seed(0)
        by_module = get_peft_model(
            tiny_mixtral(), SMTConfig(target_modules=["q_proj"], block_size=4, score="diagonal", init_weights=True)
        )
        torch.manual_seed(0)
        by_parameter = adapted(
            tiny_mixtral(), target_parameters=["q_proj.weight"], block_size=4, score="diagonal", density=0.01
        )
        layer = layers(by_parameter)["model.layers.0.self_attn.q_proj.weight"]
        other = by_module.get_base_model().model.layers[0].self_attn.q_proj
        assert torch.equal(layer.smt_blocks["default"].index, other.smt_blocks["default"].index)
        other.smt_blocks["default"].weight.data.copy_(layer.smt_blocks["default"].weight)
        x = torch.randn(2, 3, 32)
        wrapper = by_parameter.get_base_model().model.layers[0].self_attn.q_proj
        assert torch.equal(wrapper.train()(x), other.train()(x))

    def test_several_that_differ_in_their_parameters(self, tmp_path):
        """Names on disk do not hang on what else is wrapped, or in which order."""
        base = tiny_mixtral().eval()
        state = copy.deepcopy(base.state_dict())
        model = adapted(base, target_parameters=["experts.down_proj"]).eval()
        model.add_adapter("other", SMTConfig(**{**SETTINGS, "seed": 1}))
        first = model(**batch()).logits
        model.set_adapter("other")
        second = model(**batch()).logits
        model.save_pretrained(tmp_path)
        for path, logits in ((tmp_path, first), (tmp_path / "other", second)):
            fresh = tiny_mixtral()
            fresh.load_state_dict(state)
            assert torch.equal(PeftModel.from_pretrained(fresh, path).eval()(**batch()).logits, logits)
        model.delete_adapter("other")
        model.set_adapter("default")
        assert torch.equal(model(**batch()).logits, first)
        both = adapted(tiny_mixtral(), target_parameters=["experts.gate_up_proj"]).eval()
        for name, parameter in both.base_model.model.named_parameters():
            if "smt_blocks" not in name:
                parameter.data.copy_(state[name.replace(".base_layer", "")])
        both.load_adapter(tmp_path, "first")
        both.load_adapter(tmp_path / "other", "second")
        for name, logits in (("first", first), ("second", second)):
            both.set_adapter(name)
            assert torch.equal(both(**batch()).logits, logits)

    def test_what_peft_says_of_the_model(self):
        model = adapted(tiny_mixtral(), target_modules=["q_proj"])
        model.add_adapter("other", SMTConfig(**{**SETTINGS, "seed": 1}))
        model.set_adapter("other")
        status = model.get_model_status()
        assert status.active_adapters == ["other"] and status.enabled is True and status.merged_adapters == []
        assert status.requires_grad == {"default": False, "other": True}
        model.merge_adapter()
        assert {tuple(each.merged_adapters) for each in model.get_layer_status() if "experts" in each.name} == {
            ("other",)
        }
        model.unmerge_adapter()
        model.base_model.disable_adapter_layers()
        assert model.get_model_status().enabled is False
        trainable, _ = adapted(tiny_mixtral()).get_nb_trainable_parameters()
        total = sum(p.numel() for name, p in tiny_mixtral().named_parameters() if name.endswith(tuple(EXPERTS)))
        assert 0.28 * total < trainable <= 0.3 * total

    @pytest.mark.parametrize(("make", "how"), CASES)
    def test_deltas_may_be_kept_in_the_dtype_of_the_base(self, make, how):
        """`autocast_adapter_dtype=False`: of bare parameters as of modules."""
        config = SMTConfig(**{**SETTINGS, "target_modules": ["q_proj"]})
        dtypes = {}
        for autocast in (True, False):
            base = built(make, how).bfloat16()
            plain = copy.deepcopy(base)
            model = get_peft_model(base, config, autocast_adapter_dtype=autocast).train()
            dtypes[autocast] = {p.dtype for p in model.parameters() if p.requires_grad}
            logits = model(**batch()).logits
            logits.float().square().mean().backward()
            assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
        assert dtypes == {True: {torch.float32}, False: {torch.bfloat16}}
        same, exact = plain.train(), in_double(copy.deepcopy(plain)).train()
        truth = dict(exact.named_parameters())
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, SMTLayer):
                    weight = dict(same.named_parameters())[parameter_of(module)]
                    delta = module.get_delta_weight("default")
                    truth[parameter_of(module)].add_(delta.double())
                    weight.copy_(weight.float() + delta)
        assert_no_worse_than_torch(logits.detach(), same(**batch()).logits.detach(), exact(**batch()).logits.detach())

    def test_one_parameter_gives_its_wrapper_its_features(self):
        model = adapted(tiny_mixtral(), target_parameters=["experts.down_proj", "q_proj.weight"])
        layer = model.get_base_model().model.layers[0]
        assert (layer.self_attn.q_proj.in_features, layer.self_attn.q_proj.out_features) == (32, 32)
        assert (layer.mlp.experts.in_features, layer.mlp.experts.out_features) == (48, 32)
        assert not hasattr(adapted(tiny_mixtral()).get_base_model().model.layers[0].mlp.experts, "in_features")

    @pytest.mark.parametrize(("make", "how"), CASES)
    def test_generation_is_that_of_the_merged_model(self, make, how):
        model = adapted(built(make, how)).eval()
        prompt = {"input_ids": batch()["input_ids"], "attention_mask": torch.ones(2, 8, dtype=torch.long)}
        settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        ours = model.generate(**prompt, **settings)
        assert torch.equal(ours, model.merge_and_unload().generate(**prompt, **settings))

    def test_two_active_add_up(self):
        base = tiny_gpt_oss()
        plain = copy.deepcopy(base)
        model = adapted(base).train()
        model.add_adapter("other", SMTConfig(**{**SETTINGS, "seed": 1, "target_parameters": EXPERTS[:1]}))
        model.base_model.set_adapter(["default", "other"])
        parameters = dict(plain.named_parameters())
        with torch.no_grad():
            for name, layer in layers(model).items():
                for adapter in layer.smt_blocks:
                    parameters[name] += layer.get_delta_weight(adapter)
        torch.testing.assert_close(model(**batch()).logits, plain(**batch()).logits, rtol=1e-4, atol=1e-5)
        model(**batch()).loss.backward()
        assert all(p.grad.any() for p in model.parameters() if p.requires_grad)

    def test_a_weighted_sum_of_two(self):
        model = adapted(tiny_mixtral(), target_modules=["q_proj"]).eval()
        model.add_adapter("other", SMTConfig(**{**SETTINGS, "seed": 1, "target_parameters": EXPERTS[:1]}))
        model.add_weighted_adapter(["default", "other"], [0.5, -2.0], "sum")
        for layer in layers(model).values():
            parts = [(0.5, "default"), (-2.0, "other")]
            expected = sum(f * layer.get_delta_weight(name).double() for f, name in parts if name in layer.smt_blocks)
            torch.testing.assert_close(layer.get_delta_weight("sum").double(), expected, rtol=1e-6, atol=1e-8)
        assert model.peft_config["sum"].target_parameters

    def test_there_is_no_lora_form(self):
        for name in ("experts.down_proj", "q_proj.weight"):
            with pytest.raises(ValueError, match="bare parameter of .* has no LoRA form"):
                convert_to_lora(adapted(tiny_mixtral(), target_parameters=[name]), "exact")

    def test_rows_of_a_batch_cannot_have_their_own(self):
        model = adapted(tiny_mixtral()).eval()
        with pytest.raises(ValueError, match=r"experts\.\w+: .*several adapters in one batch"):
            model(**batch(), adapter_names=["default", "__base__"])

    def test_rows_that_ask_for_others_pass_the_active_ones_by(self):
        model = adapted(tiny_mixtral()).eval()
        model.add_adapter("linear", SMTConfig(target_modules=["q_proj"], score="random", init_weights=False))
        model.set_adapter("linear")
        linear = model(**batch()).logits[1]
        model.set_adapter("default")
        with model.disable_adapter():
            base = model(**batch()).logits[0]
        rows = model(**batch(), adapter_names=["__base__", "linear"]).logits
        torch.testing.assert_close(rows, torch.stack((base, linear)))
        model.merge_adapter()
        with pytest.raises(ValueError, match="merged adapters, please call `unmerge_adapter`"):
            model(**batch(), adapter_names=["__base__", "__base__"])

    def test_copies_and_pickles_are_whole(self):
        model = adapted(tiny_mixtral()).eval()
        logits = model(**batch()).logits
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model.get_base_model()))):
            assert torch.equal(twin(**batch()).logits, logits)
            for name, layer in layers(twin).items():
                assert layer.stored_weight() is not layers(model)[name].stored_weight()
                assert layer.stored_weight() is dict(twin.named_parameters())[self.within(twin, name)]

    @staticmethod
    def within(model, name):
        prefix = "base_model.model." if hasattr(model, "base_model") and hasattr(model, "peft_type") else ""
        return prefix + name.replace("experts.", "experts.base_layer.")

    def test_the_frozen_parameter_is_saved_once(self):
        model = adapted(tiny_mixtral()).get_base_model()
        names = [name for name in model.state_dict() if "smt_blocks" not in name]
        assert sorted(name.replace(".base_layer", "") for name in names) == sorted(tiny_mixtral().state_dict())

    def test_a_trained_base_gets_its_gradient_too(self):
        base = tiny_mixtral()
        plain = copy.deepcopy(base)
        model = adapted(base).train()
        for layer in layers(model).values():
            layer.stored_weight().requires_grad_(True)
        truth, parameters = with_deltas(plain, model)
        truth(**batch()).loss.backward()
        model(**batch()).loss.backward()
        for name, layer in layers(model).items():
            expected = parameters[name].grad
            torch.testing.assert_close(layer.stored_weight().grad, expected, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(
                layer.smt_blocks["default"].weight.grad, blocks_of(expected, layer), rtol=1e-4, atol=1e-6
            )

    def test_traced_calls_take_a_differentiable_form(self):
        model = adapted(Bank(lambda m, x: x @ m.stack.mT), target_parameters=["bank.stack"], block_size=4)
        x = torch.randn(3, 2, 8)
        weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        model(x).sum().backward()

        def loss(weights):
            return torch.func.functional_call(model, weights, (x,)).sum()

        gradients = torch.func.grad(loss)({name: p.detach() for name, p in weights.items()})
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, weights[name].grad, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("how", ["eager", "grouped_mm"])
    def test_a_compiled_model_gives_the_same(self, how):
        model = adapted(built(tiny_mixtral, how)).train()
        model(**batch()).loss.backward()
        expected = [p.grad.clone() for p in model.parameters() if p.requires_grad]
        logits = model(**batch()).logits
        model.zero_grad()
        compiled = torch.compile(model, backend="aot_eager")
        out = compiled(**batch())
        torch.testing.assert_close(out.logits, logits)
        out.loss.backward()
        for ours, other in zip((p.grad for p in model.parameters() if p.requires_grad), expected, strict=True):
            torch.testing.assert_close(ours, other)

    def test_an_offloaded_parameter_is_an_error_at_the_call(self):
        model = adapted(Bank(lambda m, x: F.linear(x, m.one)), target_parameters=["bank.one"], block_size=4)
        bank = model.get_base_model().bank.base_layer
        bank.one = nn.Parameter(bank.one.detach().to("meta"), requires_grad=False)
        with pytest.raises(RuntimeError, match=r"bank\.one: the parameter is offloaded"):
            model(torch.randn(2, 8))

    def test_threads_do_not_meet_each_others_stand_ins(self):
        from concurrent.futures import ThreadPoolExecutor

        model = adapted(tiny_mixtral()).eval()
        batches = [batch(seed=seed) for seed in range(12)]
        with torch.no_grad():
            expected = [model(**each).logits for each in batches]
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda each: model(**each).logits.detach(), batches))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.fixture(params=[tiny_mixtral, tiny_gpt_oss], ids=["mixtral", "gpt-oss"])
def saved(request, tmp_path):
    """A base checkpoint, an adapter on it, and the logits of both together."""
    request.param().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = adapted(base, target_modules=["q_proj"], budget="global", spread="free", density=0.1).eval()
    model.save_pretrained(tmp_path / "adapter")
    logits = model(**batch()).logits.detach()
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    return tmp_path, logits


class TestFiles:
    def test_blocks_are_named_by_their_parameter(self, saved):
        path, _ = saved
        config = SMTConfig.from_pretrained(path / "adapter")
        tensors = load_file(path / "adapter" / "adapter_model.safetensors")
        assert config.target_parameters == sorted(EXPERTS)
        assert any("experts" in name for name in config.block_pattern)
        for name, shape in config.block_pattern.items():
            assert list(tensors.pop(f"base_model.model.{name}.smt_blocks.weight").shape) == shape
            assert len(tensors.pop(f"base_model.model.{name}.smt_blocks.index")) == shape[0]
        assert not tensors

    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    def test_roads_in(self, saved, low_cpu_mem_usage):
        path, logits = saved
        base = AutoModelForCausalLM.from_pretrained(path / "base")
        model = PeftModel.from_pretrained(base, path / "adapter", low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(model(**batch()).logits, logits)
        loaded = AutoModelForCausalLM.from_pretrained(path / "base")
        loaded.load_adapter(str(path / "adapter"), low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(loaded.eval()(**batch()).logits, logits)

    def test_fresh_processes(self, saved):
        path, logits = saved
        torch.save({"batch": batch(), "logits": logits}, path / "expected.pt")
        code = """
import sys, torch, smt_peft
from peft import AutoPeftModelForCausalLM
path = sys.argv[1]
model = AutoPeftModelForCausalLM.from_pretrained(path + "/adapter").eval()
expected = torch.load(path + "/expected.pt")
assert torch.equal(model(**expected["batch"]).logits, expected["logits"])
print("equal")
"""
        plain = """
import sys, torch
from transformers import AutoModelForCausalLM
path = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(path + "/merged").eval()
expected = torch.load(path + "/expected.pt")
torch.testing.assert_close(model(**expected["batch"]).logits, expected["logits"], rtol=1e-4, atol=1e-5)
assert "smt_peft" not in sys.modules
print("equal")
"""
        for each in (code, plain):
            done = subprocess.run([sys.executable, "-c", each, str(path)], capture_output=True, text=True)
            assert done.stdout.strip().endswith("equal"), done.stderr

    def test_a_merged_checkpoint_holds_the_merged_parameters_exactly(self, saved):
        path, _ = saved
        base = AutoModelForCausalLM.from_pretrained(path / "base")
        merged = PeftModel.from_pretrained(base, path / "adapter").merge_and_unload()
        again = AutoModelForCausalLM.from_pretrained(path / "merged")
        for (name, ours), theirs in zip(merged.named_parameters(), again.parameters(), strict=True):
            assert torch.equal(ours, theirs), name

    def test_blocks_that_cross_experts_are_refused(self, saved):
        path, _ = saved
        config = SMTConfig.from_pretrained(path / "adapter")
        name = next(name for name in config.block_pattern if "experts" in name)
        config.block_pattern[name][1] = 7
        config.save_pretrained(path / "adapter")
        base = AutoModelForCausalLM.from_pretrained(path / "base")
        before = [(name, type(module)) for name, module in base.named_modules()]
        with pytest.raises(
            ValueError, match=r"experts\.\w+: blocks of 7 rows would reach from one expert into the next"
        ):
            PeftModel.from_pretrained(base, path / "adapter")
        assert [(name, type(module)) for name, module in base.named_modules()] == before

    def test_another_base_is_refused_and_nothing_is_left(self, saved):
        path, _ = saved
        base = AutoModelForCausalLM.from_pretrained(path / "base")
        with torch.no_grad():
            base.model.layers[0].mlp.experts.down_proj.add_(1)
        before = [(name, type(module)) for name, module in base.named_modules()]
        with pytest.raises(ValueError, match="another base model"):
            PeftModel.from_pretrained(base, path / "adapter")
        assert [(name, type(module)) for name, module in base.named_modules()] == before

    def test_a_failed_second_adapter_leaves_the_first(self):
        model = adapted(tiny_mixtral(), target_parameters=EXPERTS[1:]).eval()
        logits = model(**batch()).logits
        before = [(name, type(module)) for name, module in model.named_modules()]
        with pytest.raises(ValueError, match="overlay"):
            model.add_adapter("other", SMTConfig(**{**SETTINGS, "forward": "overlay"}))
        assert [(name, type(module)) for name, module in model.named_modules()] == before
        assert torch.equal(model(**batch()).logits, logits)


class TestTargetsThatWouldStayFrozen:
    """unsloth#11014: silently untrained experts are worse than an error."""

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            (
                {"target_parameters": ["experts.up_proj"]},
                r"'experts\.up_proj' matches no parameter.*'experts\.down_proj'",
            ),
            ({"target_parameters": ["mlp.experts"]}, r"'mlp\.experts' names a module.*target_modules"),
            ({"target_parameters": ["norm.weight"]}, r"model\.norm\.weight cannot be a target: it is 1-D"),
            (
                {"target_parameters": ["q_proj.weight"], "target_modules": ["q_proj"]},
                r"is named by target_modules, too",
            ),
            ({"target_parameters": ["lm_head.weight"], "modules_to_save": ["lm_head"]}, r"left out by"),
            ({"layers_to_transform": [7]}, r"left out by"),
            (
                {"target_parameters": None, "target_modules": r".*up_proj"},
                r"not found.*Its experts are no modules.*down_",
            ),
            (
                {"target_parameters": None, "target_modules": ["gate_up_proj"]},
                r"no module but a parameter.*target_param",
            ),
            (
                {"target_parameters": [], "target_modules": ["q_proj", "experts.down_proj"]},
                r"no module but a parameter",
            ),
            ({"target_parameters": EXPERTS[:1], "target_modules": ["down_proj"]}, r"no module but a parameter"),
        ],
    )
    def test_are_errors_that_leave_no_trace(self, settings, message):
        base = tiny_mixtral()
        with pytest.raises(ValueError, match=message):
            adapted(base, **settings)
        assert not [module for module in base.modules() if isinstance(module, ParamWrapper)]
        assert all(p.requires_grad for p in base.parameters())

    @pytest.mark.parametrize("value", ["experts.down_proj", [1], [""]])
    def test_names_must_be_a_list(self, value):
        with pytest.raises(ValueError, match="target_parameters must be a list"):
            SMTConfig(target_parameters=value)

    def test_a_parameter_of_the_model_itself(self):
        module = Bank(None).bank
        with pytest.raises(ValueError, match="belongs to the model itself"):
            adapted(module, target_parameters=["one"])

    def test_a_parameter_that_is_packed_or_parametrized(self):
        module = Bank(None)
        module.bank.one = nn.Parameter(torch.ones(12, 8, dtype=torch.int8), requires_grad=False)
        with pytest.raises(ValueError, match=r"stored as torch\.int8"):
            adapted(module, target_parameters=["bank.one"])
        module = Bank(None)
        nn.utils.parametrize.register_parametrization(module.bank, "one", nn.Identity())
        with pytest.raises(ValueError, match=r"bank\.one cannot be a target: its module is parametrized"):
            adapted(module, target_parameters=["bank.one"])

    def test_an_adapter_of_another_method(self):
        base = tiny_mixtral()
        inject_adapter_in_model(LoraConfig(target_parameters=["experts.down_proj"], target_modules=[]), base)
        with pytest.raises(ValueError, match=r"experts\.\w+ cannot be a target: .* carries an adapter"):
            adapted(base)

    def test_all_linear_says_which_experts_it_passes_over(self, caplog, monkeypatch):
        monkeypatch.setattr("smt_peft.say._said", set())
        caplog.set_level(logging.INFO, logger="smt_peft")
        model = get_peft_model(tiny_mixtral(), SMTConfig(density=0.1, block_size=8))
        (line,) = [line for line in caplog.messages if "stay frozen" in line]
        assert "4 parameters" in line and "target_parameters=['experts.down_proj', 'experts.gate_up_proj']" in line
        assert not layers(model)

    @pytest.mark.parametrize("settings", [{"target_parameters": []}, {"target_parameters": EXPERTS}])
    def test_a_choice_that_was_made_is_not_commented_on(self, settings, caplog, monkeypatch):
        monkeypatch.setattr("smt_peft.say._said", set())
        caplog.set_level(logging.INFO, logger="smt_peft")
        get_peft_model(tiny_mixtral(), SMTConfig(density=0.1, block_size=8, **settings))
        get_peft_model(tiny_llama(), SMTConfig(density=0.1, block_size=8))
        assert "stay frozen" not in caplog.text

    def test_a_sharded_parameter_is_an_error_at_the_call(self):
        model = adapted(Bank(lambda m, x: F.linear(x, m.one)), target_parameters=["bank.one"], block_size=4)
        bank = model.get_base_model().bank.base_layer
        flat = bank._parameters.pop("one")
        bank.one = flat.detach()
        with pytest.raises(RuntimeError, match=r"bank\.one is no parameter of its module any more"):
            model(torch.randn(2, 8))
