"""Which modules of a model a config names, and how their weights are laid out."""

from __future__ import annotations

from dataclasses import dataclass

from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _ExcludedModule,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULT_TARGETS
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .config import SMTConfig


@dataclass(frozen=True)
class Target:
    """One module a config names.

    Args:
        name: as in `model.named_modules()`.
        module: the base layer itself, also where an SMT layer already wraps it.
        transposed: whether the layer stores its weight as `(in_features, out_features)`, as GPT-2's `Conv1D` does.
        is_merged: whether an adapter is merged into the weight, which then is not the base's.
    """

    name: str
    module: nn.Module
    transposed: bool
    is_merged: bool = False

    @property
    def weight(self) -> Tensor:
        """The weight as an `(out_features, in_features)` view."""
        weight = self.module.weight
        return weight.t() if self.transposed else weight

    @property
    def shape(self) -> tuple[int, int]:
        """`(out_features, in_features)`, as the layer states them: a packed weight may have another shape."""
        module = self.module
        return (module.nf, module.nx) if self.transposed else (module.out_features, module.in_features)


def is_supported(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D))


def find_targets(model: nn.Module, config: SMTConfig) -> dict[str, Target]:
    """The modules of `model` that `config` names, in the model's order.

    `target_modules`, `exclude_modules`, `modules_to_save`, `layers_to_transform` and `layers_pattern` mean what they
    mean in PEFT; it is PEFT's own matcher that decides.

    Raises:
        ValueError: nothing matches, or a match is neither a `nn.Linear` nor a `Conv1D`.
    """
    # `all-linear` is resolved in place by PEFT; a copy keeps the caller's config as it was.
    resolved = config.copy()
    if resolved.target_modules is None:
        model_type = BaseTuner.get_model_config(model).get("model_type")
        if model_type not in DEFAULT_TARGETS:
            raise ValueError("Please specify `target_modules` in `peft_config`")
        resolved.target_modules = DEFAULT_TARGETS[model_type]
    resolved = _maybe_include_all_linear_layers(resolved, model)
    targets: dict[str, Target] = {}
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if not name or name.startswith(inside):
            continue
        matched = check_target_module_exists(resolved, name)
        if isinstance(module, BaseTunerLayer):
            inside += (name + ".",)
        if matched and not isinstance(matched, _ExcludedModule):
            targets[name] = _as_target(name, module)
    if not targets:
        raise ValueError(_nothing_matched(model, config))
    return targets


def _as_target(name: str, module: nn.Module) -> Target:
    is_merged = False
    if isinstance(module, BaseTunerLayer):
        is_merged, module = module.merged, module.get_base_layer()
    if not is_supported(module):
        raise ValueError(
            f"Target module {name} is a {type(module).__name__}, which SMT does not support; it takes torch.nn.Linear "
            "and transformers' Conv1D. Name linear layers in target_modules, or add this one to exclude_modules"
        )
    return Target(name, module, isinstance(module, Conv1D), is_merged)


def _nothing_matched(model: nn.Module, config: SMTConfig) -> str:
    linear = [name for name, module in model.named_modules() if is_supported(module)]
    names = sorted({name.rsplit(".", 1)[-1] for name in linear})
    message = f"Target modules {config.target_modules} not found in the base model. "
    if config.exclude_modules:
        message += f"exclude_modules={config.exclude_modules} is set. "
    if config.layers_to_transform is not None:
        message += f"Note: You specified 'layers_to_transform': {config.layers_to_transform}. "
    if config.layers_pattern:
        message += f"You also specified 'layers_pattern': {config.layers_pattern}. "
    return message + f"Please check target_modules; the model's linear layers are named {names}."
