"""Is what was saved what was trained? A fresh process reads the adapter back and compares.

Three things are checked: the adapter as read gives the logits of the model in memory, bit for bit; merged weights are
base plus delta, rounded once, in the chosen blocks and the base everywhere else, bit for bit; and merging moves the
logits by no more than rounding does.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..bases.packed import quantization_of
from ..blocks import BlockLayout, BlockSelection
from ..export.adapter import SavedAdapter
from ..export.dequantised import dequantise_, quantization_config, round_to
from ..export.edits import target_of
from ..tuner.quantised import QuantisedLinear
from .errors import VerificationError
from .model import Head, load_model
from .tell import tell

PROBE_ROWS, PROBE_TOKENS = 4, 256
# One rounding in each of N modules, independent, adds up as sqrt(N); the largest of many logits lies some 4 to 5
# standard deviations out.
ROUNDING_FACTOR = 4.0
# A process started inside `accelerate launch` would otherwise believe to be one of its ranks.
_LAUNCHER = ("ACCELERATE_", "RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_")


def verify_saved(
    model: nn.Module,
    sequences: Sequence[Sequence[int]],
    base: str,
    selection: Path | None,
    directory: Path,
    first: bool = True,
) -> dict[str, Any]:
    """Compare the adapter saved in `directory` with the `PeftModel` it was saved from; prints one line per check.

    Args and returns as `compare_saved`.

    Raises:
        VerificationError: a check failed, or the fresh process did.
    """
    result = compare_saved(model, sequences, base, selection, directory, first)
    for line in describe(result) if first else ():
        tell(line)
    failed = [name for name, passed in result["passed"].items() if not passed] if first else []
    if failed:
        raise VerificationError(f"verification failed: {', '.join(failed)}; do not use the files in {directory}")
    return result


def compare_saved(
    model: nn.Module,
    sequences: Sequence[Sequence[int]],
    base: str,
    selection: Path | None,
    directory: Path,
    first: bool = True,
) -> dict[str, Any]:
    """Measure how the adapter saved in `directory` differs from the `PeftModel` it was saved from.

    Args:
        model: the trained model, in memory.
        sequences: token ids of a few texts, at least one.
        base: name or directory of the base model.
        selection: the selection file of the run; None for an adapter whose run is not at hand.
        directory: where the adapter lies.
        first: whether this is the process that compares; the others run the model with it, which may be sharded.

    Returns:
        The measured numbers, for the metrics; nothing in other processes than the first.

    Raises:
        VerificationError: the fresh process failed.
    """
    inner = model.get_base_model()
    # A head of classes over a decoder reads the last token that is no padding.
    padding = inner.config.get_text_config().pad_token_id or 0
    ids, mask = _pad([list(ids)[:PROBE_TOKENS] for ids in sequences[:PROBE_ROWS]], padding)
    record = quantization_of(inner)
    settings = {
        "base": base,
        "task_type": model.peft_config[model.active_adapter].task_type or Head.task_type,
        "labels": list(inner.config.id2label.values()),
        "padding": padding,
        "quantization": record,
        "dtype": record["dtype"] if record else str(inner.dtype).removeprefix("torch."),
        "device": str(inner.device),
        "threads": torch.get_num_threads(),
        "precision": torch.get_float32_matmul_precision(),
        "selection": None if selection is None else str(selection),
        "adapter": str(directory),
    }
    training = model.training
    model.eval()
    probe = {"input_ids": ids, "attention_mask": mask, "logits": _logits(inner, ids, mask)}
    model.train(training)
    if not first:
        return {}
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "probe.safetensors"
        save_file(probe, file, metadata={"settings": json.dumps(settings)})
        done = subprocess.run(
            [sys.executable, "-m", __spec__.name, str(file)],
            capture_output=True,
            text=True,
            env=_environment(),
            check=False,
        )
    if done.returncode != 0:
        raise VerificationError(
            "the saved adapter could not be read back in a fresh process:\n"
            + "\n".join(done.stderr.strip().splitlines()[-15:])
        )
    return json.loads(done.stdout.splitlines()[-1])


def describe(result: dict[str, Any]) -> list[str]:
    """One line per check."""
    passed = {name: "verified" if ok else "FAILED" for name, ok in result["passed"].items()}
    return [
        f"{passed['reload']}: read back in a fresh process, logits of {result['rows']} rows equal those in memory "
        f"(largest difference {result['reload_difference']:g})",
        f"{passed['blocks']}: the {result['blocks']:,} blocks of the adapter are "
        + ("those of the selection file" if result["selected"] else "sorted, unique and within their weights"),
        f"{passed['weights']}: merged weights are base + delta, rounded once, "
        + (f"in {result['low_rank']} matrices with low-rank pairs" if result["low_rank"] else "in those blocks")
        + "; the other "
        + f"{result['untouched_weights']:,} weights equal the base bit for bit",
        f"{passed['merged']}: merged logits differ from the adapter's by {result['merged_difference']:.2g} at most "
        f"(rounding in {result['dtype']} allows {result['merged_tolerance']:.2g})",
    ]


def _pad(rows: list[list[int]], padding: int) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows))
    ids = torch.tensor([row + [padding] * (longest - len(row)) for row in rows])
    return ids, torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])


@torch.no_grad()
def _logits(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits of the real tokens, `(tokens, vocabulary)`, or those of a classifier, `(rows, classes)`; on the CPU."""
    device = model.device
    logits = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits.cpu()
    return (logits if logits.ndim == 2 else logits[mask.bool()]).contiguous()


def largest_move(plain: nn.Module, adapted: nn.Module, sequences: Sequence[Sequence[int]]) -> float:
    """How far the logits of a merged model lie from those of the `PeftModel` it was merged from, at most."""
    inner = adapted.get_base_model()
    ids, mask = _pad([list(ids) for ids in sequences], inner.config.get_text_config().pad_token_id or 0)
    expected = _by_overlay(adapted, ids, mask) if quantization_of(inner) else _logits(inner, ids, mask)
    return (_logits(plain, ids, mask).double() - expected.double()).abs().max().item()


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_LAUNCHER)}
    return {**kept, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}


def check(probe: dict[str, Tensor], settings: dict[str, Any]) -> dict[str, Any]:
    """The checks themselves, in the fresh process."""
    from peft import PeftModel

    base = _load(settings, settings["device"])
    model = PeftModel.from_pretrained(base, settings["adapter"]).eval()
    ids, mask, expected = probe["input_ids"], probe["attention_mask"], probe["logits"]
    own = _logits(base, ids, mask)
    selection = BlockSelection.load(settings["selection"]) if settings["selection"] else None
    dtype, unmerged = getattr(torch, settings["dtype"]), own
    before, plain = _load(settings, "cpu"), []
    if settings["quantization"]:
        # Merging leaves the floats that were trained; packing them again would round.
        unmerged = _by_overlay(model, ids, mask)
        dequantise_(before)
        base = _load(settings, settings["device"])
        plain = dequantise_(base)
        model = PeftModel.from_pretrained(base, settings["adapter"]).eval()
    # Of plain layers, whose weights have their shapes.
    layouts, deltas, low_rank, in_full = _read_adapter(Path(settings["adapter"]), selection, before)
    merged_model = model.merge_and_unload()
    weights_ok, untouched = _compare_weights(merged_model, before, layouts, deltas, low_rank, in_full)
    round_to(plain, dtype)
    merged = _logits(merged_model, ids, mask)
    difference = (merged.double() - unmerged.double()).abs().max().item()
    tolerance = ROUNDING_FACTOR * math.sqrt(len(layouts)) * torch.finfo(dtype).eps * own.abs().max().item()
    return {
        "passed": {
            "reload": torch.equal(own, expected),
            "blocks": bool(layouts),
            "weights": weights_ok,
            "merged": difference <= tolerance,
        },
        "rows": len(ids),
        "reload_difference": (own.double() - expected.double()).abs().max().item(),
        "blocks": sum(map(len, layouts.values())),
        "selected": selection is not None,
        "low_rank": len(low_rank),
        "untouched_weights": untouched,
        "merged_difference": difference,
        "merged_tolerance": tolerance,
        "dtype": settings["dtype"],
    }


def _load(settings: dict[str, Any], device: str) -> PreTrainedModel:
    record = settings["quantization"]
    quantization = quantization_config(record)[0] if record else None
    head = Head(settings["task_type"], tuple(settings["labels"]) if settings["task_type"] == "SEQ_CLS" else ())
    model = load_model(settings["base"], settings["dtype"], device, quantization, head)
    if settings["task_type"] == "SEQ_CLS":
        model.config.get_text_config().pad_token_id = settings["padding"]
    return model


def _by_overlay(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits by the dequantised weights, as in training; in evaluation the library's kernels round otherwise."""
    for layer in model.modules():
        if isinstance(layer, QuantisedLinear):
            layer.smt_forward = dict.fromkeys(layer.smt_forward, "overlay")
    return _logits(model.get_base_model(), ids, mask)


def _read_adapter(
    directory: Path, selection: BlockSelection | None, base: nn.Module
) -> tuple[dict[str, BlockLayout], dict[str, Tensor], dict[str, Tensor], tuple[str, ...]]:
    """Layouts and deltas as the file holds them, none when its blocks are not those of the selection; what low-rank
    pairs add, fp64; and the names of tensors that are no blocks: of modules and token embeddings trained besides."""
    adapter = SavedAdapter.open(directory)
    read = {name: adapter.blocks(name, target_of(base, name).shape) for name in adapter.modules}
    layouts = {name: layout for name, (layout, _) in read.items()}
    if selection is not None and not _same_blocks(layouts, selection):
        return {}, {}, {}, tuple(adapter.besides)
    pairs = {name: adapter.low_rank(name, layout.grid.shape) for name, layout in layouts.items()}
    low_rank = {name: _product(*pair) * adapter.config.low_rank_scaling for name, pair in pairs.items() if pair}
    return layouts, {name: delta for name, (_, delta) in read.items()}, low_rank, tuple(adapter.besides)


def _product(lora_A: Tensor, lora_B: Tensor) -> Tensor:
    return sum(column[:, None] * row for column, row in zip(lora_B.double().t(), lora_A.double(), strict=True))


def _same_blocks(layouts: dict[str, BlockLayout], selection: BlockSelection) -> bool:
    return layouts.keys() == selection.blocks.keys() and all(
        torch.equal(layout.blocks, selection.blocks[name]) and layout.grid == selection.grids[name]
        for name, layout in layouts.items()
    )


def _compare_weights(
    merged: nn.Module,
    base: nn.Module,
    layouts: dict[str, BlockLayout],
    deltas: dict[str, Tensor],
    low_rank: dict[str, Tensor],
    in_full: tuple[str, ...],
) -> tuple[bool, int]:
    """Whether merged == base + delta rounded once inside the blocks, == base outside; and how many lie outside.

    With a low-rank pair nothing of a matrix lies outside.
    Modules that a tensor of `in_full` belongs to are passed over: they were trained besides the blocks.
    """
    from transformers.pytorch_utils import Conv1D

    after = dict(merged.named_parameters())
    same, untouched = True, 0
    for name, before in base.named_parameters():
        # A bare parameter has blocks of its own, `experts.down_proj`.
        module = name if name in layouts else name.removesuffix(".weight")
        if any(key.startswith(name.rpartition(".")[0] + ".") for key in in_full):
            continue
        expected = before.detach()
        if module in layouts:
            transposed = module != name and isinstance(base.get_submodule(module), Conv1D)
            expected = expected.t() if transposed else expected
            expected = _merged_by_hand(expected, layouts[module], deltas[module], low_rank.get(module))
            expected = expected.t() if transposed else expected
            untouched -= before.numel() if module in low_rank else layouts[module].effective_numel
        untouched += before.numel()
        same = same and torch.equal(after[name].detach().cpu(), expected)
    return same, untouched


def _merged_by_hand(weight: Tensor, layout: BlockLayout, delta: Tensor, low_rank: Tensor | None) -> Tensor:
    row_Br, col_Bc = layout.lines()
    inside = layout.padding_mask()
    rows, cols = (line.expand(inside.shape)[inside] for line in (row_Br[:, :, None], col_Bc[:, None, :]))
    if low_rank is not None:
        low_rank[rows, cols] += delta[inside].double()
        return (weight.float() + low_rank.float()).to(weight.dtype)
    merged = weight.clone(memory_format=torch.contiguous_format)
    # Experts are stored in three dimensions and are one matrix above the other to the layout.
    matrix = merged.view(layout.grid.shape)
    matrix[rows, cols] = (matrix[rows, cols].float() + delta[inside].float()).to(weight.dtype)
    return merged


def main(argv: Sequence[str]) -> None:
    import smt_peft  # noqa: F401  registers the tuner type

    with safe_open(argv[0], framework="pt") as file:
        settings = json.loads(file.metadata()["settings"])
        probe = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no iterator of its own)
    torch.set_num_threads(settings["threads"])
    torch.set_float32_matmul_precision(settings["precision"])
    print(json.dumps(check(probe, settings)))


if __name__ == "__main__":
    main(sys.argv[1:])
