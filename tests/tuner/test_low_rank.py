"""A low-rank pair beside the blocks: what it computes, how it merges, and that one adapter carries both."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_no_worse_than_torch, batch, tiny_gpt2, tiny_llama
from packing import DEQUANTISABLE, packed_linear, plain_linear, same_storage, storage
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from smt_peft import SMTConfig, ops, select_blocks
from smt_peft.optim import SMTAdamW
from smt_peft.tuner import hotswap_adapter
from smt_peft.tuner.effective import effective_update
from smt_peft.tuner.layer import SMTLayer

SETTINGS = {
    "target_modules": "all-linear",
    "density": 0.2,
    "block_size": 8,
    "score": "random",
    "lora_rank": 4,
    "lora_alpha": 12,
    "init_weights": False,
}


def adapted(base, **settings):
    return get_peft_model(base, SMTConfig(**{**SETTINGS, **settings}))


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, SMTLayer)]


def delta_by_hand(layer, adapter="default"):
    """`S + s B A`, summed in fp64 in one order and rounded once."""
    blocks, pair = layer.smt_blocks[adapter], layer.smt_low_rank[adapter]
    a, b = pair.lora_A.detach().double(), pair.lora_B.detach().double()
    product = sum(b[:, k, None] * a[k] for k in range(a.shape[0]))
    delta = pair.scaling * product + ops.dense(blocks.weight.detach().double(), blocks.layout())
    return delta.to(blocks.weight.dtype)


class One(nn.Module):
    def __init__(self, dtype, shape=(48, 40), bias=True):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(shape[1], shape[0], bias=bias, dtype=dtype)

    def forward(self, x):
        return self.layer(x)


class TestForward:
    """Against plain PyTorch, in fp64 for the truth and in the same dtypes for the error that is allowed."""

    @pytest.mark.parametrize("forward", ["swap", "additive"])
    @pytest.mark.parametrize("precision", ["float32", "bfloat16", "float64", "autocast"])
    def test_output_and_gradients_are_pytorchs(self, forward, precision):
        dtype = torch.float32 if precision == "autocast" else getattr(torch, precision)
        # Ragged: 20 does not divide into 8.
        model = adapted(One(dtype, (44, 20)), target_modules=["layer"], forward=forward)
        layer = model.base_model.model.layer
        torch.manual_seed(1)
        x, dy = torch.randn(3, 7, 20, dtype=dtype), torch.randn(3, 7, 44, dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            ours = self.gradients(lambda x: layer.train()(x), layer, x, dy)
            theirs = self.gradients(lambda x: self.plainly(layer, x), layer, x, dy)
        wide = copy.deepcopy(layer).double()
        truth = self.gradients(lambda x: self.plainly(wide, x), wide, x.double(), dy.double())
        for one, other, true in zip(ours, theirs, truth, strict=True):
            assert one.dtype == other.dtype
            if precision == "float64":
                # The truth has errors of its own here.
                torch.testing.assert_close(one, true, rtol=1e-12, atol=1e-12)
            else:
                assert_no_worse_than_torch(one, other, true)

    @staticmethod
    def gradients(forward, layer, x, dy):
        x = x.clone().requires_grad_(True)
        blocks, pair = layer.smt_blocks["default"], layer.smt_low_rank["default"]
        y = forward(x)
        trained = (blocks.weight, pair.lora_A, pair.lora_B)
        dx, d_blocks, *rest = torch.autograd.grad(y, (x, *trained), dy.to(y.dtype))
        if blocks.grid.is_ragged:
            d_blocks = d_blocks * blocks.layout().padding_mask()
        return [y.detach(), dx, d_blocks, *rest]

    @staticmethod
    def plainly(layer, x):
        """The sum of three products, as PEFT's LoRA computes its own."""
        base, blocks, pair = layer.base_layer, layer.smt_blocks["default"], layer.smt_low_rank["default"]
        dense = ops.dense(blocks.weight, blocks.layout())
        y = F.linear(x, base.weight, base.bias)
        wide = x.to(blocks.weight.dtype)
        y = (y + F.linear(wide, dense)).to(y.dtype)
        return (y + pair.scaling * F.linear(F.linear(wide, pair.lora_A), pair.lora_B)).to(y.dtype)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("mode", ["train", "eval"])
    def test_with_blocks_of_zero_it_is_pefts_lora_bit_for_bit(self, dtype, mode):
        torch.manual_seed(0)
        base = tiny_llama().to(dtype)
        # A power of two, which may be multiplied by anywhere.
        ours = adapted(copy.deepcopy(base), lora_alpha=8, lora_dropout=0.25)
        lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.25, target_modules="all-linear")
        theirs = get_peft_model(copy.deepcopy(base), lora)
        for layer in layers_of(ours):
            layer.smt_blocks["default"].weight.data.zero_()
            pair, other = layer.smt_low_rank["default"], theirs.get_base_model().get_submodule(layer.smt_name)
            other.lora_A["default"].weight.data.copy_(pair.lora_A)
            other.lora_B["default"].weight.data.copy_(pair.lora_B)
        logits, gradients = [], []
        for model in (ours, theirs):
            torch.manual_seed(2)
            output = getattr(model, mode)()(**batch())
            output.loss.backward()
            logits.append(output.logits)
            gradients.append({tuple(p.shape): p.grad for n, p in model.named_parameters() if "lora_" in n})
        assert torch.equal(*logits)
        assert all(torch.equal(gradients[0][shape], gradients[1][shape]) for shape in gradients[1])

    def test_a_pair_starts_as_pefts_does(self):
        model = adapted(tiny_llama(hidden=64), init_weights=True)
        for layer in layers_of(model):
            pair = layer.smt_low_rank["default"]
            bound = 1 / math.sqrt(layer.in_features)
            assert not pair.lora_B.any() and pair.lora_A.abs().max() <= bound
            # Uniform: its standard deviation is bound / sqrt(3).
            assert pair.lora_A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.15)

    def test_what_it_starts_from_is_the_configs_seed_alone(self):
        model = tiny_llama()
        state = torch.get_rng_state()
        first = adapted(model, init_weights=True)
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(17)
        second = adapted(tiny_llama())
        pairs = [[layer.smt_low_rank["default"].lora_A for layer in layers_of(each)] for each in (first, second)]
        assert all(torch.equal(*both) for both in zip(*pairs, strict=True))
        other = adapted(tiny_llama(), seed=2**70 + 1)
        assert not torch.equal(layers_of(other)[0].smt_low_rank["default"].lora_A, pairs[0][0])
        assert not torch.equal(pairs[0][0], pairs[0][3])

    def test_dropout_is_the_pairs_own_and_of_training_alone(self):
        model = adapted(tiny_llama(), lora_dropout=0.5)
        still = [model.eval()(**batch()).logits for _ in range(2)]
        assert torch.equal(*still)
        moved = [model.train()(**batch()).logits for _ in range(2)]
        assert not torch.equal(*moved)
        for layer in layers_of(model):
            layer.smt_low_rank["default"].lora_B.data.zero_()
        assert torch.equal(*[model.train()(**batch()).logits for _ in range(2)])

    def test_checkpointing_changes_no_gradient(self):
        torch.manual_seed(0)
        model = adapted(tiny_llama(), lora_dropout=0.3).train()
        found = []
        for checkpointed in (False, True):
            if checkpointed:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            model.zero_grad()
            torch.manual_seed(3)
            model(**batch()).loss.backward()
            found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        assert sum("lora_A" in name for name in found[0]) == len(layers_of(model))
        assert found[0].keys() == found[1].keys()
        assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])

    @pytest.mark.filterwarnings("ignore")
    def test_it_can_be_exported(self):
        layer = adapted(One(torch.float32), target_modules=["layer"]).eval().base_model.model.layer
        x = torch.randn(5, 40)
        torch.testing.assert_close(torch.jit.trace(layer, x)(2 * x), layer(2 * x))

    @pytest.mark.parametrize("kind", DEQUANTISABLE)
    def test_over_a_quantised_layer_it_is_that_over_the_dequantised_one(self, kind):
        net = One(torch.float32, (64, 64))
        packed = packed_linear(net.layer.requires_grad_(False), kind)
        plain = One(torch.float32, (64, 64))
        plain.layer, net.layer = plain_linear(packed), packed
        x = torch.randn(4, 64)
        results = []
        for each in (net, plain):
            torch.manual_seed(4)
            model = adapted(each, target_modules=["layer"], forward="overlay" if each is net else "swap").train()
            model(x).square().sum().backward()
            results.append([model(x).detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
        assert len(results[0]) == 4
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other)

    @pytest.mark.parametrize("optimizer", [torch.optim.AdamW, SMTAdamW])
    def test_an_optimizer_trains_both_kinds(self, optimizer):
        torch.manual_seed(0)
        model = adapted(tiny_llama(), init_weights=True).train()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        stepper = optimizer([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
        losses = []
        for _ in range(6):
            loss = model(**batch()).loss
            loss.backward()
            stepper.step()
            stepper.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert moved == {name for name in before if "smt_" in name}


class TestMerge:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
    @pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
    def test_merged_is_the_sum_rounded_once_and_unmerged_the_base_bit_for_bit(self, build, dtype):
        model = adapted(build().to(dtype))
        before = {layer.smt_name: layer.base_layer.weight.detach().clone() for layer in layers_of(model)}
        model.merge_adapter()
        for layer in layers_of(model):
            delta = delta_by_hand(layer)
            assert torch.equal(delta, delta_by_hand(layer))
            delta = delta.t() if isinstance(layer.base_layer, Conv1D) else delta
            assert torch.equal(layer.get_delta_weight("default"), delta)
            wide = torch.promote_types(dtype, torch.float32)
            expected = (before[layer.smt_name].to(wide) + delta.to(wide)).to(dtype)
            assert torch.equal(layer.base_layer.weight, expected)
            assert (expected != before[layer.smt_name]).float().mean() > 0.5
        model.unmerge_adapter()
        for layer in layers_of(model):
            assert torch.equal(layer.base_layer.weight, before[layer.smt_name])

    def test_the_sum_of_columns_is_the_product(self):
        layer = layers_of(adapted(tiny_llama()))[0]
        pair, blocks = layer.smt_low_rank["default"], layer.smt_blocks["default"]
        product = 3.0 * (pair.lora_B.double() @ pair.lora_A.double())
        truth = product + ops.dense(blocks.weight.double(), blocks.layout())
        torch.testing.assert_close(layer.get_delta_weight("default").double(), truth, rtol=1e-7, atol=0)

    def test_a_pair_of_zero_merges_as_blocks_alone(self):
        torch.manual_seed(0)
        base = tiny_llama().bfloat16()
        hybrid, plain = adapted(copy.deepcopy(base)), adapted(copy.deepcopy(base), lora_rank=None, lora_alpha=None)
        plain.load_state_dict(hybrid.state_dict(), strict=False)
        for layer in layers_of(hybrid):
            layer.smt_low_rank["default"].lora_B.data.zero_()
        merged = [model.merge_and_unload().state_dict() for model in (hybrid, plain)]
        assert merged[0].keys() == merged[1].keys()
        assert all(torch.equal(merged[0][key], merged[1][key]) for key in merged[0])

    def test_merged_and_unloaded_it_computes_what_it_did(self):
        model = adapted(tiny_llama()).eval()
        expected = model(**batch()).logits
        plain = model.merge_and_unload(safe_merge=True)
        assert not layers_of(plain)
        torch.testing.assert_close(plain(**batch()).logits, expected)

    def test_disabled_switched_and_unloaded_the_base_is_back_bit_for_bit(self):
        base = tiny_llama().bfloat16()
        before = {name: p.detach().clone() for name, p in base.named_parameters()}
        logits = base(**batch()).logits
        model = adapted(base)
        model.add_adapter("other", SMTConfig(**{**SETTINGS, "seed": 5, "lora_rank": 2}))
        model.merge_adapter(["default", "other"])
        with model.disable_adapter():
            assert torch.equal(model(**batch()).logits, logits)
        model.set_adapter("other")
        model.train()(**batch()).loss.backward()
        assert all((p.grad is not None) == (".other." in n) for n, p in model.named_parameters())
        model.merge_adapter()
        plain = model.unload()
        assert all(torch.equal(p, before[name]) for name, p in plain.named_parameters())

    def test_a_merge_that_would_not_be_finite_writes_nothing(self):
        model = adapted(tiny_llama())
        before = {name: p.detach().clone() for name, p in model.named_parameters() if "base_layer" in name}
        layers_of(model)[-1].smt_low_rank["default"].lora_B.data[0, 0] = torch.inf
        with pytest.raises(ValueError, match="NaNs detected"):
            model.merge_adapter(safe_merge=True)
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)

    @pytest.mark.parametrize("kind", DEQUANTISABLE)
    def test_unmerged_a_quantised_layer_has_its_packed_weight(self, kind):
        net = One(torch.float32, (64, 64))
        net.layer = packed = packed_linear(net.layer.requires_grad_(False), kind)
        before = storage(packed)
        model = adapted(net, target_modules=["layer"])
        model.merge_adapter()
        assert not same_storage(before, storage(packed))
        model.unmerge_adapter()
        assert same_storage(before, storage(packed))


ROADS = """
import sys, torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
import smt_peft

directory = sys.argv[1]
adapter, expected = directory + "/adapter", torch.load(directory + "/expected.pt")
torch.set_num_threads(1)


def base():
    return AutoModelForCausalLM.from_pretrained(directory + "/base")


def arrives(road, model, key="logits"):
    assert torch.equal(model.eval()(**expected["batch"]).logits, expected[key]), road


model = PeftModel.from_pretrained(base(), adapter)
arrives("from_pretrained", model)
merged = model.merge_and_unload()
assert all(torch.equal(p, expected["merged"][n]) for n, p in merged.named_parameters())
arrives("meta", PeftModel.from_pretrained(base(), adapter, low_cpu_mem_usage=True))
arrives("auto", AutoPeftModelForCausalLM.from_pretrained(adapter))
model = inject_adapter_in_model(PeftConfig.from_pretrained(adapter), base())
set_peft_model_state_dict(model, load_file(adapter + "/adapter_model.safetensors"))
arrives("injected", model)
model = base()
model.load_adapter(adapter)
arrives("transformers", model)
model = PeftModel.from_pretrained(base(), adapter, "first")
model.load_adapter(directory + "/second", "second")
arrives("first of two", model)
model.set_adapter("second")
arrives("second of two", model, "second")
model.delete_adapter("first")
arrives("second alone", model, "second")
print("arrived")
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("low_rank")
    torch.manual_seed(0)
    tiny_llama().save_pretrained(path / "base")
    expected = {"batch": batch()}
    for name, settings in {"second": {"seed": 3, "lora_rank": 2}, "adapter": {}}.items():
        model = adapted(AutoModelForCausalLM.from_pretrained(path / "base"), **settings).eval()
        model.save_pretrained(path / name)
        expected["second" if name == "second" else "logits"] = model(**batch()).logits.detach()
    merged = model.merge_and_unload()
    expected["merged"] = {name: p.detach() for name, p in merged.named_parameters()}
    torch.save(expected, path / "expected.pt")
    return path


def base_of(path):
    return AutoModelForCausalLM.from_pretrained(path / "base")


class TestFiles:
    def test_every_road_into_a_fresh_process_brings_the_same_model(self, saved):
        done = subprocess.run([sys.executable, "-c", ROADS, str(saved)], capture_output=True, text=True, check=False)
        assert done.stdout.strip().endswith("arrived"), done.stderr

    def test_one_file_holds_blocks_and_pairs_in_fp32(self, saved):
        tensors = load_file(saved / "adapter" / "adapter_model.safetensors")
        config = json.loads((saved / "adapter" / "adapter_config.json").read_text())
        assert (config["lora_rank"], config["lora_alpha"], config["lora_dropout"]) == (4, 12, 0.0)
        for module in config["block_pattern"]:
            keys = [f"base_model.model.{module}.smt_low_rank.lora_{part}" for part in "AB"]
            a, b = (tensors.pop(key) for key in keys)
            assert a.shape[0] == b.shape[1] == 4 and a.dtype == b.dtype == torch.float32
        assert {key.split(".")[-2] for key in tensors} == {"smt_blocks"}

    @pytest.mark.parametrize(
        ("damage", "said"),
        {
            "missing": (lambda tensors, key: tensors.pop(key), "has no smt_low_rank.lora_B for this module"),
            "shape": (
                lambda tensors, key: tensors.update({key: tensors[key][:, :2].clone()}),
                r"lora_B has shape \(32, 2\) in the file, but lora_rank and the weight say \(32, 4\)",
            ),
            "nan": (lambda tensors, key: tensors[key].fill_(torch.nan), "smt_low_rank.lora_B holds NaN or infinity"),
            "int": (lambda tensors, key: tensors.update({key: tensors[key].int()}), "is torch.int32, not a float type"),
        }.values(),
    )
    def test_a_damaged_file_is_refused_by_name(self, saved, tmp_path, damage, said):
        tensors = load_file(saved / "adapter" / "adapter_model.safetensors")
        damage(tensors, "base_model.model.model.layers.0.self_attn.q_proj.smt_low_rank.lora_B")
        save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
        (tmp_path / "adapter_config.json").write_bytes((saved / "adapter" / "adapter_config.json").read_bytes())
        base = base_of(saved)
        with pytest.raises(ValueError, match=rf"model\.layers\.0\.self_attn\.q_proj: .*{said}"):
            PeftModel.from_pretrained(base, tmp_path)
        assert not layers_of(base)

    def test_a_pair_that_the_config_does_not_know_is_refused(self, saved, tmp_path):
        config = json.loads((saved / "adapter" / "adapter_config.json").read_text())
        config |= {"lora_rank": None, "lora_alpha": None}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        source = saved / "adapter" / "adapter_model.safetensors"
        (tmp_path / "adapter_model.safetensors").write_bytes(source.read_bytes())
        with pytest.raises(ValueError, match="a low-rank pair for this module, but adapter_config.json has no lora_r"):
            PeftModel.from_pretrained(base_of(saved), tmp_path)

    def test_values_that_came_by_another_road_are_checked_at_the_first_call(self):
        model = adapted(tiny_llama())
        layers_of(model)[0].smt_low_rank["default"].lora_A.data[0, 0] = torch.nan
        with pytest.raises(ValueError, match="q_proj: smt_low_rank.lora_A holds NaN"):
            model(**batch())

    def test_one_is_swapped_in_for_another(self, saved, tmp_path):
        fewer = adapted(base_of(saved), seed=9, density=0.1, target_modules=["q_proj"]).eval()
        fewer.save_pretrained(tmp_path / "fewer")
        model = PeftModel.from_pretrained(base_of(saved), saved / "adapter")
        hotswap_adapter(model, str(tmp_path / "fewer"), "default")
        torch.testing.assert_close(model(**batch()).logits, fewer(**batch()).logits)
        with pytest.raises(ValueError, match="has lora_rank=2 with scaling 6, the loaded one lora_rank=4"):
            hotswap_adapter(model, str(saved / "second"), "default")


class TestTogether:
    def test_rows_of_one_batch_have_adapters_of_their_own(self, saved):
        model = PeftModel.from_pretrained(base_of(saved), saved / "adapter", "first")
        model.load_adapter(saved / "second", "second")
        model.add_adapter("plain", SMTConfig(**{**SETTINGS, "lora_rank": None, "lora_alpha": None, "seed": 7}))
        rows = {"input_ids": torch.randint(0, 64, (4, 6))}
        names = ["second", "__base__", "first", "plain"]
        mixed = model.eval()(**rows, adapter_names=names).logits
        for row, name in enumerate(names):
            alone = {"input_ids": rows["input_ids"][row : row + 1]}
            if name == "__base__":
                with model.disable_adapter():
                    expected = model(**alone).logits
            else:
                model.set_adapter(name)
                expected = model(**alone).logits
            torch.testing.assert_close(mixed[row], expected[0])

    def test_a_weighted_sum_is_refused_by_name(self, saved):
        model = PeftModel.from_pretrained(base_of(saved), saved / "adapter", "first")
        with pytest.raises(ValueError, match="Adapter first has lora_rank=4"):
            model.base_model.add_weighted_adapter(["first"], [1.0], "sum")

    def test_parameters_are_counted_with_the_pair(self):
        model = adapted(tiny_llama())
        trainable, _ = model.base_model.get_nb_trainable_parameters()
        layers = layers_of(model)
        pairs = sum(4 * (layer.in_features + layer.out_features) for layer in layers)
        assert trainable == pairs + sum(layer.smt_blocks["default"].layout().effective_numel for layer in layers)

    def test_the_effective_update_is_that_of_the_whole_matrix(self):
        model = adapted(tiny_llama().bfloat16())
        before = {layer.smt_name: layer.base_layer.weight.detach().clone() for layer in layers_of(model)}
        found = effective_update(model)
        model.merge_adapter()
        for layer in layers_of(model):
            one, weight = found[layer.smt_name], layer.base_layer.weight
            assert one.entries == weight.numel() and one.dtype == "bfloat16"
            assert one.moved == int(delta_by_hand(layer).count_nonzero())
            assert one.changed == int((weight != before[layer.smt_name]).sum())

    def test_modules_without_a_block_have_no_pair(self):
        model = adapted(tiny_llama(), budget="global", spread="free", density=None, num_blocks=3)
        chosen = [layer.smt_name for layer in layers_of(model)]
        assert 1 <= len(chosen) <= 3
        pairs = {name.split(".smt_low_rank")[0] for name, _ in model.named_parameters() if "smt_low_rank" in name}
        assert pairs == {f"base_model.model.{name}" for name in chosen}

    def test_the_rank_that_max_lora_rank_promises_is_that_of_the_sum(self):
        model = tiny_llama(hidden=64)
        config = SMTConfig(**{**SETTINGS, "density": 0.4, "score": "magnitude", "max_lora_rank": 20})
        config.selection = select_blocks(model, config)
        adapter = get_peft_model(model, config)
        ranks = [int(torch.linalg.matrix_rank(delta_by_hand(layer))) for layer in layers_of(adapter)]
        assert max(ranks) == 20


REFUSED = {
    "no rank": ({"lora_rank": 0}, "lora_rank must be a positive int or None"),
    "half a rank": ({"lora_rank": 1.5}, "lora_rank must be a positive int or None"),
    "alpha alone": ({"lora_rank": None}, "lora_alpha=12 has no effect without lora_rank"),
    "dropout alone": ({"lora_rank": None, "lora_alpha": None, "lora_dropout": 0.1}, "lora_dropout=0.1 has no effect"),
    "no alpha": ({"lora_alpha": 0}, "lora_alpha must be a number above 0"),
    "all dropped": ({"lora_dropout": 1.0}, "lora_dropout must be at least 0 and below 1"),
    "no rank left": ({"max_lora_rank": 4}, "max_lora_rank=4 is the rank of blocks and low-rank pair together"),
    "blocks to avoid": ({"avoid": "other.safetensors"}, "avoid keeps clear .* but lora_rank=4"),
    "experts": ({"target_parameters": ["experts.down_proj"]}, r"lora_rank=4 .* target_parameters=\['experts"),
}


@pytest.mark.parametrize(("settings", "said"), REFUSED.values(), ids=REFUSED)
def test_what_contradicts_it_is_refused_by_name(settings, said):
    with pytest.raises(ValueError, match=said):
        SMTConfig(**{**SETTINGS, **settings})


def test_a_table_is_refused_by_name_and_the_model_left_as_it_was():
    model = tiny_llama()
    with pytest.raises(ValueError, match=r"model\.embed_tokens: lora_rank=4 .* a Embedding is none"):
        adapted(model, target_modules=["q_proj", "embed_tokens"])
    assert not layers_of(model)
