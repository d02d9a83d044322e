"""SMT in the place of LoRA, in tests of PEFT's that name LoRA but test what every method must do.

The test's `LoraConfig` builds an `SMTConfig`, and the names of LoRA's parts in the test's code become those of SMT's:
an adapter of two tensors per layer has here `index` where LoRA has `lora_A`, and `weight` where it has `lora_B`.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from types import CodeType, FunctionType, ModuleType
from typing import Any

from _pytest.mark.structures import ParameterSet
from peft import LoraConfig, PeftConfig
from peft_suite.table import matches

from smt_peft import SMTConfig
from smt_peft.tuner.experts import ParameterLayer
from smt_peft.tuner.layer import SMTLayer
from smt_peft.tuner.model import SMTModel

# Settings of LoRA's that mean nothing to blocks, and that the tests in question do not look at; SMT's own of these
# names are those of a low-rank pair.
IGNORED = {"lora_alpha", "lora_dropout"}
SHARED = {field.name for field in dataclasses.fields(LoraConfig)} & {f.name for f in dataclasses.fields(SMTConfig)}
SHARED -= IGNORED
# In this order. Names of settings and of models on a hub stay.
TRANSLATIONS = {
    r"\blora_A\.(\w+\.)?weight": r"smt_blocks.\1index",
    r"\blora_B\.(\w+\.)?weight": r"smt_blocks.\1weight",
    r"\blora_[AB]\b": "smt_blocks",
    r"\blora_(?!alpha|dropout|bias|config)": "smt_",
    r"\blora\.": "smt.",
    "^lora$": "smt",
    r"\bLORA\b": "SMT",
    r"\bLora(?=Layer\b|Model\b)": "SMT",
}


def smt_config(r: int = 8, init_lora_weights: bool = True, bias: str = "none", **settings: Any) -> SMTConfig:
    """The `SMTConfig` that a test gets when it asks for a `LoraConfig`: `r` / 32 of the weights.

    Raises:
        TypeError: a setting that SMT has nothing like; the test is none for SMT.
    """
    foreign = settings.keys() - SHARED - IGNORED
    if foreign or bias != "none":
        raise TypeError(f"SMT has no {', '.join(sorted(foreign)) or 'bias'}")
    shared = {name: value for name, value in settings.items() if name in SHARED}
    few = {"block_size": 2, "density": min(1.0, r / 32), "score": "random", "budget": "per_module"}
    return SMTConfig(**{"target_modules": None, **few, "init_weights": init_lora_weights, **shared})


class StandIn(type):
    """So that `isinstance(config, LoraConfig)` and `config_cls == LoraConfig` hold in a test."""

    def __call__(cls, **settings: Any) -> SMTConfig:
        return smt_config(**settings)

    def __instancecheck__(cls, config: object) -> bool:
        return isinstance(config, SMTConfig)


class SMTForLora(metaclass=StandIn):
    """What the tests find under the name `LoraConfig`."""


def put_in(module: ModuleType, patterns: tuple[str, ...]) -> None:
    """Let SMT stand in for LoRA in the tests of `module` that the patterns name, and in what they call."""
    module.LoraConfig, module.SMTLayer, module.SMTModel = SMTForLora, SMTLayer, SMTModel
    # LoRA nests one wrapper per parameter; here one wrapper holds a layer for each.
    module.ParamWrapper = ParameterLayer
    for name, value in list(vars(module).items()):
        owner = getattr(value, "__module__", None)
        if owner != module.__name__:
            continue
        if isinstance(value, type) and any(name == pattern.partition("::")[0] for pattern in patterns):
            for member in vars(value).values():
                _put_into(member)
        elif not isinstance(value, type) and (name in patterns or not name.startswith("test")):
            _put_into(value)


def is_in(pattern: str, test: str) -> bool:
    """Whether `Class`, `Class::test` or `test` names the test `Class::test[case]`; `*` stands for anything."""
    name = test.partition("[")[0]
    return matches(pattern, name) or name.startswith(pattern + "::")


def is_of_another(item: Any) -> bool:
    """Whether the case is one of another method than LoRA."""
    parameters = getattr(getattr(item, "callspec", None), "params", {}).values()
    values = [one for value in parameters for one in (value if isinstance(value, (list, tuple)) else [value])]
    foreign = [value for value in values if isinstance(value, PeftConfig) and not isinstance(value, SMTConfig)]
    return bool(foreign) or any(isinstance(v, type) and issubclass(v, PeftConfig) for v in values)


def _put_into(value: object) -> None:
    if isinstance(value, (staticmethod, classmethod)):
        value = value.__func__
    # A fixture is an object that holds its function.
    function = value if inspect.isfunction(value) else getattr(value, "_fixture_function", None)
    if not isinstance(function, FunctionType):
        return
    function.__code__ = _translate_code(function.__code__)
    for mark in getattr(function, "pytestmark", []):
        if mark.name == "parametrize":
            object.__setattr__(mark, "args", (mark.args[0], [_convert(v) for v in mark.args[1]], *mark.args[2:]))


def _translate_code(code: CodeType) -> CodeType:
    constants = tuple(
        _translate_code(value) if isinstance(value, CodeType) else translate(value) if isinstance(value, str) else value
        for value in code.co_consts
    )
    return code.replace(co_consts=constants, co_names=tuple(map(translate, code.co_names)))


def translate(text: str) -> str:
    """Names of LoRA's parts into those of SMT's."""
    for pattern, replacement in TRANSLATIONS.items():
        text = re.sub(pattern, replacement, text)
    return text


def _convert(value: object) -> object:
    """A LoRA config or class among the values of a `parametrize` mark."""
    if value is LoraConfig:
        return SMTForLora
    if type(value) is LoraConfig:
        given = {
            field.name: getattr(value, field.name)
            for field in dataclasses.fields(value)
            if field.default is not dataclasses.MISSING and getattr(value, field.name) != field.default
        }
        return smt_config(**{name: value for name, value in given.items() if name != "peft_type"})
    if isinstance(value, ParameterSet):
        return value._replace(values=tuple(map(_convert, value.values)))
    if isinstance(value, (tuple, list)):
        return type(value)(map(_convert, value))
    return value
