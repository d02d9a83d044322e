"""Blocks of bare parameters: the experts of a mixture, and any other 2-D or 3-D parameter."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_no_worse_than_torch, batch
from mixtures import (
    CASES,
    EXPERTS,
    IMPLEMENTATIONS,
    SETTINGS,
    Bank,
    adapted,
    blocks_of,
    built,
    in_double,
    layers,
    parameter_of,
    tiny_gpt_oss,
    tiny_llama4,
    tiny_mixtral,
    tiny_qwen3_moe,
    with_deltas,
)
from peft import PeftModel, get_peft_model
from torch import nn

from smt_peft import BlockSelection, SMTConfig, ops
from smt_peft.blocks import BlockGrid
from smt_peft.export.lora import convert_to_lora
from smt_peft.ops import swap
from smt_peft.optim import SMTAdamW
from smt_peft.tuner.experts import ParameterLayer, ParamWrapper
from smt_peft.tuner.layer import SMTLayer


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
