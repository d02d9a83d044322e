"""SMT over quantised layers: training computes what it would on the dequantised weights, and the packed ones stay."""

from __future__ import annotations

import copy
import logging
import pickle
import subprocess
import sys

import pytest
import torch
from helpers import batch, tiny_llama
from packing import BITSANDBYTES, DEQUANTISABLE, packed_linear, plain_linear, same_storage, storage, true_weight
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM

from smt_peft import SMTConfig, ops, say, select_blocks
from smt_peft.optim import SMTAdamW
from smt_peft.tuner.linear import Linear
from smt_peft.tuner.quantised import QuantisedLinear

SETTINGS = {"target_modules": "all-linear", "density": 0.2, "block_size": 8, "score": "random"}


@pytest.fixture(autouse=True)
def quiet():
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


class Net(nn.Module):
    """Two linear layers; `make` gives each from its float original."""

    def __init__(self, make=lambda linear: linear, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(1)
        self.up = make(nn.Linear(32, 64, dtype=dtype).requires_grad_(False))
        self.down = make(nn.Linear(64, 48, bias=False, dtype=dtype).requires_grad_(False))

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def packed_net(kind, dtype=torch.float32):
    return Net(lambda linear: packed_linear(linear, kind), dtype)


def plain_net(packed, dtype=torch.float32):
    net = Net(dtype=dtype)
    net.up, net.down = plain_linear(packed.up), plain_linear(packed.down)
    return net


def adapted(net, **settings):
    return get_peft_model(net, SMTConfig(**{**SETTINGS, "init_weights": False, **settings}))


def both(kind, dtype=torch.float32, **settings):
    """An adapter over a quantised model, and the same blocks on plain layers that hold the dequantised weights."""
    net = packed_net(kind, dtype)
    plain = adapted(plain_net(net, dtype), **{**settings, "forward": "swap"})
    ours = adapted(net, **settings)
    plain.load_state_dict(
        {name: tensor for name, tensor in ours.state_dict().items() if "smt_blocks" in name}, strict=False
    )
    return ours, plain


def probe(dtype=torch.float32, rows=6):
    x = torch.randn(rows, 32, generator=torch.Generator().manual_seed(3))
    return x.to(dtype).requires_grad_()


def results(model, x, call=None):
    """Output, and the gradients of the input and of every delta."""
    y = (model if call is None else call)(x)
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [y, *torch.autograd.grad(y.float().square().sum(), [x, *parameters])]


def assert_same(ours, plain):
    assert len(ours) == len(plain) > 3
    for one, other in zip(ours, plain, strict=True):
        assert torch.equal(one, other)


def told(model):
    return {module.extra_repr().partition(",")[0] for module in model.modules() if isinstance(module, Linear)}


class TestOverlay:
    @pytest.mark.parametrize("kind", DEQUANTISABLE)
    def test_training_is_that_of_plain_layers_with_the_dequantised_weights_bit_for_bit(self, kind):
        ours, plain = both(kind)
        assert_same(results(ours.train(), probe()), results(plain.train(), probe()))
        assert told(ours) == {"forward=overlay"} and told(plain) == {"forward=swap"}

    @pytest.mark.parametrize("kind", ["nf4", "nf4 double", "torchao int8"])
    def test_in_bf16(self, kind):
        ours, plain = both(kind, torch.bfloat16)
        assert_same(results(ours.train(), probe(torch.bfloat16)), results(plain.train(), probe(torch.bfloat16)))

    def test_int8_in_bf16_computes_with_the_merged_weight_rounded_once_more(self):
        # bitsandbytes dequantises to fp32.
        model = adapted(packed_net("int8", torch.bfloat16)).train()
        layer = model.base_model.model.up
        merged = true_weight(layer.base_layer) + layer.get_delta_weight("default")
        x = probe(torch.bfloat16)
        assert torch.equal(layer(x), nn.functional.linear(x, merged.bfloat16(), layer.base_layer.bias.bfloat16()))

    @pytest.mark.parametrize("kind", BITSANDBYTES)
    def test_autocast(self, kind):
        ours, plain = both(kind)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mine, theirs = results(ours.train(), probe()), results(plain.train(), probe())
            own = packed_net(kind).train()(probe())
        assert mine[0].dtype == own.dtype
        # A 4-bit layer of bitsandbytes casts its output back, and with it the loss is taken in another dtype.
        assert torch.equal(mine[0].float(), theirs[0].float())
        if kind == "int8":
            assert_same(mine, theirs)

    @pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
    def test_the_input_is_cast_as_bitsandbytes_casts_it(self, compute_dtype):
        net = packed_net("nf4")
        net.up.compute_dtype, net.up.compute_type_is_set = compute_dtype, compute_dtype is not None
        weight, bias = true_weight(net.up), net.up.bias.detach().clone()
        layer = adapted(net, init_weights=True).train().base_model.model.up
        x = probe()
        cast = compute_dtype or torch.float32
        expected = nn.functional.linear(x.to(cast), weight.to(cast), bias.to(cast)).to(x.dtype)
        assert torch.equal(layer(x), expected)

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_checkpointing(self, reentrant):
        ours, plain = both("nf4 double")
        ours.train()
        call = lambda x: checkpoint(ours, x, use_reentrant=reentrant)  # noqa: E731
        if reentrant:
            # It supports .backward() alone.
            x = probe()
            y = call(x)
            y.square().sum().backward()
            mine = [y, x.grad, *(p.grad for p in ours.parameters() if p.requires_grad)]
        else:
            mine = results(ours, probe(), call)
        assert_same(mine, results(plain.train(), probe()))

    def test_inputs_of_any_number_of_dimensions(self):
        ours, plain = both("nf4")
        for shape in ((32,), (0, 32), (2, 3, 32)):
            x = torch.randn(*shape, requires_grad=True)
            assert_same(results(ours.train(), x), results(plain.train(), x))

    def test_a_frozen_adapter_still_hands_the_gradient_on(self):
        ours, plain = both("nf4")
        for model in (ours, plain):
            model.train().requires_grad_(False)
        x, z = probe(), probe()
        ours(x).sum().backward()
        plain(z).sum().backward()
        assert torch.equal(x.grad, z.grad)

    def test_may_be_forced_in_evaluation(self):
        ours, plain = both("nf4", forward="overlay")
        assert torch.equal(ours.eval()(probe()), plain.eval()(probe()))
        assert told(ours) == {"forward=overlay"}

    def test_gives_way_where_something_hangs_on_the_base_layer(self):
        ours, _ = both("nf4")
        ours.train()
        calls = []
        handle = ours.base_model.model.up.base_layer.register_forward_hook(lambda *_: calls.append(1))
        ours(probe())
        assert calls and told(ours) == {"forward=additive", "forward=overlay"}
        handle.remove()
        ours(probe())
        assert told(ours) == {"forward=overlay"}

    def test_a_forced_overlay_that_cannot_be_names_the_module(self):
        ours, _ = both("nf4", forward="overlay")
        ours.base_model.model.down.base_layer.register_forward_hook(lambda *_: None)
        with pytest.raises(RuntimeError, match="down: forward='overlay' is set, but hooks are registered"):
            ours(probe())

    @pytest.mark.parametrize("backend", ["eager", "aot_eager"])
    def test_compiled_it_is_additive(self, backend):
        ours, plain = both("nf4")
        compiled = torch.compile(ours.train(), backend=backend)
        y, *grads = results(ours, probe(), compiled)
        assert told(ours) == {"forward=additive"}
        for one, other in zip([y, *grads], results(plain.train(), probe()), strict=True):
            assert torch.allclose(one, other, atol=1e-5)
        torch._dynamo.reset()


class TestAdditive:
    @pytest.mark.parametrize("kind", DEQUANTISABLE)
    def test_evaluation_is_the_base_layers_own_forward_plus_the_blocks(self, kind):
        model = adapted(packed_net(kind)).eval()
        layer = model.base_model.model.up
        x = probe().detach()
        blocks = layer.smt_blocks["default"]
        expected = ops.block_add(layer.base_layer(x), x, blocks.weight, blocks.layout())
        assert torch.equal(layer(x), expected)
        assert "forward=additive" in told(model)

    @pytest.mark.parametrize("kind", DEQUANTISABLE)
    def test_without_the_adapter_it_is_the_base_layers_own_forward(self, kind):
        own = packed_net(kind)
        model = adapted(packed_net(kind))
        if hasattr(own.up, "support_avx512bf16_for_cpu"):
            own.up.support_avx512bf16_for_cpu = own.down.support_avx512bf16_for_cpu = False
        for mode in (True, False):
            with model.train(mode).disable_adapter():
                assert torch.equal(model(probe()), own.train(mode)(probe()))

    def test_several_adapters_add_up(self):
        model = adapted(packed_net("nf4")).train()
        model.add_adapter("other", SMTConfig(**{**SETTINGS, "init_weights": False, "seed": 1}))
        layer = model.base_model.model.up
        x = probe().detach()
        alone = []
        for name in ("default", "other"):
            model.set_adapter(name)
            alone.append(layer(x) - layer.base_layer(x))
        model.base_model.set_adapter(["default", "other"])
        assert torch.allclose(layer(x) - layer.base_layer(x), sum(alone), atol=1e-5)
        assert told(layer) == {"forward=additive"}

    @pytest.mark.parametrize("kind", BITSANDBYTES)
    def test_a_mixed_batch(self, kind):
        model = adapted(packed_net(kind)).eval()
        model.add_adapter("other", SMTConfig(**{**SETTINGS, "init_weights": False, "seed": 1}))
        x = probe().detach()
        names = ["default", "__base__", "other", "default", "__base__", "other"]
        mixed = model(x, adapter_names=names)
        for name in ("default", "other"):
            model.set_adapter(name)
            rows = [row for row, wanted in enumerate(names) if wanted == name]
            assert torch.allclose(mixed[rows], model(x)[rows], atol=1e-5)
        with model.disable_adapter():
            assert torch.allclose(mixed[[1, 4]], model(x)[[1, 4]], atol=1e-5)


class TestStorage:
    @pytest.mark.parametrize("kind", DEQUANTISABLE)
    def test_is_bit_equal_after_training_and_unloading(self, kind):
        net = packed_net(kind)
        before = storage(net)
        model = adapted(net)
        optimizer = SMTAdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for mode in (True, False, True):
            loss = model.train(mode)(probe()).square().mean()
            losses.append(loss.item())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            model.eval()(probe().detach())
        assert losses[2] < losses[0]
        assert same_storage(before, storage(model.unload()))

    @pytest.mark.parametrize("kind", BITSANDBYTES)
    def test_deep_copies_and_pickles(self, kind):
        model = adapted(packed_net(kind)).train()
        y = model(probe())
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(probe()), y)

    def test_bitsandbytes_does_not_repack_it_for_the_cpu(self):
        functional = pytest.importorskip("bitsandbytes.functional")
        if not functional.has_avx512bf16():
            pytest.skip("this CPU has no AVX512-BF16")
        net = packed_net("nf4 double")
        weights = true_weight(net.up), true_weight(net.down)
        model = adapted(net).eval()
        x = probe()
        model(x.detach())
        (grad,) = torch.autograd.grad(model(x).sum(), x)
        assert grad.abs().sum() > 0
        assert all(
            torch.equal(w, true_weight(m))
            for w, m in zip(weights, (net.up.base_layer, net.down.base_layer), strict=True)
        )
        # And again as bitsandbytes likes it once the adapter is gone.
        assert model.unload().up.support_avx512bf16_for_cpu

    @pytest.mark.parametrize("kind", ["nf4", "nf4 double", "nf4 in bf16"])
    def test_a_weight_repacked_before_is_read_up_to_the_rounding_of_its_scales(self, kind):
        functional = pytest.importorskip("bitsandbytes.functional")
        if not functional.has_avx512bf16():
            pytest.skip("this CPU has no AVX512-BF16")
        net = packed_net(kind)
        # Two scales in a row: repacked, they lie in another order.
        net.up, net.down = (packed_linear(nn.Linear(cols, 64), kind) for cols in (128, 64))
        before = true_weight(net.up)
        net.eval()(torch.randn(3, 128))
        assert net.up.weight.quant_state.packing_format_for_cpu
        layer = adapted(net).train().base_model.model.up
        read = layer.format.read(layer.base_layer)
        # bf16 keeps 8 significant bits; 8-bit scales are made anew over at most 256 of them.
        scales = before.abs().max() * (2.0**-8 + ("double" in kind) * 2.0**-7)
        assert (read - before).abs().max() <= scales
        assert torch.equal(read == 0, before == 0) and torch.equal(read.sign(), before.sign())


class TestMerging:
    @pytest.mark.parametrize("kind", [k for k in DEQUANTISABLE if "torchao" not in k])
    def test_requantises_the_sum_and_unmerging_gives_the_packed_weight_back(self, kind, caplog):
        caplog.set_level("INFO", logger="smt_peft")
        net = packed_net(kind)
        model = adapted(net).eval()
        before, y = storage(net), model(probe())
        layer = model.base_model.model.up
        wanted = true_weight(layer.base_layer) + layer.get_delta_weight("default")
        by_hand = packed_linear(_holding(wanted, layer.base_layer), kind)
        model.merge_adapter(safe_merge=True)
        assert torch.equal(true_weight(layer.base_layer), true_weight(by_hand))
        assert not same_storage(before, storage(net))
        assert "merged into the quantised weights of 2 layers" in caplog.text
        model(probe())
        model.unmerge_adapter()
        assert same_storage(before, storage(net))
        assert torch.equal(model(probe()), y)

    def test_torchao_requantises_by_the_config_that_transformers_recorded(self):
        from packing import torchao_config

        model = adapted(packed_net("torchao int8"))
        layer = model.base_model.model.up
        with pytest.raises(ValueError, match="up: the blocks cannot be merged, because how torchao quantised it"):
            model.merge_adapter()
        before = storage(model)
        for module in model.modules():
            if isinstance(module, QuantisedLinear):
                module.format.get_config = lambda: torchao_config("torchao int8")
        wanted = true_weight(layer.base_layer) + layer.get_delta_weight("default")
        expected = true_weight(packed_linear(_holding(wanted, layer.base_layer), "torchao int8"))
        model.merge_adapter()
        assert torch.equal(true_weight(layer.base_layer), expected)
        model.unmerge_adapter()
        assert same_storage(before, storage(model))

    @pytest.mark.parametrize("kind", BITSANDBYTES)
    def test_merge_and_unload(self, kind):
        model = adapted(packed_net(kind)).eval()
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, QuantisedLinear):
                    module.smt_blocks["default"].weight.mul_(10)
        y = model(probe())
        with model.disable_adapter():
            base = model(probe())
        merged = model.merge_and_unload()
        assert type(merged.up).__name__ in ("Linear4bit", "Linear8bitLt")
        assert (merged(probe()) - y).norm() < 0.5 * (base - y).norm()

    def test_two_adapters_are_quantised_once(self):
        model = adapted(packed_net("nf4"))
        model.add_adapter("other", SMTConfig(**{**SETTINGS, "init_weights": False, "seed": 1}))
        before = storage(model.base_model.model.up.base_layer)
        layer = model.base_model.model.up
        wanted = true_weight(layer.base_layer) + layer.get_delta_weight("default") + layer.get_delta_weight("other")
        model.merge_adapter(adapter_names=["default", "other"])
        expected = true_weight(packed_linear(_holding(wanted, layer.base_layer), "nf4"))
        assert torch.equal(true_weight(layer.base_layer), expected)
        model.unmerge_adapter()
        assert same_storage(before, storage(layer.base_layer))

    def test_what_rounding_costs(self):
        model = adapted(packed_net("nf4"))
        layer = model.base_model.model.up
        blocks = layer.smt_blocks["default"]
        before = true_weight(layer.base_layer)
        # Far below half a step: nothing of it survives.
        blocks.weight.data.fill_(1e-6)
        layer.merge()
        error = true_weight(layer.base_layer) - before - layer.get_delta_weight("default")
        assert layer.rounding.survived == pytest.approx(0, abs=0.5)
        assert layer.rounding.largest == pytest.approx(error.abs().max().item(), rel=1e-2)
        layer.unmerge()
        # Far above one: nearly all of it does.
        blocks.weight.data.normal_(std=1.0)
        layer.merge()
        error = true_weight(layer.base_layer) - before - layer.get_delta_weight("default")
        assert 0.8 < layer.rounding.survived < 1.2
        assert layer.rounding.mean == pytest.approx(error.abs().mean().item(), rel=1e-3)

    def test_a_broken_adapter_is_not_merged_into_any_layer(self):
        model = adapted(packed_net("nf4"))
        layers = [model.base_model.model.up.base_layer, model.base_model.model.down.base_layer]
        before = [storage(layer) for layer in layers]
        model.base_model.model.down.smt_blocks["default"].weight.data.fill_(float("nan"))
        with pytest.raises(ValueError, match="NaNs detected .*down"):
            model.merge_adapter(safe_merge=True)
        assert all(same_storage(old, storage(layer)) for old, layer in zip(before, layers, strict=True))


def _holding(weight, layer):
    linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
    linear.weight.data = weight
    if layer.bias is not None:
        linear.bias.data = layer.bias.detach().clone()
    return linear


@pytest.mark.parametrize("kind", DEQUANTISABLE)
def test_an_adapter_is_loaded_without_being_made_first(kind, tmp_path):
    model = adapted(packed_net(kind)).eval()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(packed_net(kind), tmp_path, low_cpu_mem_usage=True).eval()
    assert torch.equal(again(probe()), model(probe()))


class TestWhatPeftSees:
    @pytest.mark.parametrize("kind", DEQUANTISABLE)
    def test_the_library_is_named_and_the_base_weight_can_be_read(self, kind):
        name = "bnb 8bit" if kind == "int8" else "bnb 4bit" if kind in BITSANDBYTES else kind.split()[0]
        model = adapted(packed_net(kind))
        assert model.get_model_status().quantization_backend == name
        assert [layer.quantization_backend for layer in model.get_layer_status()] == [name] * 2
        layer = model.base_model.model.up
        assert f"quantization_backend='{name}'" in repr(layer)
        assert torch.equal(layer.get_base_weight(), true_weight(layer.base_layer))

    def test_a_library_that_peft_does_not_know_is_named_by_its_layer(self):
        model = adapted(packed_net("gptq"))
        assert model.get_model_status().quantization_backend is None
        assert "quantization_backend='ForwardOnly'" in repr(model.base_model.model.up)

    def test_writing_says_when_the_config_of_torchao_is_not_known(self):
        layer = adapted(packed_net("torchao int8")).base_model.model.up
        weight = layer.get_base_weight()
        with pytest.raises(ValueError, match="how torchao quantised it is not known"):
            layer.quantization_backend.get_apply_tensor_subclass()
        assert torch.equal(layer.get_base_weight(), weight)


@pytest.mark.parametrize("kind", [*DEQUANTISABLE, "gptq"])
def test_token_rows_are_trained_beside_the_blocks(kind):
    llama = tiny_llama().requires_grad_(False)
    attention = llama.model.layers[0].self_attn
    attention.q_proj = packed_linear(attention.q_proj, kind)
    config = SMTConfig(**{**SETTINGS, "target_modules": ["q_proj"], "layers_to_transform": [0]})
    config.trainable_token_indices = batch()["input_ids"].unique()[:2].tolist()
    model = get_peft_model(llama, config).train()
    model(**batch()).loss.backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)


class TestForwardOnly:
    def test_trains_saves_and_reloads(self, tmp_path):
        net = packed_net("gptq")
        before = storage(net)
        model = adapted(net)
        assert isinstance(model.base_model.model.up, QuantisedLinear)
        layer = model.base_model.model.up
        plain = (layer.base_layer.qweight * layer.base_layer.scales) + layer.get_delta_weight("default")
        x = probe()
        assert torch.allclose(layer(x), nn.functional.linear(x, plain, layer.base_layer.bias), atol=1e-6)
        results(model.train(), x)
        assert told(model) == {"forward=additive"}
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(packed_net("gptq"), tmp_path)
        assert torch.equal(again.eval()(x), model.eval()(x))
        assert same_storage(before, storage(model.unload()))

    def test_cannot_be_merged_nor_overlaid(self):
        model = adapted(packed_net("gptq"))
        with pytest.raises(ValueError, match="up: the blocks cannot be merged, because a weight packed by ForwardOnly"):
            model.merge_adapter()
        assert not model.base_model.model.up.merged
        with pytest.raises(ValueError, match="up: forward='overlay' is not possible: a weight packed by ForwardOnly"):
            adapted(packed_net("gptq"), forward="overlay")

    @pytest.mark.parametrize("score", ["grad_abs", "activation"])
    def test_blocks_are_chosen_by_data_without_reading_a_weight(self, score):
        net = packed_net("gptq")
        plain = Net()
        for name in ("up", "down"):
            layer = getattr(net, name)
            getattr(plain, name).weight.data = layer.qweight * layer.scales
        config = SMTConfig(**{**SETTINGS, "score": score})
        loss = lambda model, x: model(x).square().mean()  # noqa: E731
        data = [probe(rows=16).detach()]
        ours, theirs = (select_blocks(m, config, data, 1, loss_fn=loss, progress=False) for m in (net, plain))
        assert ours == theirs

    def test_a_score_by_weights_names_the_module(self):
        with pytest.raises(ValueError, match="up: score='magnitude' reads the weight, which is stored as torch.int32"):
            adapted(packed_net("gptq"), score="magnitude")

    def test_a_kernel_that_drops_the_gradient_is_told_of(self, caplog):
        caplog.set_level("INFO", logger="smt_peft")
        # torchao's dynamic activation quantisation (0.18): its output depends on the bias alone.
        say._said.clear()
        model = adapted(packed_net("torchao dynamic")).train()
        model(probe())
        assert "the kernel of the base layers (torchao) hands no gradient on" in caplog.text
        assert told(model) == {"forward=additive"}
        # Asked for by name, the overlay computes on the dequantised weight, and hands all of it on.
        caplog.clear()
        ours, plain = both("torchao dynamic", forward="overlay")
        assert_same(results(ours.train(), probe()), results(plain.train(), probe()))

    def test_a_subclass_with_a_forward_of_its_own_is_called(self):
        net = packed_net("nf4")

        class Louder(type(net.up)):
            def forward(self, x):
                return 2 * super().forward(x)

        net.up.__class__ = Louder
        model = adapted(net, init_weights=True).train()
        layer, x = model.base_model.model.up, probe()
        assert torch.equal(layer(x), layer.base_layer(x)) and told(layer) == {"forward=additive"}


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_swap_is_refused_by_name(kind):
    with pytest.raises(ValueError, match="up: forward='swap' is not possible: 'swap' writes into the weight"):
        adapted(packed_net(kind), forward="swap")


class TestSelection:
    @pytest.mark.parametrize("kind", ["nf4", "nf4 double", "int8", "torchao int8", "hqq"])
    @pytest.mark.parametrize("score", ["magnitude", "low_rank_magnitude"])
    def test_scores_by_weights_read_the_dequantised_ones(self, kind, score):
        net = packed_net(kind)
        config = SMTConfig(**{**SETTINGS, "score": score})
        ours, plain = select_blocks(net, config), select_blocks(plain_net(net), config)
        assert ours == plain
        assert all(torch.equal(ours.scores[name], plain.scores[name]) for name in plain.scores)

    @pytest.mark.parametrize("kind", ["nf4", "nf4 double", "int8", "torchao int8", "hqq"])
    @pytest.mark.parametrize("score", ["grad_abs", "taylor", "activation"])
    def test_scores_by_gradients_are_those_of_the_dequantised_model(self, kind, score):
        net = packed_net(kind)
        config = SMTConfig(**{**SETTINGS, "score": score})
        data = [probe(rows=16).detach()]
        loss = lambda model, x: model(x).square().mean()  # noqa: E731
        before = storage(net)
        chosen = [
            select_blocks(model, config, data, 1, loss_fn=loss, progress=False) for model in (net, plain_net(net))
        ]
        # In evaluation the 8-bit kernel of bitsandbytes rounds activations to 8 bits as well.
        tolerance = 0.1 if kind == "int8" else 1e-2 if kind.startswith("torchao") else 1e-4
        for name, scores in chosen[1].scores.items():
            assert torch.allclose(chosen[0].scores[name], scores, rtol=tolerance, atol=tolerance * scores.max())
        assert same_storage(before, storage(net))


# Transformers' own loading, in this process and a fresh one.

RELOAD = """
import logging, sys, torch
logging.disable(logging.WARNING)
import smt_peft
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
base, adapter, ids, out = sys.argv[1:5]
settings = eval(sys.argv[5], {"torch": torch})
model = AutoModelForCausalLM.from_pretrained(base, quantization_config=BitsAndBytesConfig(**settings), dtype="float32")
model = PeftModel.from_pretrained(model, adapter).eval()
torch.set_num_threads(1)
save_file({"logits": model(input_ids=torch.load(ids)).logits.detach()}, out)
"""
LOADS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}


@pytest.fixture
def loaded(tmp_path, request):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    tiny_llama(hidden=64).save_pretrained(tmp_path / "base")
    settings = LOADS[request.param]
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=BitsAndBytesConfig(**settings), dtype=torch.float32
    )
    return model, settings, tmp_path


@pytest.mark.parametrize("loaded", LOADS, indirect=True)
def test_training_saving_and_reloading_in_a_fresh_process(loaded):
    model, settings, path = loaded
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    before = storage(model)
    model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    config = SMTConfig(density=0.1, block_size=8, task_type="CAUSAL_LM")
    config.selection = select_blocks(model, config, [batch()], 1, progress=False)
    model = get_peft_model(model, config).train()
    # 4-bit and 8-bit weights counted as weights, not as the bytes they fill.
    assert (
        model.get_nb_trainable_parameters()[1]
        == 2 * (4 * 64 * 48 + 3 * 64 * 128 + 2 * 64) + 64 + 2 * 64 * 64 + (model.get_nb_trainable_parameters()[0])
    )
    optimizer = SMTAdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(**batch()).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    assert told(model) == {"forward=overlay"}
    model.save_pretrained(path / "adapter")
    ids = batch()["input_ids"]
    torch.save(ids, path / "ids.pt")
    logits = model.eval()(input_ids=ids).logits
    arguments = [path / "base", path / "adapter", path / "ids.pt", path / "logits.safetensors", repr(settings)]
    done = subprocess.run(
        [sys.executable, "-c", RELOAD, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    from safetensors.torch import load_file

    assert torch.equal(load_file(path / "logits.safetensors")["logits"], logits)
    torch.set_num_threads(threads)
    assert same_storage(before, storage(model.unload()))


@pytest.mark.parametrize("loaded", ["nf4"], indirect=True)
def test_deltas_cast_to_bf16_as_trl_does_still_learn(loaded):
    model, _, _ = loaded
    model = get_peft_model(model, SMTConfig(density=0.1, block_size=8, score="diagonal", task_type="CAUSAL_LM")).train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    for _ in range(3):
        model(**batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = dict(model.named_parameters())
    # Steps of 1e-4 from zero are not lost, as they would be in a bf16 copy of weights around 0.02.
    moved = [(after[name] != start).float().mean() for name, start in before.items()]
    assert min(moved) > 0.9


class TestOtherBases:
    """An adapter trained on a quantised base: which bases take it."""

    @pytest.mark.parametrize("loaded", LOADS, indirect=True)
    def test_the_float_original_does_and_another_model_does_not(self, loaded):
        model, _, path = loaded
        model = get_peft_model(model, SMTConfig(**SETTINGS, init_weights=False, task_type="CAUSAL_LM"))
        model.save_pretrained(path / "adapter")
        for dtype in (torch.float32, torch.bfloat16):
            base = AutoModelForCausalLM.from_pretrained(path / "base", dtype=dtype)
            PeftModel.from_pretrained(base, path / "adapter")
        torch.manual_seed(5)
        with pytest.raises(ValueError, match="the base weights are not those expected"):
            PeftModel.from_pretrained(tiny_llama(hidden=64), path / "adapter")

    @pytest.mark.parametrize("loaded", ["nf4"], indirect=True)
    def test_an_adapter_of_the_float_base_loads_on_its_quantised_copy_and_no_other(self, loaded):
        model, _, path = loaded
        floats = AutoModelForCausalLM.from_pretrained(path / "base")
        get_peft_model(floats, SMTConfig(**SETTINGS, init_weights=False)).save_pretrained(path / "adapter")
        PeftModel.from_pretrained(model, path / "adapter").unload()
        torch.manual_seed(5)
        other = tiny_llama(hidden=64)
        get_peft_model(other, SMTConfig(**SETTINGS, init_weights=False)).save_pretrained(path / "other")
        with pytest.raises(ValueError, match="the base weights are not those expected"):
            PeftModel.from_pretrained(model, path / "other")

    @pytest.mark.parametrize("loaded", ["nf4"], indirect=True)
    def test_a_selection_made_on_the_float_model_serves_its_quantised_copy(self, loaded):
        model, _, path = loaded
        config = SMTConfig(**{**SETTINGS, "score": "magnitude"})
        config.selection = select_blocks(AutoModelForCausalLM.from_pretrained(path / "base"), config)
        adapted = get_peft_model(model, config)
        assert adapted.peft_config["default"].base_quantization["load_in_4bit"] is True
        assert adapted.peft_config["default"].base_quantization["dtype"] == "float32"


class Feed(nn.Module):
    """Named as a feed-forward network, whose channels are known."""

    def __init__(self, make=lambda linear: linear):
        super().__init__()
        torch.manual_seed(1)
        self.fc1, self.fc2 = make(nn.Linear(32, 64)), make(nn.Linear(64, 32))

    def forward(self, x):
        return self.fc2(torch.tanh(self.fc1(x)))


@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao int8", "hqq"])
def test_a_quantised_base_trains_its_channels_as_the_dequantised_one(kind):
    packed = Feed(lambda linear: packed_linear(linear.requires_grad_(False), kind))
    plain = Feed()
    plain.fc1, plain.fc2 = plain_linear(packed.fc1), plain_linear(packed.fc2)
    grads, x = [], torch.randn(5, 32)
    for net in (packed, plain):
        model = get_peft_model(net, SMTConfig(coupled="both", density=0.5, score="random")).train()
        model(x).square().sum().backward()
        found = {name.split(".")[2]: p.grad for name, p in model.named_parameters() if p.requires_grad}
        grads.append(found)
    assert grads[0].keys() == grads[1].keys() == {"fc1", "fc2"}
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=2e-2 if kind == "int8" else 1e-4, atol=1e-3)
