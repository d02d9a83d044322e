"""The LoRA form of an adapter, for programs that read LoRA only: exact where the rank may be what the blocks need, else
the best approximation, with the share of the delta that it keeps.

Shape suffixes: N rows and K columns of a weight (`out_features`, `in_features`; of an embedding tokens and dimensions),
k the rank, R and C row and column stripes.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import breadth_first_order, maximum_flow
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .. import ops
from ..blocks import BlockLayout
from ..say import say
from ..tuner.delta import SMTBlocks
from ..tuner.experts import ParameterLayer
from ..tuner.layer import SMTLayer
from ..tuner.low_rank import LowRank, dense_sum
from .aside import directory_aside
from .merge import load_adapter

# A total below it is a loss that a user must have asked for.
WARN_BELOW = 0.99


@dataclass(frozen=True)
class LoraForm:
    """An adapter as LoRA: `lora_B @ lora_A` per module, scaling 1.

    Args:
        config: PEFT's, ranks per module in `rank_pattern`.
        tensors: as `adapter_model.safetensors` holds them.
        ranks: rank of each module.
        energies: per module the share of the delta's squared Frobenius norm that is kept, 1 when exact.
        energy: the same of all modules together.
    """

    config: LoraConfig
    tensors: dict[str, Tensor]
    ranks: dict[str, int]
    energies: dict[str, float]
    energy: float

    def uniform(self) -> LoraForm:
        """The same deltas with every module at the largest rank, factors padded with zeros, for programs that take one
        rank for all (SGLang) or read no `rank_pattern`."""
        tensors = {key: _padded(key, tensor, self.config.r) for key, tensor in self.tensors.items()}
        config = copy.copy(self.config)
        config.rank_pattern, config.alpha_pattern = {}, {}
        return replace(self, config=config, tensors=tensors, ranks=dict.fromkeys(self.ranks, config.r))

    def __str__(self) -> str:
        width = max(map(len, self.ranks))
        lines = [
            f"{name:<{width}}  rank {self.ranks[name]:>5}  energy {self.energies[name]:.2%}" for name in self.ranks
        ]
        return "\n".join(lines)

    def save(self, directory: str | Path) -> None:
        """Write an ordinary LoRA adapter, which `PeftModel.from_pretrained` loads without this package."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        save_file(self.tensors, directory / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        self.config.save_pretrained(str(directory))


def export_lora(
    adapter_dir: str | Path,
    out_dir: str | Path,
    rank: int | float | Literal["exact"],
    min_energy: float | None = None,
    uniform_rank: bool = False,
) -> LoraForm:
    """Write the LoRA form of a saved adapter into a new directory; see `convert_to_lora` and `LoraForm.uniform`.

    Raises:
        FileExistsError: `out_dir` exists and is not empty.
    """
    _check_amount(rank, min_energy)
    with directory_aside(Path(out_dir)) as aside:
        form = convert_to_lora(adapter_dir, rank, min_energy=min_energy)
        form = form.uniform() if uniform_rank else form
        form.save(aside)
    return form


def convert_to_lora(
    source: PeftModel | str | Path,
    rank: int | float | Literal["exact"],
    *,
    adapter_name: str = "default",
    min_energy: float | None = None,
) -> LoraForm:
    """The LoRA form of an SMT adapter; the counterpart of `peft.convert_to_lora`.

    The exact form picks stripes of rows and columns that together hold every block, the cheapest such choice, and puts
    the rows (with a selector as B) and the columns (with one as A) into the factors as they are: `B @ A` is the delta,
    bit for bit in fp32. Its rank is the largest that blocks at these places can have; `exact_ranks` tells it before.
    A low-rank pair beside the blocks is appended to the factors as it is.

    Args:
        source: a `PeftModel`, or the directory of a saved adapter, whose base is then loaded.
        rank: `"exact"`; an int, the rank at most, by truncated singular value decomposition where the exact form needs
            more; or a float in (0, 1], the share of each delta's squared Frobenius norm to keep.
        adapter_name: which adapter of a model.
        min_energy: raise when less than this share is kept in total. Without it, less than 0.99 is warned of.

    Raises:
        ValueError: `rank` is none of these or `min_energy` no share, there is no such adapter or nothing was trained in
            it, a layer has no LoRA form (named), or less than `min_energy` is kept.
    """
    _check_amount(rank, min_energy)
    model = load_adapter(source) if isinstance(source, (str, Path)) else source
    layers = _layers(model, adapter_name)
    tensors, ranks, kept, total = {}, {}, {}, {}
    for path, layer in layers.items():
        blocks = layer.smt_blocks[adapter_name]
        pair = layer.pair(adapter_name)
        energy = float(layer.change(adapter_name)[1].double().square().sum())
        if energy == 0:
            continue
        left_Nk, right_kK, share = _factors(blocks, rank, pair)
        name = layer.smt_name
        tensors |= _named(path, layer, left_Nk, right_kK)
        ranks[name], kept[name], total[name] = left_Nk.shape[1], share, energy
    if not tensors:
        raise ValueError(
            f"every block of adapter {adapter_name} is zero, so there is no delta to convert; train it first"
        )
    energies = {name: min(1.0, share) for name, share in kept.items()}
    share = sum(energies[name] * total[name] for name in total) / sum(total.values())
    tensors |= _besides(model, adapter_name)
    tensors = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in tensors.items()}
    form = LoraForm(_config(model, adapter_name, layers, ranks), tensors, ranks, energies, share)
    _tell(form, min_energy)
    return form


def exact_ranks(source: PeftModel | str | Path, adapter_name: str = "default") -> dict[str, int]:
    """The rank that an exact LoRA form needs, per module."""
    model = load_adapter(source) if isinstance(source, (str, Path)) else source
    ranks = {}
    for layer in _layers(model, adapter_name).values():
        layout = layer.smt_blocks[adapter_name].layout()
        pair = layer.pair(adapter_name)
        ranks[layer.smt_name] = _needed(layout, *_cover(layout)) + (pair.rank if pair else 0)
    return ranks


def _check_amount(rank: object, min_energy: float | None) -> None:
    if min_energy is not None and not 0 <= min_energy <= 1:
        raise ValueError(f"min_energy must be a share from 0 to 1, got {min_energy}")
    is_number = isinstance(rank, (int, float)) and not isinstance(rank, bool)
    if rank == "exact" or (is_number and (0 < rank <= 1 if isinstance(rank, float) else rank >= 1)):
        return
    raise ValueError(
        f"rank must be 'exact', a positive int, or a float in (0, 1], the share of each delta to keep; got {rank!r}"
    )


def _layers(model: nn.Module, adapter_name: str) -> dict[str, SMTLayer]:
    layers = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, SMTLayer) and adapter_name in module.smt_blocks
    }
    if not layers:
        raise ValueError(f"the model has no SMT adapter {adapter_name!r} to convert")
    for layer in layers.values():
        blocks = layer.smt_blocks[adapter_name]
        bare = isinstance(layer, ParameterLayer)
        if bare or not isinstance(blocks, SMTBlocks) or blocks.grid.shape != (layer.out_features, layer.in_features):
            kind = type(layer.get_base_layer()).__name__
            kind = f"bare parameter of {kind}" if bare else kind
            raise ValueError(f"{layer.smt_name}: a {kind} has no LoRA form; merge the adapter instead")
    return layers


def _factors(blocks: SMTBlocks, rank: int | float | str, pair: LowRank | None) -> tuple[Tensor, Tensor, float]:
    """`(N, k)` and `(k, K)`, fp32, and the share of the squared norm that their product keeps."""
    layout, weight = blocks.layout(), blocks.weight.detach().float()
    rows_R, cols_C = _cover(layout)
    needed = _needed(layout, rows_R, cols_C) + (pair.rank if pair else 0)
    if rank == "exact" or (isinstance(rank, int) and needed <= rank):
        left_Nk, right_kK = _exact(weight, layout, rows_R, cols_C)
        if pair is not None:
            # The scaling goes into B: exact where it is a power of two, as 1 is, else B rounded once.
            left_Nk = torch.cat((left_Nk, pair.lora_B.detach().float() * pair.scaling), 1)
            right_kK = torch.cat((right_kK, pair.lora_A.detach().float()))
        return left_Nk, right_kK, 1.0
    if pair is None:
        rows_N = _members(layout.block_rows, layout.grid.block_rows, layout.grid.rows)
        cols_K = _members(layout.block_cols, layout.grid.block_cols, layout.grid.cols)
        delta_NK = ops.dense(weight, layout)
    else:
        rows_N, cols_K = torch.arange(layout.grid.rows), torch.arange(layout.grid.cols)
        delta_NK = dense_sum(weight, layout, pair.lora_A, pair.lora_B, pair.scaling)
    u, s, v = torch.linalg.svd(delta_NK[rows_N][:, cols_K], full_matrices=False)
    energies = s.double().square().cumsum(0)
    share = energies / energies[-1]
    count = min(rank, len(s)) if isinstance(rank, int) else int((share < rank).sum()) + 1
    count = min(count, len(s))
    left_Nk, right_kK = delta_NK.new_zeros(delta_NK.shape[0], count), delta_NK.new_zeros(count, delta_NK.shape[1])
    left_Nk[rows_N], right_kK[:, cols_K] = u[:, :count] * s[:count], v[:count]
    return left_Nk, right_kK, float(share[count - 1])


def _needed(layout: BlockLayout, rows_R: np.ndarray, cols_C: np.ndarray) -> int:
    """The rank of an exact form of the blocks."""
    return int(layout.grid.heights().numpy()[rows_R].sum() + layout.grid.widths().numpy()[cols_C].sum())


def _exact(weight: Tensor, layout: BlockLayout, rows_R: np.ndarray, cols_C: np.ndarray) -> tuple[Tensor, Tensor]:
    """The rows of the delta that the chosen row stripes hold, then the columns of what is left."""
    grid, device = layout.grid, weight.device
    in_rows_B = torch.from_numpy(rows_R).to(device)[layout.block_rows][:, None, None]
    rows_N = _members(torch.from_numpy(np.flatnonzero(rows_R)).to(device), grid.block_rows, grid.rows)
    cols_K = _members(torch.from_numpy(np.flatnonzero(cols_C)).to(device), grid.block_cols, grid.cols)
    by_row_NK, by_col_NK = (ops.dense(torch.where(mask, weight, 0), layout) for mask in (in_rows_B, ~in_rows_B))
    pick_rows_kN, pick_cols_kK = weight.new_zeros(len(rows_N), grid.rows), weight.new_zeros(len(cols_K), grid.cols)
    pick_rows_kN[torch.arange(len(rows_N), device=device), rows_N] = 1
    pick_cols_kK[torch.arange(len(cols_K), device=device), cols_K] = 1
    return torch.cat((pick_rows_kN.t(), by_col_NK[:, cols_K]), 1), torch.cat((by_row_NK[rows_N], pick_cols_kK))


def _members(stripes: Tensor, width: int, limit: int) -> Tensor:
    """The rows, or columns, of the weight that lie in these stripes, sorted."""
    members = torch.unique(stripes)[:, None] * width + torch.arange(width, device=stripes.device)
    return members[members < limit]


def _cover(layout: BlockLayout) -> tuple[np.ndarray, np.ndarray]:
    """Row and column stripes that together hold every block, of the least height and width in all.

    A least cover of a bipartite graph is a minimum cut (Konig's theorem, with weights): row stripes that the source
    still reaches in the residual network are outside of it, column stripes that it reaches are in.

    Returns:
        Which row stripes and which column stripes are chosen, bool `(R,)` and `(C,)`.
    """
    grid = layout.grid
    height, width = grid.stripes
    rows, cols = layout.block_rows.cpu().numpy(), layout.block_cols.cpu().numpy()
    source, sink = height + width, height + width + 1
    touched_rows, touched_cols = np.unique(rows), np.unique(cols)
    start = np.concatenate((np.full(len(touched_rows), source), rows, height + touched_cols))
    end = np.concatenate((touched_rows, height + cols, np.full(len(touched_cols), sink)))
    heights, widths = grid.heights().numpy()[touched_rows], grid.widths().numpy()[touched_cols]
    unlimited = np.full(len(rows), heights.sum() + 1)
    room = np.concatenate((heights, unlimited, widths)).astype(np.int32)
    network = csr_array(coo_array((room, (start, end)), shape=(sink + 1, sink + 1)))
    residual = csr_array(network - maximum_flow(network, source, sink).flow)
    residual.eliminate_zeros()
    reached = np.zeros(sink + 1, dtype=bool)
    reached[breadth_first_order(residual, source, return_predecessors=False)] = True
    rows_R, cols_C = np.zeros(height, dtype=bool), reached[height : height + width].copy()
    rows_R[touched_rows] = ~reached[touched_rows]
    return rows_R, cols_C


def _named(path: str, layer: SMTLayer, left_Nk: Tensor, right_kK: Tensor) -> dict[str, Tensor]:
    if isinstance(layer.get_base_layer(), nn.Embedding):
        # PEFT looks ids up in A: there the table is the transposed product.
        return {f"{path}.lora_embedding_A": left_Nk.t(), f"{path}.lora_embedding_B": right_kK.t()}
    return {f"{path}.lora_A.weight": right_kK, f"{path}.lora_B.weight": left_Nk}


def _padded(key: str, tensor: Tensor, rank: int) -> Tensor:
    """A factor with zeros up to a rank: rows of an A, columns of a B."""
    if ".lora_A." in key or key.endswith(".lora_embedding_A"):
        return torch.cat((tensor, tensor.new_zeros(rank - tensor.shape[0], tensor.shape[1])))
    if ".lora_B." in key or key.endswith(".lora_embedding_B"):
        return torch.cat((tensor, tensor.new_zeros(tensor.shape[0], rank - tensor.shape[1])), 1)
    return tensor


def _besides(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """What the adapter saves besides its blocks: modules trained in full, token rows, targeted tables."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        saved = get_peft_model_state_dict(model, adapter_name=adapter_name)
    return {key: tensor for key, tensor in saved.items() if not {"smt_blocks", "smt_low_rank"} & {*key.split(".")}}


def _config(model: PeftModel, adapter_name: str, layers: dict[str, SMTLayer], ranks: dict[str, int]) -> LoraConfig:
    ours, largest = model.peft_config[adapter_name], max(ranks.values())
    # Longest names first: PEFT takes the first that ends a module's name.
    pattern = {name: ranks[name] for name in sorted(ranks, key=len, reverse=True) if ranks[name] != largest}
    return LoraConfig(
        r=largest,
        lora_alpha=largest,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        target_modules=list(ranks),
        fan_in_fan_out=any(isinstance(layer.get_base_layer(), Conv1D) for layer in layers.values()),
        modules_to_save=copy.copy(ours.modules_to_save),
        trainable_token_indices=copy.copy(ours.trainable_token_indices),
        base_model_name_or_path=ours.base_model_name_or_path,
        task_type=ours.task_type,
        inference_mode=True,
    )


def _tell(form: LoraForm, min_energy: float | None) -> None:
    worst = min(form.energies, key=form.energies.get)
    told = (
        f"the LoRA form has rank {min(form.ranks.values())} to {max(form.ranks.values())} and keeps {form.energy:.2%} "
        f"of the delta's squared norm, least in {worst}: {form.energies[worst]:.2%}"
    )
    repair = "raise rank, or take rank='exact'"
    if min_energy is not None and form.energy < min_energy:
        raise ValueError(f"{told}; min_energy={min_energy} asks for more: {repair}")
    if min_energy is None and form.energy < WARN_BELOW:
        warnings.warn(f"{told}; {repair}, or say with min_energy how little will do", stacklevel=3)
    else:
        say(told)
