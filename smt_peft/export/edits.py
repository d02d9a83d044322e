"""What an adapter does to a checkpoint: which elements of which stored tensors change, and how.

A model's parameter may be stored under another name, transposed, or in parts, such as one tensor per expert of what
Transformers holds as one. How it is stored is asked of Transformers itself, once, on the meta device: what it would
save of a parameter are then views of that parameter, and the offset and strides of a view say where each element lies.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.pytorch_utils import Conv1D

from .. import ops
from ..bases.fingerprint import Sampled, places
from ..blocks import BlockLayout
from ..tuner.plan import check_base
from .adapter import SavedAdapter
from .checkpoint import Checkpoint, StoredTensor


class NotInPlace(ValueError):
    """The merged model is no checkpoint with the tensors of its base; it has to be built in memory."""


@dataclass(frozen=True)
class Part:
    """Where a parameter, or a part of it, is stored.

    Args:
        tensor: name in the checkpoint.
        shape, stride, offset: the stored tensor as a view of the (contiguous) parameter.
    """

    tensor: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @property
    def last(self) -> int:
        """The largest element of the parameter in the part, counted row by row."""
        return self.offset + sum((side - 1) * step for side, step in zip(self.shape, self.stride, strict=True))

    def find(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """Which elements of the parameter, int64 `(n,)` counted row by row, lie in the part, and at which place in the
        stored tensor: a bool mask `(n,)`, and the places of those in it."""
        rest, place = flat - self.offset, torch.zeros_like(flat)
        inside = rest >= 0
        weights = [1] * len(self.shape)
        for dim in range(len(self.shape) - 1, 0, -1):
            weights[dim - 1] = weights[dim] * self.shape[dim]
        # Largest step first: a view of a contiguous parameter never steps onto an element twice.
        for dim in sorted(range(len(self.shape)), key=lambda dim: -self.stride[dim]):
            if self.shape[dim] == 1:
                continue
            number, rest = rest // self.stride[dim], rest % self.stride[dim]
            inside &= number < self.shape[dim]
            place += number * weights[dim]
        inside &= rest == 0
        return inside, place[inside]

    def of(self, parameter: Tensor) -> Tensor:
        """The part of a contiguous parameter, in one dimension."""
        return parameter.as_strided(self.shape, self.stride, self.offset).reshape(-1)


@dataclass(frozen=True)
class Target:
    """A parameter of the model that blocks lie in.

    Args:
        parameter: its name in the model.
        shape: `(rows, cols)` of the matrix that the blocks tile.
        transposed: whether the parameter is that matrix transposed.
    """

    parameter: str
    shape: tuple[int, int]
    transposed: bool

    def flat(self, rows: Tensor, cols: Tensor) -> Tensor:
        """Which elements of the parameter these of the matrix are."""
        return cols * self.shape[0] + rows if self.transposed else rows * self.shape[1] + cols


class Edits:
    """The changes that merging an adapter makes to the tensors of its base's checkpoint.

    Attributes:
        touched: names of the stored tensors that change.

    Raises:
        NotInPlace: merging changes more than the values of stored tensors.
        ValueError: the adapter is damaged, or belongs to another model.
    """

    def __init__(self, adapter: SavedAdapter, checkpoint: Checkpoint):
        self.adapter, self.checkpoint = adapter, checkpoint
        model = _skeleton(checkpoint)
        self._parts = _parts_of(model, checkpoint)
        self._targets = {name: target_of(model, name) for name in _in_order(model, adapter.modules)}
        # The tensors of experts come in turns, each with a part of two or three parameters.
        self._changes = lru_cache(maxsize=4)(self._read_change)
        self._set = self._set_besides(model)
        self._by_tensor: dict[str, list[tuple[str, Part]]] = {}
        for name, target in self._targets.items():
            for part in self._stored(target.parameter, name):
                self._by_tensor.setdefault(part.tensor, []).append((name, part))
        self.touched = list(dict.fromkeys((*self._set, *self._by_tensor)))
        for name in self.touched:
            checkpoint.tensors[name].float_dtype()

    def check(self) -> None:
        """Look at all that is going to be used, before anything is written.

        Raises:
            ValueError: the base is another than the adapter was trained on, an index is impossible, or a value is not
                finite; names the module.
        """
        self.check_base()
        self.check_values()

    def check_base(self) -> None:
        check_base(self.adapter.config, self._bases())

    def check_values(self) -> int:
        """Returns the number of blocks."""
        count = 0
        for name, target in self._targets.items():
            count += len(self.adapter.blocks(name, target.shape)[0])
            self.adapter.low_rank(name, target.shape)
        for name, edits in self._set.items():
            for key, *_ in edits:
                if not bool(torch.isfinite(self.adapter.tensor(key)).all()):
                    raise ValueError(f"{name}: {key} in the adapter file holds NaN or infinity; restore the adapter")
        return count

    def apply_(self, name: str, values: Tensor) -> Tensor:
        """Merge into the values of a stored tensor, in one dimension, in place: the sum rounded once.

        Raises:
            ValueError: a merged value is not finite; names the module.
        """
        for key, part, rows in self._set.get(name, ()):
            trained = self.adapter.tensor(key)
            if rows is None:
                values.copy_(part.of(trained.contiguous()))
            else:
                values.view(part.shape)[rows] = trained.to(values.dtype)
        for module, part in self._by_tensor.get(name, ()):
            layout, delta = self._changes(module)
            for positions, added in _elements(layout, delta, self._targets[module], part):
                merged = ops.add_rounded(values[positions], added)
                if not bool(torch.isfinite(merged).all()):
                    raise ValueError(
                        f"{module}: the merged weight holds NaN or infinity: base + delta exceeds what {values.dtype} "
                        "can hold, or the base does so already; use another adapter or a base of a wider dtype"
                    )
                values[positions] = merged
        return values

    def places(self, name: str) -> Iterator[tuple[str, Tensor]]:
        """Which elements of a stored tensor the adapter changes, int64, counted row by row, with the module of each."""
        for module, part in self._by_tensor.get(name, ()):
            layout, delta = self._changes(module)
            for positions, _ in _elements(layout, delta, self._targets[module], part):
                yield module, positions

    def _read_change(self, module: str) -> tuple[BlockLayout, Tensor]:
        return self.adapter.change(module, self._targets[module].shape)

    def _bases(self) -> dict[str, Sampled]:
        """What the fingerprint asks for of the base, read by itself."""
        names = (self.adapter.config.base_fingerprint or {}).keys() & self._targets.keys()
        return {name: self._sampled(self._targets[name]) for name in names}

    def _sampled(self, target: Target) -> Sampled:
        flat = target.flat(*places(target.shape))
        values = torch.zeros(len(flat), dtype=torch.float64)
        for part in self._parts[target.parameter]:
            inside, place = part.find(flat)
            if bool(inside.any()):
                values[inside] = self.checkpoint.tensors[part.tensor].at(place).double()
        return Sampled(values)

    def _stored(self, parameter: str, module: str) -> list[Part]:
        if not self._parts.get(parameter):
            raise NotInPlace(f"{module}: its weight is not stored in {self.checkpoint.directory} as it is in the model")
        return self._parts[parameter]

    def _set_besides(self, model: PreTrainedModel) -> dict[str, list[tuple[str, Part, list[int] | None]]]:
        """Per stored tensor what is written over it: the adapter's key, the part, and which rows (None: all)."""
        parameters = dict(model.named_parameters(remove_duplicate=False))
        found: dict[str, list] = {}
        for name, key in self.adapter.besides.items():
            parameter, rows = name.replace(".base_layer.", "."), None
            if name.endswith(_TOKEN_ROWS):
                parameter = name.removesuffix(_TOKEN_ROWS) + ".weight"
                rows = self._token_rows(parameter)
            shape = self._shape(key)
            if parameter not in parameters:
                raise NotInPlace(f"the adapter trains {name}, which is no parameter of the base")
            expected = tuple(parameters[parameter].shape)
            if shape != (expected if rows is None else (len(rows), *expected[1:])):
                raise NotInPlace(f"the adapter's {name} has shape {shape}, the base's {parameter} {expected}")
            tied = sum(p is parameters[parameter] for p in parameters.values()) > 1
            if tied and rows is None and ".base_layer." not in name:
                raise NotInPlace(f"{parameter} was tied to another weight, and is one of its own after training")
            for part in self._stored(parameter, name):
                found.setdefault(part.tensor, []).append((key, part, rows))
        return found

    def _token_rows(self, parameter: str) -> list[int]:
        wanted = self.adapter.config.trainable_token_indices
        if isinstance(wanted, dict):
            module = parameter.removesuffix(".weight")
            found = [rows for name, rows in wanted.items() if f".{module}".endswith(f".{name}")]
            wanted = found[0] if len(found) == 1 else None
        if not wanted:
            raise NotInPlace(f"trainable_token_indices in adapter_config.json does not say which rows of {parameter}")
        return list(wanted)

    def _shape(self, key: str) -> tuple[int, ...]:
        return tuple(self.adapter.tensor(key).shape)


_TOKEN_ROWS = ".token_adapter.trainable_tokens_delta"


class _AsViews(TorchFunctionMode):
    """Copies that only straighten memory are left out, so that what would be saved of a tensor is a view of it."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.contiguous:
            return args[0]
        return function(*args, **(kwargs or {}))


def _skeleton(checkpoint: Checkpoint) -> PreTrainedModel:
    """The model of a checkpoint without its weights."""
    try:
        config = AutoConfig.from_pretrained(checkpoint.directory)
        names = config.architectures or []
        # The class the checkpoint was saved from: an Auto class would drop a head it does not know.
        known = getattr(transformers, names[0], None) if names else None
        with torch.device("meta"):
            model = known._from_config(config) if known else AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ValueError(f"the base model in {checkpoint.directory} cannot be loaded: {error}") from error
    if getattr(config, "quantization_config", None):
        raise ValueError(
            f"the base model {checkpoint.directory} is stored quantised, so there are no floats of its own to merge "
            "into; use onto='dequantised' (--onto dequantised) or onto='quantised'"
        )
    model.tie_weights()
    return model


def _parts_of(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, list[Part]]:
    """By name of each parameter where it is stored; empty for one that is stored otherwise than by moving elements."""
    probes = {name: torch.empty(p.shape, device="meta") for name, p in model.named_parameters(remove_duplicate=False)}
    owners = {probe.untyped_storage()._cdata: name for name, probe in probes.items()}
    with _AsViews():
        saved = revert_weight_conversion(model, dict(probes))
    parts: dict[str, list[Part]] = {name: [] for name in probes}
    for name, view in saved.items():
        owner = owners.get(view.untyped_storage()._cdata)
        stored = _named(name, model.base_model_prefix, checkpoint)
        if owner is not None and stored is not None and stored.shape == tuple(view.shape):
            parts[owner].append(Part(stored.name, stored.shape, tuple(view.stride()), view.storage_offset()))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, found in parts.items():
        if sum(checkpoint.tensors[part.tensor].numel for part in found) != parameters[name].numel():
            found.clear()
    return _with_tied(parameters, parts, checkpoint)


def _named(name: str, prefix: str, checkpoint: Checkpoint) -> StoredTensor | None:
    """A tensor by its name, also in a checkpoint of the model without its head, or of one with a head."""
    for known in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"):
        if known in checkpoint.tensors:
            return checkpoint.tensors[known]
    return None


def _with_tied(
    parameters: dict[str, Tensor], parts: dict[str, list[Part]], checkpoint: Checkpoint
) -> dict[str, list[Part]]:
    """A tied weight is stored once, under either name, or twice: what changes one has to change both."""
    groups: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        groups.setdefault(id(parameter), []).append(name)
    for names in groups.values():
        together = list({part.tensor: part for name in names for part in parts[name]}.values())
        # Stored twice and not alike: Transformers does not tie them then.
        if len(together) == 1 or len({checkpoint.tensors[part.tensor].sha256() for part in together}) == 1:
            parts |= dict.fromkeys(names, together)
    return parts


def _in_order(model: PreTrainedModel, modules: list[str]) -> list[str]:
    """As the model has them: adapters of tied weights are merged one upon the other, and each sum is rounded."""
    places = {name: number for number, (name, _) in enumerate(model.named_modules())}
    # Not first of all in its module, as parameters come after the module itself.
    return sorted(modules, key=lambda name: (places.get(name, places.get(name.rpartition(".")[0], 0)), name))


def target_of(model: nn.Module, name: str) -> Target:
    """What the blocks of a module, or of a bare parameter, lie in.

    Raises:
        ValueError: the model has no such layer.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if name in parameters:
        *_, rows, cols = parameters[name].shape
        return Target(name, (parameters[name].numel() // cols, cols), False)
    weight = parameters.get(f"{name}.weight")
    if weight is None or weight.ndim != 2:
        raise ValueError(
            f"{name}: the adapter has blocks for this module, and the base model has no such linear layer or table; "
            "the adapter belongs to another model, use its own base"
        )
    transposed = isinstance(model.get_submodule(name), Conv1D)
    rows, cols = weight.t().shape if transposed else weight.shape
    return Target(f"{name}.weight", (rows, cols), transposed)


def _elements(layout: BlockLayout, delta: Tensor, target: Target, part: Part) -> Iterator[tuple[Tensor, Tensor]]:
    """Places in the stored tensor and what is added there, some blocks at a time."""
    grid = layout.grid
    if grid.num_blocks == 1:
        # All of the matrix, as with a low-rank pair: the part of it that is stored here, without a place for each.
        matrix = delta[0].t() if target.transposed else delta[0]
        yield slice(None), part.of(matrix.contiguous())
        return
    first = target.flat(layout.block_rows.long() * grid.block_rows, layout.block_cols.long() * grid.block_cols)
    corner = target.flat(
        ((layout.block_rows.long() + 1) * grid.block_rows).clamp(max=grid.rows) - 1,
        ((layout.block_cols.long() + 1) * grid.block_cols).clamp(max=grid.cols) - 1,
    )
    near = ((corner >= part.offset) & (first <= part.last)).nonzero()[:, 0]
    for some in near.split(max(1, _ELEMENTS // max(1, delta[0].numel()))):
        piece = BlockLayout(grid, layout.blocks[some])
        row_Br, col_Bc = piece.lines()
        inside = piece.padding_mask()
        flat = target.flat(row_Br[:, :, None], col_Bc[:, None, :]).expand(inside.shape)[inside]
        here, positions = part.find(flat)
        yield positions, delta[some][inside][here]


# So that places, 8 bytes each, stay small beside the blocks themselves.
_ELEMENTS = 1 << 18
