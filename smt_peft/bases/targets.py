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
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from peft.utils.error import NoMatchingPeftModuleError
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..blocks import BlockGrid
from ..config import SMTConfig
from ..say import once
from .fingerprint import Weight
from .packed import format_of, is_packed, stored
from .parameters import ParameterTarget, check_unreached, find_parameters, stacked_names
from .sharded import is_dtensor

# What PEFT puts around a module; the module is named by its outer name, whatever lies inside.
_WRAPPERS = (BaseTunerLayer, AuxiliaryTrainingWrapper)


@dataclass(frozen=True)
class Target:
    """One module a config names. The weight of an embedding is a `(num_embeddings, embedding_dim)` matrix.

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
    def stored(self) -> Tensor:
        """The weight as the layer stores it."""
        return stored(self.module)

    @property
    def weight(self) -> Tensor:
        """The weight as an `(out_features, in_features)` view; a packed one as it is stored."""
        weight = self.stored
        return weight.t() if self.transposed else weight

    @property
    def shape(self) -> tuple[int, int]:
        """`(out_features, in_features)`, as the layer states them: a packed weight may have another shape."""
        module = self.module
        if self.is_table:
            return module.num_embeddings, module.embedding_dim
        return (module.nf, module.nx) if self.transposed else (module.out_features, module.in_features)

    def grid(self, config: SMTConfig) -> BlockGrid:
        """The tiling of the weight under the config's `block_size`."""
        return config.grid(self.shape, self.name)

    def matrices(self) -> list[Target]:
        """The matrices among which blocks are chosen; see `ParameterTarget.matrices`."""
        return [self]

    @property
    def is_table(self) -> bool:
        """Whether the weight is looked up by row, not multiplied."""
        return isinstance(self.module, nn.Embedding)

    @property
    def has_plain_weight(self) -> bool:
        """Whether the weight is stored element by element in 16 bits or more, so that its values can be read."""
        weight = self.weight
        plain = weight.is_floating_point() and weight.dtype.itemsize >= 2 and weight.ndim == 2
        return plain and tuple(weight.shape) == self.shape and not is_packed(self.module)

    @property
    def is_readable(self) -> bool:
        """Whether `read` can give the weight's values."""
        packed = format_of(self.module)
        return self.has_plain_weight if packed is None else packed.why_not_read(self.module) is None

    def read(self) -> Tensor:
        """The weight in floats, `(out_features, in_features)`: the one above, or a quantised one dequantised.

        Raises:
            ValueError: a quantised weight cannot be dequantised.
        """
        packed = format_of(self.module)
        if packed is not None:
            return packed.read(self.module)
        return self.weight.full_tensor() if is_dtensor(self.weight) else self.weight

    @property
    def evidence(self) -> Weight:
        """What a fingerprint is taken of."""
        return evidence_of(self.module, self.weight)


def is_supported(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D, nn.Embedding)) or is_packed(module)


def evidence_of(module: nn.Module, weight: Tensor) -> Weight:
    """What a fingerprint is taken of: `weight` as it is, or what dequantises it where it is packed."""
    packed = format_of(module)
    if packed is None or packed.why_not_read(module):
        return weight

    def dequantised() -> tuple[Tensor, Tensor]:
        values = packed.read(module)
        return values, packed.half_step(module, values)

    return dequantised


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
            parameter only.
    """
    everything = _is_all_linear(config)
    resolved = _resolved(model, config)
    head = _output_head(model) if everything else None
    targets: dict[str, Target] = {}
    uncalled: list[str] = []
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if not name or name.startswith(inside):
            continue
        matched = check_target_module_exists(resolved, name)
        if matched and everything and config.layers_to_transform is not None:
            matched = _lies_in_layers(name, config)
        if isinstance(module, _WRAPPERS):
            inside += (name + ".",)
        if not matched or isinstance(matched, _ExcludedModule) or module is head:
            continue
        if isinstance(module, NonDynamicallyQuantizableLinear) and (everything or config.block_pattern):
            # A saved adapter's config lists what `all-linear` stood for.
            uncalled.append(name)
            continue
        targets[name] = _as_target(name, module, over_adapters)
    if uncalled:
        once(
            f"{uncalled[0]} is left out{f', and {len(uncalled) - 1} more like it' * (len(uncalled) > 1)}: "
            "nn.MultiheadAttention takes its weight without calling it, so blocks of it would not train"
        )
    check_unreached(model, config, targets)
    _tell_unmatched(model, config)
    parameters = find_parameters(model, config, targets) if config.target_parameters else {}
    if not targets and (config.target_modules or not parameters):
        raise NoMatchingPeftModuleError(_nothing_matched(model, config))
    _check_token_rows(model, config, targets)
    return targets | parameters


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
    return tuple(layer.adapter_layer_names) == ("smt_blocks",)


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
    if bare := stacked_names(model):
        message += f" Its experts are no modules: target_parameters names them, {bare}."
    return message
