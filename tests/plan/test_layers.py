"""A few layers stand for all that are like them: what is counted with them is what is counted with all, to the byte."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from smt_peft import SMTConfig
from smt_peft.plan import methods
from smt_peft.plan.layers import Layers, abridge, stack_of
from smt_peft.plan.memory import memory
from smt_peft.plan.packed import Packing, pack
from smt_peft.plan.setting import Setting
from smt_peft.plan.warmup import warm_up

COMMON = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
COMMON |= {"num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 8}
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"] * 6, "sliding_window": 8}


@dataclass(frozen=True)
class Deep:
    """A model of many layers, and how many of them have to be there."""

    type: str
    layers: int
    kept: int
    settings: dict[str, Any]

    def build(self) -> nn.Module:
        config = AutoConfig.for_model(self.type, num_hidden_layers=self.layers, **(COMMON | self.settings))
        auto = AutoModelForMaskedLM if self.type == "bert" else AutoModelForCausalLM
        return methods.empty(lambda: auto.from_config(config, dtype=torch.bfloat16))


MODELS = {
    "llama": Deep("llama", 9, 3, {}),
    "gpt2": Deep("gpt2", 8, 3, {"n_embd": 32, "n_head": 4, "n_inner": 48, "n_positions": 64}),
    "bert": Deep("bert", 7, 3, {"hidden_dropout_prob": 0.1}),
    "mixtral": Deep("mixtral", 6, 3, {"num_local_experts": 4, "num_experts_per_tok": 2}),
    # One layer of another kind in front, and kinds that take turns.
    "qwen3_moe": Deep(
        "qwen3_moe",
        7,
        4,
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "mlp_only_layers": [0]},
    ),
    "gemma3_text": Deep("gemma3_text", 12, 6, ALTERNATING),
    "smollm3": Deep("smollm3", 20, 12, {"no_rope_layer_interval": 4, "pad_token_id": 0}),
}
EXPERTS = {"mixtral", "qwen3_moe"}


def smt_config(name: str, **settings: Any) -> SMTConfig:
    experts = ["experts.gate_up_proj", "experts.down_proj"] if name in EXPERTS else None
    settings = {"density": 0.05, "block_size": 8, "spread": "assignment"} | settings
    return SMTConfig(target_modules="all-linear", target_parameters=experts, **settings)


def both(name: str, config: SMTConfig, packing: Packing | None = None):
    """The model as it is, and one with layers left out: each with its layers and its selection."""

    def build() -> nn.Module:
        model = MODELS[name].build()
        return model if packing is None else pack(model, packing)

    model, few = build(), build()
    selection = methods.assumed_selection(model, config)
    layers, rest = abridge(few, selection)
    return (model, Layers(), selection), (few, layers, rest)


def put_on(method: str, config: SMTConfig, whole, model: nn.Module, rest) -> nn.Module:
    if method == "smt":
        return methods.smt(model, config, rest)
    rivals = methods.rivals(whole, config.modules_to_save)
    return next(put_on for name, put_on in rivals.items() if name.split()[0] == method)(model, rest)


# PEFT has no DoRA over the experts of a mixture, and LoRA here is for models that generate.
NOT = {*((name, "DoRA") for name in EXPERTS), ("bert", "LoRA"), ("bert", "DoRA")}
PAIRS = [(name, method) for name in MODELS for method in ("smt", "LoRA", "DoRA", "full") if (name, method) not in NOT]


@pytest.mark.parametrize(("name", "method"), PAIRS)
def test_all_layers_are_counted_by_a_few(name, method):
    config = smt_config(name)
    (model, all_layers, whole), (few, layers, rest) = both(name, config)
    assert len(stack_of(few)[1]) == MODELS[name].kept
    setting = Setting(sequences=2, tokens=16, optimizer="adamw_torch")
    true = memory(method, put_on(method, config, whole, model, whole), setting, both=True, layers=all_layers)
    found = memory(method, put_on(method, config, whole, few, rest), setting, both=True, layers=layers)
    assert found == true


SCORES = ("grad_abs", "grad_sum_abs", "activation", "magnitude")
WARM_UPS = [("llama", score, checkpointing) for score in SCORES for checkpointing in (False, True)]
# Of the others what keeps most, with and without checkpointing.
WARM_UPS += [(name, "grad_abs", True) for name in MODELS if name != "llama"]
WARM_UPS += [(name, "grad_sum_abs", False) for name in MODELS if name != "llama"]


@pytest.mark.parametrize(("name", "score", "checkpointing"), WARM_UPS)
def test_the_warm_up_of_all_layers_is_counted_by_a_few(name, score, checkpointing):
    config = smt_config(name, score=score)
    (model, _, _), (few, layers, _) = both(name, config)
    batch = lambda: {key: torch.zeros(2, 16, dtype=torch.int64, device="meta") for key in ("input_ids", "labels")}  # noqa: E731
    for each in (model, few) if checkpointing else ():
        each.gradient_checkpointing_enable({"use_reentrant": False})
    assert warm_up(few, config, batch, layers=layers) == warm_up(model, config, batch)


@pytest.mark.parametrize(
    "setting",
    [
        Setting(accumulation=4),
        Setting(processes=4, sharded=True),
        Setting(processes=3),
        Setting(optimizer="adafactor", checkpointing=True),
        Setting(packing=Packing("nf4", 4)),
        Setting(optimizer="mezo", processes=2, accumulation=2),
    ],
    ids=["accumulating", "sharded", "copies", "adafactor", "packed", "forward only"],
)
def test_every_setting_is_counted_by_a_few(setting):
    config = smt_config("llama")
    (model, all_layers, whole), (few, layers, rest) = both("llama", config, setting.packing)
    true = memory("smt", methods.smt(model, config, whole), setting, both=True, layers=all_layers)
    assert memory("smt", methods.smt(few, config, rest), setting, both=True, layers=layers) == true


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"layers_to_transform": [5, 6]}, 9),
        ({"budget": {r"layers\.[0-3]\.": 0.5, ".*": 0.1}}, 7),
        ({"budget": "global", "spread": "free", "num_blocks": 65, "density": None}, 9),
    ],
    ids=["some layers", "two budgets", "one budget"],
)
def test_layers_with_other_blocks_are_counted_each(settings, kept):
    config = smt_config("llama", **settings)
    (model, all_layers, whole), (few, layers, rest) = both("llama", config)
    assert len(stack_of(few)[1]) == kept
    setting = Setting(sequences=2, tokens=16)
    true = memory("smt", methods.smt(model, config, whole), setting, both=True, layers=all_layers)
    assert memory("smt", methods.smt(few, config, rest), setting, both=True, layers=layers) == true


def test_a_layer_with_a_head_is_not_like_one_with_a_channel():
    """One block each, but 16 times the weights."""
    model = Deep("llama", 2, 2, {}).build()
    # A head and a channel in all, which this seed puts in different layers.
    settings = {"density": 1e-3, "density_pattern": {".*attn.*": 1e-3}, "budget": "global", "seed": 0}
    config = SMTConfig(coupled="consumers", score="random", **settings)
    selection = methods.select_without_data(methods.find_targets(model, config), config)
    assert len({name.split(".")[2] for name in selection.blocks}) == 2
    assert {len(blocks) for blocks in selection.blocks.values()} == {1} and len(selection.blocks) == 2
    assert methods.assumed_selection(model, config).effective_numel == selection.effective_numel


def test_a_drawn_selection_has_as_many_blocks_after_its_layers_are_made_alike():
    config = smt_config("llama", spread="free")
    model = MODELS["llama"].build()
    selection = methods.assumed_selection(model, config)
    name = "model.layers.{}.mlp.up_proj"
    assert torch.equal(selection.blocks[name.format(1)], selection.blocks[name.format(8)])
    assert {len(selection.blocks[name.format(n)]) for n in range(9)} == {len(selection.blocks[name.format(0)])}
