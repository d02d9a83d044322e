"""Which bare parameters a config names, and what must not stay frozen in silence."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from helpers import tiny_llama
from mixtures import (
    EXPERTS,
    Bank,
    adapted,
    layers,
    tiny_mixtral,
)
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn

from smt_peft import SMTConfig
from smt_peft.tuner.experts import ParamWrapper


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
