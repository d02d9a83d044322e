"""Which bare parameters of a model a config names: 2-D, or 3-D as the experts of a mixture store their weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from peft.tuners.tuners_utils import BaseTunerLayer, _ExcludedModule, check_target_module_exists
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..blocks import BlockGrid
from ..config import SMTConfig
from ..say import once


@dataclass(frozen=True)
class ParameterTarget:
    """One parameter a config names, or the matrix of one of its experts.

    Args:
        name: full name of the parameter, as in `model.named_parameters()` of the base model; that of an expert's
            matrix ends in its number, `experts.down_proj[3]`.
        module: the module that owns the parameter, also where SMT already wraps it.
        parameter: the parameter's name within the module.
        is_merged: whether an adapter is merged into the parameter, which then is not the base's.
        expert: number of the one expert meant; None: the whole parameter.
    """

    name: str
    module: nn.Module
    parameter: str
    is_merged: bool = False
    expert: int | None = None

    transposed = False
    is_table = False

    @property
    def stored(self) -> nn.Parameter:
        """The parameter, `(rows, cols)` or `(experts, rows, cols)`."""
        return self.module._parameters[self.parameter]

    @property
    def weight(self) -> Tensor:
        """One matrix: the parameter's own, one expert's, or those of all experts one below the other."""
        stored = self.stored
        if stored.ndim == 2:
            return stored
        return stored.flatten(0, 1) if self.expert is None else stored[self.expert]

    @property
    def num_experts(self) -> int:
        """Matrices in `weight`."""
        return self.stored.shape[0] if self.stored.ndim == 3 and self.expert is None else 1

    @property
    def shape(self) -> tuple[int, int]:
        """`(rows, cols)` of `weight`."""
        rows, cols = self.stored.shape[-2:]
        return self.num_experts * rows, cols

    @property
    def is_readable(self) -> bool:
        return True

    def read(self) -> Tensor:
        return self.weight

    @property
    def evidence(self) -> Tensor:
        """What a fingerprint is taken of."""
        return self.weight

    def grid(self, config: SMTConfig) -> BlockGrid:
        """The tiling under the config's `block_size`, rows and columns being those of a matrix as it is stored.

        A block lies within one expert, so its height must divide the expert's: the largest divisor up to the height
        asked for is taken, and said. (An error would make one block_size for a whole model impossible.)
        """
        rows, cols = self.stored.shape[-2:]
        one = config.grid((rows, cols), self.name)
        if self.stored.ndim == 2:
            return one
        height = next(height for height in range(one.block_rows, 0, -1) if rows % height == 0)
        if height != one.block_rows:
            once(
                f"blocks of {self.parameter} are {height} rows high instead of {one.block_rows}, which does not divide "
                f"the {rows} rows of an expert"
            )
        return BlockGrid(self.num_experts * rows, cols, height, one.block_cols)

    def matrices(self) -> Iterable[ParameterTarget]:
        """The matrices among which blocks are chosen: each expert's is one."""
        if self.stored.ndim == 2 or self.expert is not None:
            return [self]
        return [replace(self, name=f"{self.name}[{e}]", expert=e) for e in range(self.num_experts)]


def find_parameters(model: nn.Module, config: SMTConfig, modules: Iterable[str]) -> dict[str, ParameterTarget]:
    """The parameters that `config.target_parameters` names, by full name or by its end, in the model's order.

    `exclude_modules`, `modules_to_save`, `layers_to_transform` and `layers_pattern` count as they do for modules.

    Args:
        modules: names of the modules that are targets themselves.

    Raises:
        ValueError: an entry matches no parameter, or one that cannot be trained: it names a module, is neither 2-D nor
            3-D, is packed, is computed anew at every use, is never used by a call, or is trained already.
    """
    wanted = config.copy()
    wanted.target_modules, wanted.target_parameters = list(config.target_parameters), None
    targets: dict[str, ParameterTarget] = {}
    unmatched = set(config.target_parameters)
    for name, owner, parameter, is_merged, problem in _parameters(model):
        entries = {entry for entry in config.target_parameters if name == entry or name.endswith(f".{entry}")}
        unmatched -= entries
        matched = entries and check_target_module_exists(wanted, name)
        if not matched or isinstance(matched, _ExcludedModule):
            continue
        module = name.rpartition(".")[0]
        if module in modules:
            problem = (
                f"{module} is named by target_modules, too; name it once: target_modules=[] trains the parameters alone"
            )
        if problem := problem or _why_not(name, owner, parameter):
            raise ValueError(f"target_parameters: {name} cannot be a target: {problem}")
        targets[name] = ParameterTarget(name, owner, parameter, is_merged)
    if unmatched:
        raise ValueError(_nothing_matched(model, sorted(unmatched)))
    if not targets:
        raise ValueError(
            f"every parameter that target_parameters={sorted(config.target_parameters)} names is left out by "
            "exclude_modules, modules_to_save or layers_to_transform; change one of them"
        )
    return targets


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, bool, str | None]]:
    """Every parameter of the base model: its name, owner, name there, whether it is merged, and why it is no target."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(inside):
            continue
        layers, problem, owner = {}, None, module
        if is_wrapper(module):
            layers, owner = module.layers(), module.base_layer
            inside += (name + ".",)
        elif isinstance(module, AuxiliaryTrainingWrapper):
            problem, owner = "it is trained besides the blocks already (modules_to_save)", module.original_module
            inside += (name + ".",)
        elif isinstance(module, BaseTunerLayer):
            problem = "its module carries an adapter already; merge_and_unload() that adapter first"
            owner = module.get_base_layer()
            inside += (name + ".",)
        elif hasattr(module, "parametrizations"):
            problem = "its module is parametrized, so it is computed anew at every use"
        for parameter in dict.fromkeys((*owner._parameters, *getattr(owner, "parametrizations", ()))):
            merged = parameter in layers and layers[parameter].merged
            yield f"{name}.{parameter}" if name else parameter, owner, parameter, merged, problem


def is_wrapper(module: nn.Module) -> bool:
    # Told by name, as PEFT does: the tuner imports this module.
    return type(module).__name__ == "ParamWrapper" and hasattr(module, "layers")


def _why_not(name: str, owner: nn.Module, parameter: str) -> str | None:
    stored = owner._parameters[parameter]
    if "." not in name:
        return "it belongs to the model itself, and only what a submodule owns can be wrapped"
    if isinstance(owner, NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention takes it without calling its module, so blocks of it would not train"
    if hasattr(stored, "ds_id"):
        return "it is partitioned by DeepSpeed ZeRO-3"
    if type(stored) is not nn.Parameter or not stored.is_floating_point() or stored.dtype.itemsize < 2:
        return f"it is a {type(stored).__name__} stored as {stored.dtype}; SMT trains parameters of 16 bits and more"
    if stored.ndim not in (2, 3):
        return f"it is {stored.ndim}-D; SMT takes 2-D parameters, and 3-D ones as one matrix per expert"
    return None


def _nothing_matched(model: nn.Module, entries: list[str]) -> str:
    modules = [entry for entry in entries for name, _ in model.named_modules() if f".{name}".endswith(f".{entry}")]
    if modules:
        return f"target_parameters: {modules[0]!r} names a module, not a parameter; name it in target_modules instead"
    return (
        f"target_parameters: {entries[0]!r} matches no parameter of the model, so it would silently stay frozen; its "
        f"3-D parameters are named {stacked_names(model)}"
    )


def stacked_parameters(model: nn.Module) -> list[str]:
    """Names of the parameters that hold one matrix per expert, told by their shape; those of `torch.nn` and a leading
    1 are something else (convolutions, positions)."""
    stacked = []
    for name, owner, parameter, _, _ in _parameters(model):
        stored = owner._parameters.get(parameter)
        is_stacked = stored is not None and stored.ndim == 3 and len(stored) > 1
        if is_stacked and not type(owner).__module__.startswith("torch.nn"):
            stacked.append(name)
    return stacked


def stacked_names(model: nn.Module) -> list[str]:
    """The same, as `target_parameters` would name them in every layer."""
    return sorted({_short(name) for name in stacked_parameters(model)})


def check_unreached(model: nn.Module, config: SMTConfig, modules: Iterable[str]) -> None:
    """Say which experts `target_modules` passes over.

    Args:
        modules: names of the modules that are targets.

    Raises:
        ValueError: a name in `target_modules` matches parameters only.
    """
    if config.block_pattern:
        return
    stacked = stacked_parameters(model)
    names = config.target_modules
    if isinstance(names, (list, tuple, set)):
        reached, trained = list(modules), config.target_parameters or ()
        for entry in sorted(names):
            found = [name for name in _ending(stacked, entry) if not any(_ending([name], end) for end in trained)]
            if found and not _ending(reached, entry):
                raise ValueError(
                    f"target_modules names {entry!r}, which is no module but a parameter ({found[0]}), so it would "
                    f"silently stay frozen; name it in target_parameters=[{_short(found[0])!r}] instead"
                )
        stacked = [name for name in stacked if any(_ending([name], entry) for entry in names)]
    if stacked and config.target_parameters is None:
        known = sorted({_short(name) for name in stacked})
        once(
            f"{len(stacked)} parameters that hold the weights of experts stay frozen, such as {stacked[0]}: "
            f"target_modules reaches modules only. target_parameters={known} trains them, [] says they are to stay"
        )


def _ending(names: Iterable[str], entry: str) -> list[str]:
    return [name for name in names if name == entry or name.endswith(f".{entry}")]


def _short(name: str) -> str:
    """`experts.down_proj` for `model.layers.0.mlp.experts.down_proj`."""
    return ".".join(name.split(".")[-2:])
