"""The low-rank pair of one adapter in one layer, trained beside its blocks (RoSA, ICML 2024, arXiv 2401.04679).

`y = x (W + S + s B A)^T`: `S` are the blocks, `B A` is a LoRA (arXiv 2106.09685) of the whole weight, `s = alpha / r`.

Shape suffixes: N rows and K columns of a weight (`out_features`, `in_features`), r the rank.
"""

from __future__ import annotations

import math
import zlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..blocks import BlockGrid, BlockLayout
from ..config import SMTConfig
from .gate import is_traced


class LowRank(nn.Module):
    """The low-rank pair of one adapter in one layer.

    Attributes:
        lora_A: `(r, in_features)`, fp32; as PEFT starts it, uniform within `1 / sqrt(in_features)`.
        lora_B: `(out_features, r)`, fp32, zero at the start, so that the pair changes nothing then.
        scaling: `lora_alpha / lora_rank`.
        dropout: share of the inputs that the pair, and it alone, does not see in training.

    Args:
        name: of the module, for messages.
        shape: `(out_features, in_features)` of its weight.
        config: its `lora_rank`, `lora_alpha`, `lora_dropout`, `init_weights` and `seed` count.
    """

    kind, starts_at_zero = "smt_low_rank", "lora_B"

    def __init__(self, name: str, shape: tuple[int, int], config: SMTConfig):
        super().__init__()
        self.name = name
        self.rank, self.shape = config.lora_rank, tuple(shape)
        self.scaling = config.low_rank_scaling
        self.dropout = config.lora_dropout
        self.lora_A = nn.Parameter(torch.empty(self.parts["lora_A"]))
        self.lora_B = nn.Parameter(torch.zeros(self.parts["lora_B"]))
        # The parameters whose values have been looked at.
        self._checked: tuple[int, int] | None = None
        if not self.lora_A.is_meta:
            self._start(config)

    @torch.no_grad()
    def _start(self, config: SMTConfig) -> None:
        # Of the module's own: the same in every process of a run, in one that is given its selection and in one that
        # has chosen it first; and without the pair nothing draws another number than it did.
        generator = torch.Generator("cpu").manual_seed((config.seed ^ zlib.crc32(self.name.encode())) & _SEEDS)
        bound = 1 / math.sqrt(self.lora_A.shape[1])
        self.lora_A.copy_(torch.rand(self.lora_A.shape, generator=generator, device="cpu").mul_(2).sub_(1).mul_(bound))
        if not config.init_weights:
            # As large as the weights themselves, so that tests see the pair act.
            self.lora_B.copy_(torch.randn(self.lora_B.shape, generator=generator, device="cpu").mul_(0.02))

    @property
    def weight(self) -> nn.Parameter:
        """By which PEFT's policy for FSDP1 knows a layer that is trained, to wrap it by itself."""
        return self.lora_B

    @property
    def parts(self) -> dict[str, tuple[int, ...]]:
        """What is saved, and its shape, also where it is sharded."""
        return {"lora_A": (self.rank, self.shape[1]), "lora_B": (self.shape[0], self.rank)}

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """`y + s X A^T B^T`, where `y` `(..., out_features)` is what the layer made of `x` `(..., in_features)`.

        In the dtypes of PEFT's LoRA: that of the pair, or of autocast, the sum rounded to the dtype of `y`.
        """
        self._check_finite_once()
        is_cast = torch.is_autocast_enabled(x.device.type) and torch.float64 not in (x.dtype, self.lora_A.dtype)
        # Autocast would cast it again, and the copy between would be kept for nothing.
        x = x if is_cast else x.to(self.lora_A.dtype)
        x = F.dropout(x, self.dropout, self.training) if self.dropout else x
        low = F.linear(x, self.lora_A)
        # Of r columns, and not, as the formula has it, of all outputs; kept by autograd unless it is 1.
        low = low if self.scaling == 1 else low * self.scaling
        return (y + F.linear(low, self.lora_B)).to(y.dtype)

    def check_loaded(self, lora_A: Tensor | None, lora_B: Tensor | None) -> None:
        """Check tensors read from a file before they are copied in.

        Raises:
            ValueError: one is missing, of the wrong shape or dtype, or not finite; names the module.
        """
        repair = "the adapter file is damaged or belongs to another model; restore it or save the adapter again"
        for (part, shape), tensor in zip(self.parts.items(), (lora_A, lora_B), strict=True):
            if tensor is None:
                raise ValueError(
                    f"{self.name}: the adapter file has no {self.kind}.{part} for this module, but lora_rank in "
                    f"adapter_config.json says {self.rank}; {repair}"
                )
            if tuple(tensor.shape) != shape:
                raise ValueError(
                    f"{self.name}: {self.kind}.{part} has shape {tuple(tensor.shape)} in the file, but lora_rank and "
                    f"the weight say {shape}; {repair}"
                )
            if not tensor.is_floating_point():
                raise ValueError(f"{self.name}: {self.kind}.{part} is {tensor.dtype}, not a float type; {repair}")
            self._check_finite(part, tensor)

    def _check_finite_once(self) -> None:
        """Not every road into a model passes `check_loaded`; here they all meet."""
        parameters = id(self.lora_A), id(self.lora_B)
        if self._checked == parameters or torch.compiler.is_compiling() or is_traced():
            return
        for part in self.parts:
            if type(tensor := getattr(self, part)) is nn.Parameter:
                self._check_finite(part, tensor)
        self._checked = parameters

    def _check_finite(self, part: str, tensor: Tensor) -> None:
        if not tensor.is_meta and not bool(torch.isfinite(tensor.detach()).all()):
            raise ValueError(
                f"{self.name}: {self.kind}.{part} holds NaN or infinity; restore the adapter, or train it anew with a "
                "lower learning rate"
            )

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        self._checked = None

    def __getstate__(self):
        # Of this process's parameters.
        return {**self.__dict__, "_checked": None}

    def extra_repr(self) -> str:
        rows, cols = self.shape
        return f"rank {self.rank} of {rows} x {cols}, scaling {self.scaling:g}"


@torch.no_grad()
def dense_sum(weight_Brc: Tensor, layout: BlockLayout, lora_A_rK: Tensor, lora_B_Nr: Tensor, scaling: float) -> Tensor:
    """`S + s B A`, `(N, K)`, fp32 (fp64 for blocks of fp64): summed in fp64 and rounded once.

    Column by column of B in a fixed order, where products of fp32 are exact, and not by a GEMM, whose order is its
    own: merged in memory, through files and on another device the values are the same, bit for bit. A pair that is zero
    leaves exactly the blocks. Takes 12 bytes per weight for the time of it.
    """
    total_NK = ops.dense(weight_Brc.double(), layout)
    lora_A_rK, lora_B_Nr = lora_A_rK.double(), lora_B_Nr.double()
    step = max(1, _ELEMENTS // total_NK.shape[1])
    for total_nK, lora_B_nr in zip(total_NK.split(step), lora_B_Nr.split(step), strict=True):
        product_nK = torch.zeros_like(total_nK)
        for b_n, a_K in zip(lora_B_nr.unbind(1), lora_A_rK, strict=True):
            product_nK.addcmul_(b_n[:, None], a_K)
        total_nK.add_(product_nK.mul_(scaling))
    return total_NK.to(torch.promote_types(weight_Brc.dtype, torch.float32))


# What a generator takes of a seed; `SMTConfig` takes any whole number.
_SEEDS = 2**64 - 1
# 2 MB of fp64, which stay in a core's cache while the columns are added up.
_ELEMENTS = 1 << 18


def whole(grid: BlockGrid, device: torch.device) -> BlockLayout:
    """All of a matrix as one block."""
    return BlockLayout(BlockGrid(*grid.shape, *grid.shape), torch.zeros(1, 2, dtype=torch.int32, device=device))
