"""Which matrices of a model share channels: the rows of some make what the columns of another read.

A *channel* of a feed-forward network is a row of every matrix that leads into it (gate, up) and the column of the one
that leads out (down); between the two an activation acts on it alone. A channel of an attention is a key/value head:
its rows of the value matrix, and the columns of the output matrix for all query heads that read it (Yang et al., S2FT,
NeurIPS 2024). So channels can be numbered anew on both sides, and the function stays.

Matrices are found by the names that architectures give them, and taken when their shapes fit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..blocks import BlockGrid
from ..say import once
from .target import Target

# What leads into the channels of a feed-forward network, and what leads out. A name that stands n times is one matrix
# with n parts below each other.
FEED_FORWARD = (
    (("gate_proj", "up_proj"), "down_proj"),  # Llama, Mistral, Qwen, Gemma
    (("gate_up_proj", "gate_up_proj"), "down_proj"),  # Phi-3, GLM-4
    (("up_proj",), "down_proj"),  # Nemotron, MPT
    (("w1", "w3"), "w2"),
    (("c_fc",), "c_proj"),  # GPT-2
    (("fc1",), "fc2"),  # OPT, CLIP, ViT, Phi, Whisper
    (("fc_in",), "fc_out"),  # GPT-J
    (("dense_h_to_4h",), "dense_4h_to_h"),  # GPT-NeoX, BLOOM, Falcon
    (("lin1",), "lin2"),  # DistilBERT
    (("linear1",), "linear2"),  # torch.nn.TransformerEncoderLayer
    (("wi_0", "wi_1"), "wo"),  # T5 1.1
    (("wi",), "wo"),  # T5
    (("Wi", "Wi"), "Wo"),  # ModernBERT
    (("intermediate.dense",), "output.dense"),  # BERT
)
# The matrix whose rows make the values, how its heads lie, and what reads them.
ATTENTION = (
    ("v_proj", "alone", "o_proj"),  # Llama, Mistral, Qwen, Gemma, ViT
    ("v_proj", "alone", "out_proj"),  # OPT, CLIP, Whisper, GPT-J
    ("self.value", "alone", "output.dense"),  # BERT
    ("attention.value", "alone", "output.dense"),
    ("v_lin", "alone", "out_lin"),  # DistilBERT
    ("v", "alone", "o"),  # T5
    ("c_attn", "last part", "c_proj"),  # GPT-2, whose heads all have values of their own
    ("qkv_proj", "last", "o_proj"),  # Phi-3
    ("Wqkv", "last", "out_proj"),  # MPT
    ("Wqkv", "last", "Wo"),  # ModernBERT
    ("query_key_value", "each third", "dense"),  # GPT-NeoX, BLOOM
)
HEAD_DIMS = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim")


@dataclass(frozen=True)
class Member:
    """One matrix's share of the channels: channel j is its stripe `first + step * j`.

    Args:
        name: of the module.
        by_rows: whether a stripe is whole rows, else whole columns.
        width: rows or columns of a stripe.
    """

    name: str
    by_rows: bool
    width: int
    first: int = 0
    step: int = 1

    def grid(self, shape: tuple[int, int]) -> BlockGrid:
        return BlockGrid.fit(shape, (self.width, -1) if self.by_rows else (-1, self.width))

    def stripes(self, channels: Tensor) -> Tensor:
        """Row-major numbers in `grid` of the blocks that make these channels, int64."""
        return self.first + self.step * channels.long()


@dataclass(frozen=True)
class Coupling:
    """Channels that several matrices share.

    Args:
        name: of the module that reads them.
        channels: how many there are.
        members: what of them can be trained.
    """

    name: str
    channels: int
    members: tuple[Member, ...]

    def of(self, name: str) -> list[Member]:
        return [member for member in self.members if member.name == name]


def find_couplings(model: nn.Module) -> list[Coupling]:
    """All couplings of a model, in the order of the modules that read the channels."""
    shapes = {name: shape for name, module in model.named_modules() if (shape := _shape(module)) is not None}
    found = {}
    for name in shapes:
        coupling = next(_couplings_read_by(name, shapes, model), None)
        if coupling is not None:
            found[name] = coupling
    return list(found.values())


def coupled_targets(model: nn.Module, targets: Mapping[str, Target], coupled: str, saved: bool) -> dict[str, Target]:
    """The targets that share channels, each with its coupling, whose members are targets.

    Args:
        coupled: `"both"` or `"consumers"`, as `SMTConfig.coupled`.
        saved: whether the blocks are settled by a saved adapter: then nothing is left out, and nothing refused.

    Raises:
        ValueError: no two matrices of the model are known to share channels, or none of those is a target.
    """
    couplings = find_couplings(model)
    owners: dict[str, Coupling] = {}
    for coupling in couplings:
        members = tuple(
            member
            for member in coupling.members
            if member.name in targets and (coupled == "both" or not member.by_rows)
        )
        owners |= {member.name: replace(coupling, members=members) for member in members}
    if not owners and not saved:
        raise ValueError(_none_found(couplings, targets, coupled))
    if left := [name for name in targets if name not in owners and not saved]:
        once(
            f"coupled={coupled!r}: {len(left)} of {len(targets)} targeted modules share no channels on that side and "
            f"stay frozen: {', '.join(left[:4])}{', ...' if len(left) > 4 else ''}"
        )
    kept = targets if saved else owners
    return {
        name: replace(target, coupling=owners[name]) if name in owners else target
        for name, target in targets.items()
        if name in kept
    }


def _none_found(couplings: list[Coupling], targets: Mapping[str, Target], coupled: str) -> str:
    if not couplings:
        return (
            f"coupled={coupled!r}: no two matrices of this model are known to share channels; known are pairs such as "
            "gate_proj and up_proj with down_proj, v_proj with o_proj, c_fc with c_proj, and intermediate.dense with "
            "output.dense. Leave coupled out, and take block_size=(-1, 1) for whole columns"
        )
    names = sorted({member.name.rpartition(".")[2] for each in couplings for member in each.members})
    return (
        f"coupled={coupled!r}: none of the {len(targets)} targeted modules, such as {next(iter(targets), None)}, "
        f"shares channels on that side; this model's modules that do are named {', '.join(names)}. Name those in "
        "target_modules, or leave coupled out"
    )


def _couplings_read_by(name: str, shapes: Mapping[str, tuple[int, int]], model: nn.Module) -> Iterator[Coupling]:
    """What fits of the known forms, for the module that reads; the first is meant."""
    for producers, consumer in FEED_FORWARD:
        prefix = _prefix(name, consumer)
        if prefix is None or not all(prefix + each in shapes for each in producers):
            continue
        channels = shapes[name][1]
        if all(shapes[prefix + each][0] == producers.count(each) * channels for each in producers):
            rows = [Member(prefix + each, True, 1, part * channels) for each, part in _parts(producers)]
            yield Coupling(name, channels, (*rows, Member(name, False, 1)))
    for value, lie, consumer in ATTENTION:
        prefix = _prefix(name, consumer)
        if prefix is None or prefix + value not in shapes:
            continue
        head_dim = _head_dim(model.get_submodule((prefix + value).rpartition(".")[0]))
        if head_dim is not None:
            yield from _heads(name, shapes[name][1], prefix + value, shapes[prefix + value][0], lie, head_dim)


def _heads(reader: str, columns: int, value: str, rows: int, lie: str, head_dim: int) -> Iterator[Coupling]:
    """The coupling of an attention by key/value heads, unless the shapes do not fit."""
    if columns % head_dim or rows % head_dim:
        return
    heads, stripes = columns // head_dim, rows // head_dim
    if lie == "alone":
        count, first, step = stripes, 0, 1
    elif lie == "last":
        count = (stripes - heads) // 2
        first, step = stripes - count, 1
        if heads + 2 * count != stripes:
            return
    elif lie == "last part" and stripes in (2 * heads, 3 * heads):
        count, first, step = heads, stripes - heads, 1
    elif lie == "each third" and stripes == 3 * heads:
        count, first, step = heads, 2, 3
    else:
        return
    if count < 1 or heads % count:
        return
    members = Member(value, True, head_dim, first, step), Member(reader, False, heads // count * head_dim)
    yield Coupling(reader, count, members)


def _parts(producers: tuple[str, ...]) -> list[tuple[str, int]]:
    """Each name with how often it has stood before."""
    return [(name, producers[:i].count(name)) for i, name in enumerate(producers)]


def _prefix(name: str, suffix: str) -> str | None:
    """What stands before the suffix in a dotted name, with its dot."""
    if name == suffix:
        return ""
    return name[: -len(suffix)] if name.endswith("." + suffix) else None


def _head_dim(attention: nn.Module) -> int | None:
    return next((size for name in HEAD_DIMS if isinstance(size := getattr(attention, name, None), int)), None)


def _shape(module: nn.Module) -> tuple[int, int] | None:
    """`(out_features, in_features)` of a linear layer of any kind."""
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    if isinstance(base, Conv1D):
        return base.nf, base.nx
    sides = getattr(base, "out_features", None), getattr(base, "in_features", None)
    return sides if all(isinstance(side, int) for side in sides) else None
