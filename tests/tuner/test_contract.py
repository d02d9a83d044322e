"""What PEFT's users take for granted: configs are reusable, errors leave no trace, no module is passed over."""

from __future__ import annotations

import collections
import copy
import json

import pytest
import torch
from helpers import Mlp, batch, tiny_gpt2, tiny_llama
from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from torch import nn

from smt_peft import SMTConfig, ops, select_blocks
from smt_peft.ops import swap
from smt_peft.tuner.layer import SMTLayer

SETTINGS = {"target_modules": "all-linear", "density": 0.2, "block_size": 8, "score": "random", "init_weights": False}


def layers(model) -> list[SMTLayer]:
    return [module for module in model.modules() if isinstance(module, SMTLayer)]


def footprint(model) -> dict:
    """Everything an error must leave as it was."""
    return {
        "modules": [(name, type(module)) for name, module in model.named_modules()],
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "config": hasattr(model, "peft_config") and list(model.peft_config),
    }


def assert_unchanged(model, before) -> None:
    now = footprint(model)
    for part in ("modules", "requires_grad", "config"):
        assert now[part] == before[part], part
    for name, tensor in before["state"].items():
        assert torch.equal(now["state"][name], tensor), name


class TestConfigIsReusable:
    def test_a_second_model_gets_its_own_blocks_and_fingerprint(self, tmp_path):
        config = SMTConfig(**SETTINGS)
        get_peft_model(tiny_llama(layers=1), config)
        torch.manual_seed(1)
        base = tiny_llama(layers=3)
        state = copy.deepcopy(base.state_dict())
        model = get_peft_model(base, config).eval()
        assert len(layers(model)) == 21
        model.save_pretrained(tmp_path)
        again = tiny_llama(layers=3)
        again.load_state_dict(state)
        loaded = PeftModel.from_pretrained(again, tmp_path)
        assert torch.equal(loaded(**batch()).logits, model(**batch()).logits)

    def test_a_change_between_uses_counts(self):
        config = SMTConfig(**SETTINGS)
        small = get_peft_model(tiny_llama(), config).num_parameters(only_trainable=True)
        config.density = 0.6
        assert get_peft_model(tiny_llama(), config).num_parameters(only_trainable=True) > 2 * small

    def test_also_after_a_failure(self):
        config = SMTConfig(**SETTINGS, forward="overlay")
        with pytest.raises(ValueError, match="overlay"):
            get_peft_model(tiny_llama(), config)
        config.forward = "auto"
        assert get_peft_model(tiny_gpt2(), config)(**batch()).loss.requires_grad

    def test_two_adapters_from_one(self):
        config = SMTConfig(**SETTINGS)
        model = get_peft_model(tiny_llama(), config)
        model.add_adapter("other", config)
        assert all(set(layer.smt_blocks) == {"default", "other"} for layer in layers(model))

    def test_saving_one_of_two_models_that_share_it(self, tmp_path):
        config = SMTConfig(**SETTINGS)
        base = tiny_llama(layers=1)
        state = copy.deepcopy(base.state_dict())
        first = get_peft_model(base, config).eval()
        torch.manual_seed(1)
        get_peft_model(tiny_llama(layers=3), config)
        first.save_pretrained(tmp_path)
        again = tiny_llama(layers=1)
        again.load_state_dict(state)
        assert torch.equal(PeftModel.from_pretrained(again, tmp_path)(**batch()).logits, first(**batch()).logits)

    def test_the_plan_is_dropped_once_it_is_carried_out(self):
        model = get_peft_model(Mlp(), SMTConfig(**SETTINGS))
        assert model.peft_config["default"].plan is None


class TestNothingHalfDone:
    @pytest.fixture
    def adapter(self, tmp_path):
        base = tiny_llama()
        state = copy.deepcopy(base.state_dict())
        get_peft_model(base, SMTConfig(**SETTINGS, modules_to_save=["norm"])).save_pretrained(tmp_path)

        def fresh():
            model = tiny_llama()
            model.load_state_dict(state)
            return model

        return tmp_path, fresh

    @staticmethod
    def damage(path):
        file = path / "adapter_model.safetensors"
        tensors = load_file(file)
        tensors[next(key for key in tensors if key.endswith("smt_blocks.weight"))].fill_(float("nan"))
        save_file(tensors, file, {"format": "pt"})

    def test_from_pretrained(self, adapter):
        path, fresh = adapter
        self.damage(path)
        base = fresh()
        before = footprint(base)
        with pytest.raises(ValueError, match="NaN or infinity"):
            PeftModel.from_pretrained(base, path)
        assert_unchanged(base, before)

    def test_load_adapter_beside_another_on_other_modules(self, adapter):
        path, fresh = adapter
        self.damage(path)
        model = get_peft_model(fresh(), SMTConfig(**{**SETTINGS, "target_modules": ["q_proj"]}))
        before = footprint(model)
        with pytest.raises(ValueError, match="NaN or infinity"):
            model.load_adapter(path, "other")
        assert_unchanged(model, before)

    def test_injection(self):
        base = tiny_llama()
        before = footprint(base)
        with pytest.raises(ValueError, match="overlay"):
            get_peft_model(base, SMTConfig(**SETTINGS, forward="overlay"))
        assert_unchanged(base, before)

    def test_an_adapter_of_the_user_survives_a_bad_load(self, adapter):
        path, fresh = adapter
        model = get_peft_model(fresh(), SMTConfig(**SETTINGS))
        model.add_adapter("mine", SMTConfig(**SETTINGS))
        before = footprint(model)
        state = get_peft_model_state_dict(model, adapter_name="mine")
        key = next(key for key in state if key.endswith("smt_blocks.weight"))
        with pytest.raises(ValueError, match="NaN or infinity"):
            set_peft_model_state_dict(model, {**state, key: state[key] * float("nan")}, adapter_name="mine")
        assert_unchanged(model, before)

    @pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
    def test_safe_merge_looks_at_every_layer_first(self, merge):
        model = get_peft_model(tiny_llama(), SMTConfig(**SETTINGS))
        with torch.no_grad():
            layers(model)[-1].smt_blocks["default"].weight[0, 0, 0] = float("inf")
        before = footprint(model)
        with pytest.raises(ValueError, match="NaNs detected.*down_proj"):
            getattr(model, merge)(safe_merge=True)
        assert_unchanged(model, before)
        assert not any(layer.merged for layer in layers(model))

    def test_a_later_adapter_of_a_safe_merge(self):
        model = get_peft_model(Mlp(), SMTConfig(**SETTINGS))
        model.add_adapter("other", SMTConfig(**SETTINGS, seed=3))
        layer = layers(model)[0]
        before = footprint(model)
        with torch.no_grad():
            layer.smt_blocks["other"].weight.fill_(float("nan"))
        with pytest.raises(ValueError, match="NaNs detected"):
            layer.merge(safe_merge=True, adapter_names=["default", "other"])
        assert torch.equal(layer.base_layer.weight, before["state"]["base_model.model.up.base_layer.weight"])


class TestTheFileAndTheConfigAgree:
    def test_a_module_missing_from_block_pattern(self, tmp_path):
        base = tiny_llama()
        model = get_peft_model(base, SMTConfig(**SETTINGS))
        model.save_pretrained(tmp_path)
        file = tmp_path / "adapter_config.json"
        settings = json.loads(file.read_text())
        settings["block_pattern"].pop("model.layers.1.mlp.down_proj")
        file.write_text(json.dumps(settings))
        with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.down_proj: the adapter file has blocks"):
            PeftModel.from_pretrained(model.unload(), tmp_path)

    def test_a_state_dict_with_more_modules_than_the_config(self):
        model = get_peft_model(tiny_llama(), SMTConfig(**SETTINGS))
        state = {key.removeprefix("base_model.model."): t for key, t in get_peft_model_state_dict(model).items()}
        base = tiny_llama()
        before = footprint(base)
        with pytest.raises(ValueError, match="the config does not target it"):
            inject_adapter_in_model(SMTConfig(**{**SETTINGS, "target_modules": ["q_proj"]}), base, state_dict=state)
        assert_unchanged(base, before)

    @pytest.mark.parametrize(
        "change",
        [
            {"block_pattern": [1, 2]},
            {"block_pattern": {"(": [1, 8, 8]}},
            {"block_pattern": {"model.layers.0.self_attn.q_proj": [1, 10**7, 10**7]}},
            {"block_pattern": {"model.layers.0.self_attn.q_proj": [1, 8, 8], "0.self_attn.q_proj": [2, 8, 8]}},
            {"base_fingerprint": [1, 2]},
            {"base_fingerprint": {"m": "x"}},
        ],
        ids=str,
    )
    def test_damaged_settings(self, tmp_path, change):
        base = tiny_llama()
        get_peft_model(base, SMTConfig(**SETTINGS)).save_pretrained(tmp_path)
        file = tmp_path / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
        with pytest.raises(ValueError, match="block_pattern|base_fingerprint"):
            PeftModel.from_pretrained(tiny_llama(), tmp_path)

    def test_non_finite_blocks_on_transformers_own_road(self, tmp_path):
        base = tiny_llama()
        get_peft_model(base, SMTConfig(**SETTINGS)).save_pretrained(tmp_path)
        TestNothingHalfDone.damage(tmp_path)
        model = tiny_llama()
        with pytest.raises(ValueError, match="NaN or infinity|base weights"):
            model.load_adapter(str(tmp_path))
            model(**batch())


class TestFingerprint:
    def test_every_part_of_the_model_and_of_a_weight_is_looked_at(self, tmp_path):
        base = tiny_llama(layers=8)
        state = copy.deepcopy(base.state_dict())
        get_peft_model(base, SMTConfig(**SETTINGS)).save_pretrained(tmp_path)

        def load(changed):
            model = tiny_llama(layers=8)
            model.load_state_dict(changed)
            return PeftModel.from_pretrained(model, tmp_path)

        load(state)
        last = {name: torch.randn_like(t) if ".layers.7." in name else t for name, t in state.items()}
        columns = {
            name: torch.cat((t[:, :1], torch.randn_like(t[:, 1:])), 1) if "_proj" in name else t
            for name, t in state.items()
        }
        for changed in (last, columns):
            with pytest.raises(ValueError, match="base weights are not those expected"):
                load(changed)

    def test_it_is_the_bases_also_while_another_adapter_is_merged(self, tmp_path):
        base = Mlp()
        model = get_peft_model(base, SMTConfig(**{**SETTINGS, "density": 1.0}))
        original = {
            name.replace(".base_layer", ""): t.clone()
            for name, t in base.state_dict().items()
            if "smt_blocks" not in name
        }
        model.merge_adapter()
        model.add_adapter("other", SMTConfig(**SETTINGS))
        model.unmerge_adapter()
        model.save_pretrained(tmp_path, selected_adapters=["other"])
        again = Mlp()
        again.load_state_dict(original)
        PeftModel.from_pretrained(again, tmp_path / "other")

    def test_a_selection_made_of_others_keeps_the_base_they_share(self):
        base = tiny_llama()
        one, two = (select_blocks(base, SMTConfig(**SETTINGS, seed=seed), None) for seed in (0, 1))
        assert (one | two).provenance["base_fingerprint"] == one.provenance["base_fingerprint"]
        torch.manual_seed(1)
        other = select_blocks(tiny_llama(), SMTConfig(**SETTINGS), None)
        assert "base_fingerprint" not in (one | other).provenance


class TestTheBaseIsGivenBack:
    def test_unload_while_merged(self):
        base = tiny_llama()
        before = copy.deepcopy(base.state_dict())
        model = get_peft_model(base, SMTConfig(**SETTINGS))
        model.merge_adapter()
        unloaded = model.unload().state_dict()
        assert all(torch.equal(unloaded[name], tensor) for name, tensor in before.items())

    def test_loading_over_a_merged_adapter(self):
        base = tiny_llama()
        model = get_peft_model(base, SMTConfig(**SETTINGS))
        before = footprint(model)["state"]
        state = get_peft_model_state_dict(get_peft_model(tiny_llama(), SMTConfig(**SETTINGS, seed=7)))
        model.peft_config["default"].base_fingerprint = None
        model.merge_adapter()
        set_peft_model_state_dict(model, state)
        model.unmerge_adapter()
        for name, tensor in model.state_dict().items():
            if "base_layer" in name:
                assert torch.equal(tensor, before[name]), name

    @pytest.mark.parametrize("tied", [False, True])
    def test_trained_token_rows_merge_and_unload(self, tied):
        base = tiny_llama(tied=tied)
        before = copy.deepcopy(base.state_dict())
        model = get_peft_model(base, SMTConfig(**SETTINGS, trainable_token_indices=[1, 5])).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "trainable_tokens_delta" in name:
                    parameter.add_(0.5)
            tuned = model(**batch()).logits
            merged = copy.deepcopy(model).merge_and_unload()
            assert torch.allclose(merged(**batch()).logits, tuned, atol=1e-5)
        unloaded = model.unload().state_dict()
        assert all(torch.equal(unloaded[name], tensor) for name, tensor in before.items())

    @pytest.mark.parametrize("way_out", ["state_dict", "unload", "double", "load_state_dict", "merge", "forward"])
    def test_every_way_out_heals_an_interrupted_swap(self, monkeypatch, way_out):
        base = Mlp()
        before = copy.deepcopy(base.state_dict())
        model = get_peft_model(base, SMTConfig(**SETTINGS)).train()
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
            model(torch.randn(2, 20))
        weight = layers(model)[0].base_layer.weight
        assert not torch.equal(weight, before["up.weight"])
        if way_out == "state_dict":
            weight = model.state_dict()["base_model.model.up.base_layer.weight"]
        elif way_out == "unload":
            weight = model.unload().up.weight
        elif way_out == "double":
            weight = model.double().base_model.model.up.base_layer.weight.float()
        elif way_out == "load_state_dict":
            model.load_state_dict({"base_model.model.up.base_layer.weight": torch.ones(36, 20)}, strict=False)
            before["up.weight"] = torch.ones(36, 20)
        elif way_out == "merge":
            model.merge_adapter()
            model.unmerge_adapter()
        else:
            model(torch.randn(2, 20))
        assert torch.equal(weight, before["up.weight"])


class TestOddModules:
    def test_a_name_that_ends_another(self):
        model = nn.Module()
        model.inner, model.fc = nn.Module(), nn.Linear(16, 16)
        model.inner.fc = nn.Linear(16, 16)
        config = SMTConfig(target_modules="all-linear", block_size=8, num_blocks=1, score="magnitude", budget="global")
        with torch.no_grad():
            model.inner.fc.weight.mul_(100)
        wrapped = get_peft_model(model, config)
        assert [layer.smt_name for layer in layers(wrapped)] == ["inner.fc"]

    @pytest.mark.parametrize("kind", ["parametrized", "own forward", "int8"])
    def test_a_weight_that_is_not_what_the_layer_computes_is_not_merged_into(self, kind):
        model = nn.Sequential(collections.OrderedDict(first=nn.Linear(16, 20), rest=Mlp()))
        first, model = model, model.rest
        if kind == "parametrized":
            nn.utils.parametrizations.weight_norm(model.up)
        else:
            forward = {"forward": lambda self, x: 2 * nn.functional.linear(x, self.weight.float(), self.bias)}
            model.up.__class__ = type("Special", (nn.Linear,), forward if kind == "own forward" else {})
        if kind == "int8":
            model.up.weight = nn.Parameter(torch.zeros(36, 20, dtype=torch.int8), requires_grad=False)
        wrapped = get_peft_model(first, SMTConfig(**{**SETTINGS, "target_modules": ["first", "up"]}))
        with pytest.raises(ValueError, match="up: the blocks cannot be merged, because"):
            wrapped.merge_adapter()
        assert not any(layer.merged for layer in layers(wrapped))

    def test_a_transformer_encoder_layer_uses_its_adapter_in_evaluation(self):
        encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
        model = get_peft_model(encoder, SMTConfig(**{**SETTINGS, "target_modules": ["linear1", "linear2"]}))
        x = torch.randn(2, 5, 16)
        assert torch.allclose(model.eval()(x), model.train()(x), atol=1e-5)
        with torch.no_grad():
            assert torch.allclose(model.eval()(x), model.merge_and_unload()(x), atol=1e-5)

    def test_delta_weight_of_a_conv1d_is_laid_out_as_its_weight(self):
        model = get_peft_model(tiny_gpt2(), SMTConfig(**SETTINGS))
        layer = next(layer for layer in layers(model) if layer.smt_name.endswith("attn.c_attn"))
        before = layer.base_layer.weight.detach().clone()
        delta = layer.get_delta_weight("default")
        layer.merge()
        assert torch.allclose(layer.base_layer.weight, before + delta, atol=1e-6)

    def test_padding_starts_at_zero_and_stays_there(self):
        model = get_peft_model(Mlp(), SMTConfig(**{**SETTINGS, "block_size": 7, "density": 1.0}))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            model(torch.randn(4, 20)).sum().backward()
            optimizer.step()
        for layer in layers(model):
            blocks = layer.smt_blocks["default"]
            assert not blocks.weight[~blocks.layout().padding_mask()].any()

    def test_global_hooks_and_partitioned_weights_are_left_to_the_base_layer(self):
        model = get_peft_model(Mlp(), SMTConfig(**SETTINGS)).train()
        called = []
        handle = nn.modules.module.register_module_forward_hook(lambda *_: called.append(1))
        try:
            model(torch.randn(2, 20))
        finally:
            handle.remove()
        assert {layer._told for layer in layers(model)} == {"additive"}
        for layer in layers(model):
            layer.base_layer.weight.ds_id = 0
        model(torch.randn(2, 20))
        assert {layer._told for layer in layers(model)} == {"additive"}


class TestModes:
    def test_built_and_used_in_inference_mode(self):
        with torch.inference_mode():
            model = get_peft_model(Mlp(), SMTConfig(**SETTINGS)).eval()
            assert model(torch.randn(2, 20)).shape == (2, 12)

    def test_trained_after_a_look_in_inference_mode(self):
        model = get_peft_model(Mlp(), SMTConfig(**SETTINGS))
        with torch.inference_mode():
            model.eval()(torch.randn(2, 20))
        for mode in (model.train(), model.eval()):
            mode(torch.randn(2, 20)).sum().backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)

    def test_compiled_and_exported_before_any_other_call(self):
        x = torch.randn(2, 20)
        model = get_peft_model(Mlp(), SMTConfig(**SETTINGS)).eval()
        exported = torch.export.export(model, (x,)).module()
        compiled = torch.compile(get_peft_model(Mlp(), SMTConfig(**SETTINGS)), fullgraph=True, backend="aot_eager")
        compiled(x).sum().backward()
        assert torch.allclose(exported(x), model(x), atol=1e-5)

    def test_an_adapter_on_the_meta_device_has_its_positions(self):
        model = get_peft_model(Mlp(), SMTConfig(**SETTINGS))
        model.add_adapter("other", SMTConfig(**SETTINGS, seed=3), low_cpu_mem_usage=True)
        for layer in layers(model):
            blocks = layer.smt_blocks["other"]
            assert blocks.weight.is_meta
            blocks.grid.check_blocks(blocks.index, "other")

    def test_forced_swap_counts_for_any_active_adapter(self):
        model = get_peft_model(Mlp(), SMTConfig(**SETTINGS))
        model.add_adapter("other", SMTConfig(**SETTINGS, forward="swap"))
        model.base_model.set_adapter(["default", "other"])
        with pytest.raises(RuntimeError, match="several adapters are active"):
            model(torch.randn(2, 20))

    def test_a_selection_changed_after_it_was_made_is_checked(self):
        base = tiny_llama()
        selection = select_blocks(base, SMTConfig(**SETTINGS), None)
        name = next(iter(selection.blocks))
        selection.blocks[name] = torch.tensor([[0, 99]], dtype=torch.int32)
        with pytest.raises(ValueError, match=f"{name}: block .* outside the grid"):
            get_peft_model(base, SMTConfig(**SETTINGS, selection=selection))

    def test_a_loaded_config_is_a_plain_smt_config(self, tmp_path):
        get_peft_model(Mlp(), SMTConfig(**SETTINGS)).save_pretrained(tmp_path)
        assert isinstance(PeftConfig.from_pretrained(tmp_path), SMTConfig)
