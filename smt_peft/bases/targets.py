"""Which modules of a model a config names."""

from __future__ import annotations

from collections.abc import Iterator

from peft import TaskType
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _ExcludedModule,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULT_TARGETS
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..config import SMTConfig
from ..say import once
from .couplings import coupled_targets
from .packed import is_packed
from .parameters import ParameterTarget, check_unreached, find_parameters, stacked_names
from .target import Target, is_supported

# Heads that PEFT's model of a task trains in full; for `SEQ_CLS` its all-linear leaves them out by itself.
_TASK_HEADS = {TaskType.TOKEN_CLS: ("classifier", "score"), TaskType.QUESTION_ANS: ("qa_outputs",)}
# What PEFT puts around a module; the module is named by its outer name, whatever lies inside.
_WRAPPERS = (BaseTunerLayer, AuxiliaryTrainingWrapper)


def find_targets(
    model: nn.Module, config: SMTConfig, over_adapters: bool = False
) -> dict[str, Target | ParameterTarget]:
    """The modules of `model` that `config` names, in the model's order, then the parameters it names.

    `target_modules`, `exclude_modules`, `modules_to_save`, `layers_to_transform` and `layers_pattern` mean what they
    mean in PEFT; it is PEFT's own matcher that decides. `all-linear` leaves out the output head, also of a model
    inside a `PeftModel`, and the `out_proj` of `nn.MultiheadAttention`, whose weight is used without a call.

    Args:
        model: any model; a module that PEFT has wrapped is found by its own name.
        config: names the modules.
        over_adapters: whether a target may carry an adapter of another method, as where the base is only read.

    Raises:
        NoMatchingPeftModuleError: nothing matches; a `ValueError`, as the other.
        ValueError: a match is no `nn.Linear`, `Conv1D`, `nn.Embedding` or quantised linear layer, is never called, is
            trained in full or by token rows, or carries an adapter of another method; or a name matches a bare
            parameter only; or channels are to be coupled and no match shares any.
    """
    named = dict(_named(model, config))
    # A saved adapter's config lists what `all-linear` stood for.
    if _is_all_linear(config) or config.block_pattern:
        named = _called(named)
    targets = {name: _as_target(name, module, over_adapters) for name, module in named.items()}
    check_unreached(model, config, targets)
    _tell_unmatched(model, config)
    parameters = find_parameters(model, config, targets) if config.target_parameters else {}
    if not targets and (config.target_modules or not parameters):
        raise NoMatchingPeftModuleError(_nothing_matched(model, config))
    _check_token_rows(model, config, targets)
    if config.coupled:
        return coupled_targets(model, targets, config.coupled, saved=bool(config.block_pattern))
    return targets | parameters


def _named(model: nn.Module, config: SMTConfig) -> Iterator[tuple[str, nn.Module]]:
    """The modules that PEFT's matcher finds, the head that `all-linear` leaves out not among them."""
    everything = _is_all_linear(config)
    resolved = _resolved(model, config)
    head = _output_head(model) if everything else None
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if not name or name.startswith(inside):
            continue
        matched = check_target_module_exists(resolved, name)
        if matched and everything and config.layers_to_transform is not None:
            matched = _lies_in_layers(name, config)
        if isinstance(module, _WRAPPERS):
            inside += (name + ".",)
        if everything and name.rpartition(".")[2] in _TASK_HEADS.get(config.task_type, ()):
            continue
        if config.block_pattern and isinstance(module, AuxiliaryTrainingWrapper) and name not in config.block_pattern:
            # A saved adapter's config lists what `all-linear` stood for, such a head among it.
            continue
        if matched and not isinstance(matched, _ExcludedModule) and module is not head:
            yield name, module


def _called(named: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Those that their model calls, as it is by a call that blocks take part; of the others one line tells."""
    uncalled = [name for name, module in named.items() if isinstance(module, NonDynamicallyQuantizableLinear)]
    if uncalled:
        once(
            f"{uncalled[0]} is left out{f', and {len(uncalled) - 1} more like it' * (len(uncalled) > 1)}: "
            "nn.MultiheadAttention takes its weight without calling it, so blocks of it would not train"
        )
    return {name: module for name, module in named.items() if name not in uncalled}


def _tell_unmatched(model: nn.Module, config: SMTConfig) -> None:
    """One list may serve several architectures, so a name that matches nothing is no error while others do; it is said.

    A name that is only a parameter's is one, see `check_unreached`.
    """
    names = config.target_modules
    if config.block_pattern or isinstance(names, str) or not names:
        return
    unmatched = set(names)
    for module, _ in model.named_modules():
        unmatched -= {name for name in unmatched if module == name or module.endswith(f".{name}")}
    if unmatched:
        once(f"target_modules: no module is named {', '.join(sorted(unmatched))}, so nothing of that name trains")


def _check_token_rows(model: nn.Module, config: SMTConfig, targets: dict[str, Target]) -> None:
    """Raise `ValueError` when rows of a target are to be trained besides its blocks; PEFT wraps plain layers only."""
    tokens = config.trainable_token_indices
    if not tokens:
        return
    table = model.get_input_embeddings() if isinstance(model, PreTrainedModel) else None
    for name, target in targets.items():
        named = isinstance(tokens, dict) and any(name == key or name.endswith("." + key) for key in tokens)
        # Where the head is tied to the table, PEFT trains the same rows of both.
        weight = getattr(table, "weight", None)
        tied = weight is not None and not isinstance(tokens, dict) and target.stored is weight
        if named or tied:
            raise ValueError(
                f"Target module {name} is named by trainable_token_indices too{' (its weight is tied)' * (not named)}: "
                "its rows cannot be trained besides its blocks. Take it out of target_modules, or drop "
                "trainable_token_indices and let blocks of whole rows, block_size=(1, -1), train token rows"
            )


def _is_all_linear(config: SMTConfig) -> bool:
    names = config.target_modules
    return isinstance(names, str) and names.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND


def _resolved(model: nn.Module, config: SMTConfig) -> SMTConfig:
    """A copy whose `target_modules` are names or a regex; PEFT resolves in place, and the caller's stays as it was."""
    resolved = config.copy()
    if resolved.target_modules is None and not resolved.target_parameters:
        model_type = BaseTuner.get_model_config(model).get("model_type")
        if model_type not in DEFAULT_TARGETS:
            raise ValueError("Please specify `target_modules` in `peft_config`")
        resolved.target_modules = DEFAULT_TARGETS[model_type]
    everything = _is_all_linear(resolved)
    resolved = _maybe_include_all_linear_layers(resolved, model)
    if everything:
        # Of quantised layers PEFT knows those that are an `nn.Linear`.
        resolved.target_modules |= {name for name, module in model.named_modules() if is_packed(module)}
    return resolved


def _lies_in_layers(name: str, config: SMTConfig) -> bool:
    # PEFT looks at the layers only where it matches a module by the end of its name, and all-linear is full names.
    by_its_end = config.copy()
    by_its_end.target_modules = {name.rpartition(".")[2]}
    return bool(check_target_module_exists(by_its_end, name))


def _output_head(model: nn.Module) -> nn.Module | None:
    """The output head, also of a model inside a `PeftModel`, where PEFT does not look for it."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base.get_output_embeddings() if isinstance(base, PreTrainedModel) else None


def _as_target(name: str, module: nn.Module, over_adapters: bool) -> Target:
    if isinstance(module, AuxiliaryTrainingWrapper):
        raise ValueError(
            f"Target module {name} is trained besides the blocks already (modules_to_save or trainable_token_indices); "
            "take it out of target_modules, or add it to exclude_modules"
        )
    is_merged = False
    if isinstance(module, BaseTunerLayer):
        if not over_adapters and not _is_own(module):
            raise ValueError(
                f"Target module {name} carries an adapter of another method ({_method(module)}), which SMT does not "
                "go over; call merge_and_unload() or unload() on that adapter's PeftModel first, or add this module to "
                "exclude_modules"
            )
        is_merged, module = module.merged, module.get_base_layer()
    if not is_supported(module):
        raise ValueError(
            f"Target module {name} is a {type(module).__name__}, which SMT does not support; it takes torch.nn.Linear, "
            "torch.nn.Embedding, transformers' Conv1D and quantised linear layers. Name such layers in target_modules, "
            "or add this one to exclude_modules"
        )
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        raise ValueError(
            f"Target module {name} is an embedding with max_norm={module.max_norm}: every look-up rescales rows of its "
            "weight in place, so there is no frozen base to add blocks to. Set its max_norm to None, or add it to "
            "exclude_modules"
        )
    if isinstance(module, nn.Embedding) and (not module.weight.is_floating_point() or is_packed(module)):
        raise ValueError(
            f"Target module {name} is a quantised embedding ({type(module).__name__}), which SMT does not support; "
            "load the model without quantising it, or add it to exclude_modules"
        )
    if isinstance(module, NonDynamicallyQuantizableLinear):
        raise ValueError(
            f"Target module {name} is never called: nn.MultiheadAttention takes its weight without calling it, so "
            "blocks of it would not train. Add it to exclude_modules"
        )
    return Target(name, module, isinstance(module, Conv1D), is_merged)


def _is_own(layer: BaseTunerLayer) -> bool:
    # Told by an attribute: the tuner imports this module.
    return "smt_blocks" in layer.adapter_layer_names


def _method(layer: BaseTunerLayer) -> str:
    """`lora` for a layer of `peft.tuners.lora.layer`, else the name of the class."""
    parts = type(layer).__module__.split(".")
    return parts[2] if parts[:2] == ["peft", "tuners"] and len(parts) > 2 else type(layer).__name__


def _nothing_matched(model: nn.Module, config: SMTConfig) -> str:
    names, inside = set(), ()
    for name, module in model.named_modules():
        if name.startswith(inside):
            continue
        if isinstance(module, _WRAPPERS):
            inside += (name + ".",)
        module = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if is_supported(module) and not isinstance(module, nn.Embedding):
            names.add(name.rsplit(".", 1)[-1])
    message = f"Target modules {config.target_modules} not found in the base model. "
    if config.exclude_modules:
        message += f"exclude_modules={config.exclude_modules} is set. "
    if config.layers_to_transform is not None:
        message += f"Note: You specified 'layers_to_transform': {config.layers_to_transform}. "
    if config.layers_pattern:
        message += f"You also specified 'layers_pattern': {config.layers_pattern}. "
    message += f"Please check target_modules; the model's linear layers are named {sorted(names)}."
    if config.target_parameters:
        return message + " target_modules=[] trains the parameters alone."
    if bare := stacked_names(model):
        message += f" Its experts are no modules: target_parameters names them, {bare}."
    return message
