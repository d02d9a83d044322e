"""The SMT cases that go into the parametrised tests of PEFT's suite, one constant per list of PEFT's."""

from __future__ import annotations

from smt_peft import SMTConfig

# Small blocks at places that need no data: the models of the suite are tiny.
FEW = {"block_size": 2, "num_blocks": 3, "budget": "per_module", "score": "magnitude"}
LIN0 = {"target_modules": ["lin0"]}
BOTH = {"target_modules": ["lin0", "lin1"]}
WEIGHT0, WEIGHT1 = ({"target_modules": [], "target_parameters": [f"lin{i}.weight"]} for i in range(2))
RANDOM = {"init_weights": False}

# What SMTConfig offers, one case each, on a perceptron of 10 -> 20 -> 2: `{name: settings}`.
MLP = {
    "square": {**LIN0, **FEW},
    "regex": {**FEW, "target_modules": "lin0", "score": "random"},
    "second layer": {**FEW, "target_modules": ["lin1"]},
    "defaults": LIN0,
    "rectangular": {**LIN0, **FEW, "block_size": [4, 2], "spread": "free"},
    "columns": {**LIN0, **FEW, "block_size": [-1, 1]},
    "rows": {**LIN0, **FEW, "block_size": [1, -1], "score": "random"},
    "ragged": {**LIN0, **FEW, "block_size": 3, "num_blocks": 28},
    "all blocks": {**LIN0, "block_size": 2, "density": 1.0, "score": "magnitude"},
    "block pattern": {**BOTH, **FEW, "block_pattern": {"lin0": [7, 2, 2], "lin1": [3, 2, 2]}},
    "modules to save": {**LIN0, **FEW, "modules_to_save": ["lin1"]},
    "additive": {**LIN0, **FEW, "forward": "additive"},
    "swap": {**BOTH, **FEW, "block_size": 3, "forward": "swap"},
    "diagonal, per layer": {**BOTH, **FEW, "score": "diagonal", "budget": "per_layer"},
    "low rank, global": {**BOTH, **FEW, "score": "low_rank_magnitude", "budget": "global", "spread": "capped"},
    "density pattern": {**BOTH, "block_size": 2, "density": 0.2, "score": "random", "density_pattern": {"lin1": 0.6}},
    "shares": {**BOTH, "block_size": 2, "density": 0.2, "score": "random", "budget": {"lin0": 0.7, "lin1": 0.3}},
    "capped columns": {**LIN0, "block_size": 2, "density": 0.3, "score": "magnitude", "max_column_share": 0.5},
    "capped rank": {**LIN0, "block_size": 2, "density": 0.3, "score": "magnitude", "max_lora_rank": 4},
}

# (name, model, config class, settings)
CUSTOM = [(f"SMT {name}", "MLP", SMTConfig, settings) for name, settings in MLP.items()]
CUSTOM += [
    ("SMT Conv1D", "EmbConv1D", SMTConfig, {**FEW, "target_modules": ["conv1d"]}),
    ("SMT beside a convolution", "Conv2d", SMTConfig, {**FEW, "target_modules": ["lin0"]}),
    ("SMT in an attention", "MHA", SMTConfig, {**FEW, "target_modules": ["lin0"]}),
    ("SMT embedding", "EmbConv1D", SMTConfig, {**FEW, "target_modules": ["emb"], "num_blocks": 100}),
    ("SMT embedding beside Conv1D", "EmbConv1D", SMTConfig, {**FEW, "target_modules": ["emb", "conv1d"]}),
    ("SMT parameter", "MlpUsingParameters", SMTConfig, {**FEW, **WEIGHT0}),
    ("SMT module and parameter", "MLP", SMTConfig, {**LIN0, **FEW, "target_parameters": ["lin1.weight"]}),
]

# (name, method, config class, settings of the first adapter, of the second)
TWO_ADAPTERS = [
    ("SMT Same", "smt", SMTConfig, {**LIN0, **FEW, **RANDOM}, {**LIN0, **FEW, **RANDOM, "score": "random"}),
    ("SMT Different", "smt", SMTConfig, {**LIN0, **FEW, **RANDOM}, {**FEW, **RANDOM, "target_modules": ["lin1"]}),
    ("SMT Shapes", "smt", SMTConfig, {**LIN0, **FEW, **RANDOM}, {**LIN0, **FEW, **RANDOM, "block_size": [-1, 1]}),
    ("SMT Same Parameter", "smt", SMTConfig, {**WEIGHT0, **FEW, **RANDOM}, {**WEIGHT0, **FEW, **RANDOM, "seed": 1}),
    ("SMT Different Parameters", "smt", SMTConfig, {**WEIGHT0, **FEW, **RANDOM}, {**WEIGHT1, **FEW, **RANDOM}),
]


def _pair(name: str, first: dict, second: dict) -> list[tuple]:
    return [(name, SMTConfig(**FEW, **RANDOM, **first), SMTConfig(**FEW, **RANDOM, **second))]


# (name, first adapter, second adapter), for batches whose rows take different adapters
MIXED_BATCHES = _pair("SMT", LIN0, {**LIN0, "seed": 1})
MIXED_LAYERS = _pair("SMT different layers", LIN0, {"target_modules": ["lin1"]})
MIXED_SAVED = _pair("SMT modules to save", {**LIN0, "modules_to_save": ["lin1"]}, {**LIN0, "modules_to_save": ["lin1"]})

# Settings for models of Transformers.
TRANSFORMERS = [
    {"target_modules": None, "block_size": 8, "num_blocks": 4, "budget": "per_module", "score": "magnitude"},
    {"target_modules": None, "density": 0.05, "score": "random", "forward": "swap"},
    {"target_modules": None, "block_size": [-1, 1], "density": 0.1, "score": "random", "forward": "additive"},
]
QUANTISED = [
    {"target_modules": ["q_proj", "v_proj"], "block_size": 16, "num_blocks": 4, "score": "random"},
    {"target_modules": ["q_proj", "v_proj"], "density": 0.05, "score": "random"},
]
# Mixtures by the name of the module that owns their experts, and which weights are named.
MIXTURES = {
    "trl-internal-testing/tiny-Llama4ForCausalLM": "feed_forward.experts",
    "trl-internal-testing/tiny-GptOssForCausalLM": "mlp.experts",
}
BLOCKS = {"task_type": "CAUSAL_LM", "block_size": 8, "density": 0.1, "score": "random"}
VISION = {
    "smt": SMTConfig(target_modules=["classifier.1"], modules_to_save=["normalization"], block_size=2, density=0.5)
}
DIFFUSION = {
    "text_encoder": {"target_modules": ["k_proj", "q_proj", "v_proj", "out_proj", "fc1", "fc2"]},
    "unet": {
        "target_modules": [
            "proj_in", "proj_out", "to_k", "to_q", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2",
        ]
    },
}  # fmt: skip
DIFFUSION = {part: {**settings, "density": 0.2, "score": "random", **RANDOM} for part, settings in DIFFUSION.items()}


def of_task(task: str) -> list[tuple]:
    """(config class, settings) for the models of one task."""
    return [(SMTConfig, {"task_type": task, **settings}) for settings in TRANSFORMERS]


def experts() -> list[tuple]:
    """(model, config class, settings) for the weights of experts."""
    cases = []
    for model, owner in MIXTURES.items():
        up, down = f"{owner}.gate_up_proj", f"{owner}.down_proj"
        cases += [
            (model, SMTConfig, {**BLOCKS, **settings})
            for settings in (
                {"target_modules": [], "target_parameters": [down], "score": "magnitude"},
                {"target_modules": [], "target_parameters": [f"0.{up}", f"1.{down}"], "forward": "additive"},
                {"target_modules": None, "target_parameters": [down, up], "block_size": [-1, 1]},
                {"target_modules": ["q_proj", "v_proj"], "target_parameters": [down], "forward": "swap"},
            )
        ]
    return cases


def compiled() -> list[tuple]:
    """(config, arguments of the trainer) for the tests of `torch.compile`."""
    additive = SMTConfig(task_type="CAUSAL_LM", modules_to_save=["embed_tokens"], **TRANSFORMERS[2])
    return [(SMTConfig(task_type="CAUSAL_LM", **TRANSFORMERS[1]), {}), (additive, {})]
