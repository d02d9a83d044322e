"""`SMTConfig`: every setting of the tuner, with its range. No tensors, no kernels."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from peft import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import get_pattern_key
from peft.utils.peft_types import PeftType
from safetensors import SafetensorError, safe_open

from ..blocks import BlockGrid, BlockSelection
from .agreement import disagreements
from .checks import check
from .choices import CALLABLE_PREFIX, DATA_FREE_SCORES, MAX_AUTO_SIDE, MIN_AUTO_SIDE

CARD_NOTE = """### Loading this adapter

It is an SMT adapter (blocks of the base weights). PEFT reads it once `smt_peft` has been imported; without that line it
stops with `KeyError: 'SMT'`.

```python
import smt_peft  # pip install smt-peft
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("this directory")
```
"""


@dataclass
class SMTConfig(PeftConfig):
    """Settings of Sparse Matrix Tuning (He et al., ICLR 2025, arXiv 2405.15525): which blocks of which weights train.

    Args:
        target_modules: names, a regex, or `"all-linear"` (every linear layer but the output head), as in PEFT; None
            takes PEFT's own list for the model's architecture.
        exclude_modules: names or a regex that are left out.
        block_size: side of a square block, `(rows, cols)` of a block, or `"auto"`: the largest power of two that is at
            most `density` times the matrix's shorter side, between 4 and 256, so that one matching reaches every
            stripe. `-1` means the whole side: `(-1, 1)` is one input column, `(1, -1)` one output row. A side larger
            than the matrix is clipped to it.
        density: trained share of the targeted weights, in (0, 1]. Exactly one of `density` and `num_blocks`; 0.01
            when neither is given.
        num_blocks: number of blocks within each scope of the budget.
        density_pattern: `{regex: density}`, densities of single modules, matched as LoRA's `rank_pattern` is: against
            the end of a module's name, from a dot on, the first match counting. Such a module has a budget of its own,
            `density` of its own weights, and stands outside of `budget`: the other modules share what `density` of
            their weights is. `block_size="auto"` follows it. A pattern that matches no target is an error, and so is
            `num_blocks` beside it.
        score: how a block is ranked; one of `grad_abs` (mean over batches of |g|), `grad_sum_abs` (|sum of g|),
            `mean_abs` (|mean of signed g|), `grad_sq` (mean of g squared), `taylor` (|w g|), `activation` (per input
            column), `magnitude` (|w|), `small_magnitude` (the least |w| first), `low_rank_magnitude` (|w| after rank
            reduction), `random`, `diagonal`; or a callable `(weight, grad) -> scores`, all of shape
            `(out_features, in_features)`.
        budget: within what the best blocks are taken: `"global"`, `"per_module"`, `"per_layer"`, or a
            `{regex: share}` map that gives the modules matching each regex their share of the whole budget.
        spread: how chosen blocks lie in a matrix: `"free"`; `"capped"`, as few per row and column stripe as the budget
            allows; `"assignment"`, rounds of maximum-weight matching with at most one block per row stripe and column
            stripe in a round.
        max_column_share: at most this share of a matrix's column stripes holds blocks, in (0, 1]. Fewer columns mean
            fewer activations kept for the backward pass.
        max_lora_rank: keeps the rank of every matrix's delta at or below this, so that it has an exact LoRA form; of
            the sum where there is a low-rank pair, so the blocks get what `lora_rank` leaves.
        lora_rank: puts a low-rank pair (LoRA) of this rank beside the blocks of every module that has blocks, trained,
            saved and merged with them (RoSA, arXiv 2401.04679); None: blocks alone. Linear layers only.
        lora_alpha: the pair is scaled by `lora_alpha / lora_rank`; `lora_rank` when not given, so by 1.
        lora_dropout: share of the inputs that the pair does not see in training, in [0, 1).
        coupled: chooses channels that several matrices share instead of blocks of each (S2FT, arXiv 2412.06289): the
            rows of gate and up with the columns of down, the rows of v of a key/value head with the columns of o of the
            query heads that read it. `"both"` trains what is targeted of them, `"consumers"` down and o alone, as the
            paper's experiments do. A channel is ranked by the mean score of its weights. `density` is the trained share
            of the matrices that share channels, and of the channels; other targets stay frozen. `density_pattern` goes
            by the matrix that reads the channels, and those that one pattern matches share a budget within `budget`.
        avoid: a `BlockSelection`, the path of one, or a list of either: none of their blocks is chosen, so that the
            adapter and theirs share no weight and add exactly. Runtime only.
        selection: a `BlockSelection` or the path of one. Runtime only: never written into the saved config. What it
            settles (`density`, `block_size`, `score`, ...) is left out, or set as it was made.
        block_pattern: `{module: [num_blocks, rows, cols]}`, filled in when blocks are chosen; it fixes the shapes of
            an adapter before its weights are read.
        forward: `"auto"`, or `"additive"`, `"swap"` (float bases) or `"overlay"` (quantised bases that can be
            dequantised) by name.
        saved_activations: how the inputs that the blocks' gradients need are kept until backward: `"full"`, or `"int8"`
            with a scale for every 128 tokens of a column. Look-ups keep ids alone, so it changes nothing of theirs.
        init_weights: True starts from the base model (delta zero); False draws small random deltas, for tests.
        fan_in_fan_out: whether targets store `(in_features, out_features)`. Detected per layer; kept for PEFT.
        modules_to_save: modules trained in full and saved with the adapter.
        layers_to_transform: indices of the layers to tune.
        layers_pattern: name of the layer list, for `layers_to_transform`.
        target_parameters: names, or ends of names, of parameters that no linear layer owns, as the experts of a
            mixture: `["experts.gate_up_proj", "experts.down_proj"]`. A 3-D parameter is one matrix per expert, and rows
            and columns of its blocks are those of the matrix as stored. With `target_modules=None` or `[]`, nothing
            else is tuned.
        trainable_token_indices: rows of the token embedding trained besides the blocks, as in PEFT.
        seed: seed of `random` and of tie-breaks.
        base_fingerprint: a few weights of the base the blocks belong to, checked when an adapter is loaded; see
            `fingerprint.fingerprint`.
        base_quantization: filled in: `quantization_config` of the model that the blocks were trained on, from which
            its dequantised weights can be had again; None for a base of floats.

    Raises:
        ValueError: a value is out of its range or contradicts another; the message names the field and the repair.
    """

    target_modules: list[str] | str | None = "all-linear"
    exclude_modules: list[str] | str | None = None
    block_size: int | list[int] | Literal["auto"] = "auto"
    density: float | None = None
    num_blocks: int | None = None
    density_pattern: dict[str, float] | None = None
    score: str | Callable = "grad_abs"
    budget: str | dict[str, float] = "per_module"
    spread: Literal["free", "capped", "assignment"] = "assignment"
    max_column_share: float | None = None
    max_lora_rank: int | None = None
    lora_rank: int | None = None
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    coupled: Literal["both", "consumers"] | None = None
    avoid: BlockSelection | str | list[BlockSelection | str] | None = field(
        default=None, repr=False, metadata={"runtime": True}
    )
    selection: BlockSelection | str | None = field(default=None, repr=False, metadata={"runtime": True})
    block_pattern: dict[str, list[int]] | None = None
    forward: Literal["auto", "additive", "swap", "overlay"] = "auto"
    saved_activations: Literal["full", "int8"] = "full"
    init_weights: bool = True
    fan_in_fan_out: bool = False
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    target_parameters: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    seed: int = 0
    base_fingerprint: dict[str, list] | None = None
    base_quantization: dict[str, Any] | None = None

    # Not fields, so neither saved nor compared: the settled blocks while an adapter is being injected
    # (`tuner.plan.Plan`); whether the config was read from a file whose weights have not been loaded yet; and what
    # using the config filled in, `{field: (as given, as filled in)}`.
    plan = None
    awaits_weights = False
    filled_in = None

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType.SMT
        check(self)

    def to_dict(self) -> dict[str, Any]:
        """The settings that are saved: everything but `selection` and `avoid`; a callable score by its name."""
        settings = asdict(copy_without(copy_without(self, "selection"), "avoid"))
        settings.pop("selection")
        settings.pop("avoid")
        settings["score"] = self.score_name
        return settings

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> SMTConfig:
        """Read a saved config; when the adapter's weights lie beside it, check that their file is whole.

        Raises:
            ValueError: the weights file is truncated or no safetensors file. No model has been touched by then.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        config.awaits_weights = True
        weights = Path(pretrained_model_name_or_path, subfolder or "", SAFETENSORS_WEIGHTS_NAME)
        if weights.is_file():
            try:
                with safe_open(weights, framework="pt"):
                    pass
            except (SafetensorError, OSError) as error:
                raise ValueError(
                    f"{weights} cannot be read ({error}): the file is truncated or damaged; restore it or save the "
                    "adapter again"
                ) from error
        return config

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save as PEFT does, and say in the model card beside it, where there is one, what a reader must import."""
        super().save_pretrained(save_directory, **kwargs)
        cards = (directory / "README.md" for directory in (Path(save_directory), Path(save_directory).parent))
        card = next(
            (card for card in cards if card.is_file() and "library_name: peft" in card.read_text("utf-8")), None
        )
        if card is not None and CARD_NOTE.strip() not in (text := card.read_text("utf-8")):
            card.write_text(text.rstrip() + "\n\n" + CARD_NOTE, "utf-8")

    def copy(self) -> SMTConfig:
        """A shallow copy that shares the selection."""
        return copy.copy(self)

    def fill_in(self, **values: Any) -> None:
        """Set fields that follow from the model, remembering what the caller gave."""
        self.filled_in = {name: (getattr(self, name), value) for name, value in values.items()}
        for name, value in values.items():
            setattr(self, name, value)

    def reopen(self) -> None:
        """Before another use: take back what the last one filled in, unless it has been changed since."""
        for name, (given, filled) in (self.filled_in or {}).items():
            if getattr(self, name) == filled:
                setattr(self, name, given)
        self.filled_in = None

    @property
    def score_name(self) -> str:
        if isinstance(self.score, str):
            return self.score
        return CALLABLE_PREFIX + getattr(self.score, "__qualname__", type(self.score).__name__)

    @property
    def needs_data(self) -> bool:
        """Whether the score looks at gradients or activations."""
        return self.score not in DATA_FREE_SCORES

    @property
    def low_rank_scaling(self) -> float:
        """What the product of a low-rank pair is multiplied by."""
        return 1.0 if self.lora_alpha is None else self.lora_alpha / self.lora_rank

    @property
    def max_block_rank(self) -> int | None:
        """What `max_lora_rank` leaves to the blocks."""
        return None if self.max_lora_rank is None else self.max_lora_rank - (self.lora_rank or 0)

    def density_key(self, name: str) -> str | None:
        """The key of `density_pattern` that the module matches, or None; an expert counts as its parameter."""
        pattern = get_pattern_key(self.density_pattern or {}, name.partition("[")[0])
        return pattern if pattern in (self.density_pattern or {}) else None

    def grid(self, shape: tuple[int, int], name: str = "") -> BlockGrid:
        """The tiling of a matrix of `(out_features, in_features)`, the weight of module `name`, under `block_size`."""
        if self.block_size != "auto":
            size = self.block_size if isinstance(self.block_size, int) else tuple(self.block_size)
            return BlockGrid.fit(shape, size)
        own = self.density_key(name)
        density = self.density if own is None else self.density_pattern[own]
        side = max(MIN_AUTO_SIDE, min(MAX_AUTO_SIDE, density * min(shape)))
        return BlockGrid.fit(shape, 2 ** math.floor(math.log2(side)))

    def check_agreement(self, selection: BlockSelection) -> None:
        """Raise `ValueError`, naming the field, when a setting is not what the selection was made with.

        What has its default says nothing.
        """
        given = {
            each.name: getattr(self, each.name)
            for each in fields(self)
            if getattr(self, each.name) not in (each.default, None)
        }
        if "score" in given:
            given["score"] = self.score_name
        for message in disagreements(selection, given).values():
            raise ValueError(message)


def copy_without(config: SMTConfig, name: str) -> SMTConfig:
    """A shallow copy with one field set to None; `asdict` would deep-copy the tensors of a selection."""
    clone = copy.copy(config)
    setattr(clone, name, None)
    return clone
