"""The warm-up pass: a few batches through the frozen model, each block scored, the best chosen."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from ..bases.fingerprint import fingerprint
from ..bases.sharded import execution_device, is_offloaded, is_sharded, plain_name, why_absent
from ..bases.target import Target
from ..bases.targets import find_targets
from ..blocks import BlockGrid, BlockSelection
from ..config import SMTConfig
from ..say import say
from .avoid import avoided_blocks
from .budget import choose_blocks
from .coupled import choose_coupled
from .datafree import check_readable, provenance, select_without_data
from .experts import MatrixActivation, joined, matrices, tappable_experts
from .guard import base_of, borrowed
from .scores import ActivationScore, GradientScore
from .tables import TableScore
from .taps import ActivationTaps, GradientTaps

Taps = GradientTaps | ActivationTaps
LossFunction = Callable[[nn.Module, Any], Tensor]
_NONE_LEFT = object()
_FAILED_ELSEWHERE = "the warm-up pass failed in another process, so no blocks were chosen; see its message"
# More did not train better, and each costs 1.3 training steps (tables quality-warmup and cost-warmup, 2026-11).
WARMUP_BATCHES = 16
_DATALOADER = "pass an iterable of batches, such as a torch.utils.data.DataLoader"


@torch.inference_mode(False)
def select_blocks(
    model: nn.Module,
    config: SMTConfig,
    dataloader: Iterable | None = None,
    num_batches: int = WARMUP_BATCHES,
    *,
    loss_fn: LossFunction | None = None,
    accumulator_device: torch.device | str | None = None,
    keep_scores: bool = True,
    progress: bool = True,
) -> BlockSelection:
    """Score every block of the targeted weights on a few batches and choose the best within the budget.

    Forward and backward run on the frozen base model in evaluation mode. Weights, gradients, modes, hooks, random state
    and the config are left as they were, also when something raises. At any time one module's dense weight gradient
    exists at most. It may be called under `torch.no_grad()` and `torch.inference_mode()`. With `torch.distributed`
    initialised, scores are summed over the processes first, so that every one holds the same selection; give each its
    own part of the data. Of a model that is sharded already, all must call this.

    Args:
        model: any model whose targets are `nn.Linear`, `Conv1D` or quantised linear layers; of a `PeftModel`, the
            base is scored, adapters off. It may be wrapped by DDP, sharded by FSDP2, or a DeepSpeed engine.
        config: says which modules, which score and how much.
        dataloader: batches. A mapping is called as `model(**batch)`, a tuple or list as `model(*batch)`; the loss is
            the output itself when it is a scalar, else its `loss`. Not needed for a score without data.
        num_batches: how many batches to use at most.
        loss_fn: `(model, batch) -> scalar`, instead of the above.
        accumulator_device: where `grad_sum_abs` keeps its dense sums; None keeps them with the weights.
        keep_scores: whether the selection carries the scores.
        progress: whether to show a progress bar, where there is a terminal.

    Raises:
        TypeError: the dataloader is not iterable, or a batch is of an unknown kind.
        FileNotFoundError: `config.avoid` names no file.
        ValueError: a model inside FSDP1, no batch, a loss that is no finite scalar or does not depend on the targets,
            scores that are not finite, a budget that cannot be met, a score by weights of packed weights, weights that
            are on the meta device or inference tensors, or a selection to avoid that was made for another model.
        RuntimeError: the model refuses a batch; the message names it.
    """
    if isinstance(num_batches, bool) or not isinstance(num_batches, int) or num_batches < 1:
        raise ValueError(f"num_batches must be a positive int, got {num_batches!r}")
    if any(plain_name(name) != name for name, _ in model.named_modules()):
        raise ValueError(
            "the model is wrapped in FullyShardedDataParallel, which hides its layers; select before it is wrapped, or "
            "shard with FSDP2 (torch.distributed.fsdp.fully_shard)"
        )
    base = base_of(model)
    targets = find_targets(base, config, over_adapters=True)
    if config.needs_data:
        _check_loader(dataloader, config)
        _check_weights(base, targets)
        # An expert's matrix is scored, and its blocks are spread, as a module's would be.
        tapped = matrices(targets)
        grids = {name: target.grid(config) for name, target in tapped.items()}
        # Read, and refused, before the pass.
        blocked = avoided_blocks(config, targets, grids) if config.avoid is not None else None
        taps = make_taps(tapped, grids, config, accumulator_device)
        seen = _warm_up(model, config, taps, dataloader, num_batches, loss_fn, progress)
        scores = _finish(taps, seen)
        record = provenance(config.score_name, config, targets) | seen.record()
        if config.coupled:
            blocks = choose_coupled(scores, tapped, config)
        else:
            blocks = choose_blocks(scores, grids, config, blocked=blocked)
        selection = BlockSelection(blocks, grids, scores if keep_scores else {}, record)
        selection = joined(selection, targets)
    else:
        selection = select_without_data(targets, config, keep_scores=keep_scores)
    selection.provenance["base_fingerprint"] = fingerprint({name: t.evidence for name, t in targets.items()})
    say(f"chose {selection.summary()}")
    return selection


def _warm_up(
    model: nn.Module,
    config: SMTConfig,
    taps: Taps,
    dataloader: Iterable,
    num_batches: int,
    loss_fn: LossFunction | None,
    progress: bool,
) -> _Seen:
    """Run the batches through the borrowed model; an error in one process is raised in all."""
    seen, failure = _Seen(), None
    in_step = _processes() > 1 and is_sharded(model)
    try:
        # The loader is opened inside, so that its shuffling follows the seed and spares the caller's random state.
        with (
            borrowed(model, config.seed, checkpointing=isinstance(taps, GradientTaps)) as base,
            tappable_experts(taps.targets),
            taps.installed(),
            tqdm(
                islice(dataloader, num_batches),
                total=_length(dataloader, num_batches),
                leave=False,
                desc="scoring blocks",
                disable=not progress or None,  # None: unless on a terminal
            ) as batches,
        ):
            _run(base, _in_step(batches) if in_step else batches, taps, loss_fn, seen)
        if seen.batches == 0:
            raise ValueError(f"the dataloader gave no batch to score blocks on; {_DATALOADER} with at least one")
    except Exception as error:
        # The others wait for this process inside the model then, where nothing can be told to them.
        if in_step:
            raise
        failure = error
    failed = _summed(torch.tensor(float(failure is not None)))
    if failure is not None:
        raise failure
    if failed > 0:
        raise RuntimeError(_FAILED_ELSEWHERE)
    if seen.batches < num_batches:
        say(f"the dataloader held {seen.batches} batches, fewer than num_batches={num_batches}; all were used")
    return seen


def _finish(taps: Taps, seen: _Seen) -> dict[str, Tensor]:
    """The scores, over the batches of all processes."""
    seen.batches = int(_summed(torch.tensor(seen.batches)))
    seen.tokens = int(_summed(torch.tensor(seen.tokens)))
    _check_reached(list(taps.targets), taps.reached)
    for score in taps.scores.values():
        _summed(score.state())
    return {name: score.finish(seen.batches) for name, score in taps.scores.items()}


@dataclass
class _Seen:
    """What has gone through the model."""

    batches: int = 0
    tokens: int = 0
    data: Any = field(default_factory=hashlib.sha256)

    def add(self, batch: Any) -> None:
        self.batches += 1
        if isinstance(batch, Mapping) and isinstance(batch.get("input_ids"), Tensor):
            self.tokens += batch["input_ids"].numel()
        for key, tensor in _tensors(batch):
            tensor = tensor.detach().cpu().contiguous()
            self.data.update(f"{key}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
            self.data.update(tensor.reshape(-1).view(torch.uint8).numpy())

    def record(self) -> dict[str, Any]:
        return {"num_batches": self.batches, "num_tokens": self.tokens, "data_fingerprint": self.data.hexdigest()}


def _run(base: nn.Module, batches: Iterable, taps: Taps, loss_fn: LossFunction | None, seen: _Seen) -> None:
    device = next((p.device for p in base.parameters() if not p.is_meta), torch.device("cpu"))
    forward_only = isinstance(taps, ActivationTaps)
    for batch in batches:
        seen.add(batch)
        with torch.set_grad_enabled(not forward_only):
            output = _forward(base, _moved(batch, device), loss_fn, seen.batches)
            if forward_only:
                # Logits that nobody reads are not to lie there while the next batch makes its own.
                del output
                taps.close_batch()
                continue
            loss = _loss(output, batch, seen.batches, given=loss_fn is not None)
            del output
            taps.backward(loss)


def _in_step(batches: Iterable) -> Iterator[Any]:
    """The batches, as long as every process has one: all of them must call a sharded model equally often.

    Raises:
        RuntimeError: another process could not get its batch.
    """
    batches = iter(batches)
    while True:
        batch, failure = None, None
        try:
            batch = next(batches, _NONE_LEFT)
        except Exception as error:
            failure = error
        ended, failed = _summed(torch.tensor([float(batch is _NONE_LEFT), float(failure is not None)])).tolist()
        if failure is not None:
            raise failure
        if failed:
            raise RuntimeError(_FAILED_ELSEWHERE)
        if ended:
            return
        yield batch


def _forward(base: nn.Module, batch: Any, loss_fn: LossFunction | None, number: int) -> Any:
    if loss_fn is None and not isinstance(batch, (Mapping, tuple, list, Tensor)):
        raise TypeError(
            f"batch {number} is a {type(batch).__name__}; a batch must be a mapping, a tuple, a list or a "
            "tensor, or give loss_fn(model, batch)"
        )
    try:
        if loss_fn is not None:
            return loss_fn(base, batch)
        if isinstance(batch, Mapping):
            return base(**batch)
        return base(batch) if isinstance(batch, Tensor) else base(*batch)
    except Exception as error:
        raise RuntimeError(
            f"batch {number}: the model refused it ({type(error).__name__}: {error}); its keys and "
            "shapes must be what model.forward takes, or give loss_fn(model, batch)"
        ) from error


def _loss(output: Any, batch: Any, number: int, given: bool) -> Tensor:
    loss = output
    if not isinstance(output, Tensor):
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        unlabelled = isinstance(batch, Mapping) and "labels" not in batch
        repair = (
            "loss_fn must return a scalar tensor"
            if given
            else "the batch has no 'labels': add them (for a causal language model, a copy of input_ids), or give "
            "loss_fn(model, batch)"
            if unlabelled
            else "give loss_fn(model, batch) -> scalar"
        )
        raise ValueError(f"batch {number}: the model returned no loss; {repair}")
    if loss.numel() != 1:
        raise ValueError(
            f"batch {number}: the loss has shape {tuple(loss.shape)}, but must be a scalar; reduce it, "
            "e.g. with loss_fn=lambda model, batch: ....mean()"
        )
    loss = loss.reshape(())
    if not bool(torch.isfinite(loss)):
        raise ValueError(
            f"batch {number}: the loss is {loss.item()}; look for an empty or broken batch, or run the "
            "model in fp32 or bf16"
        )
    if not loss.requires_grad:
        raise ValueError(
            f"batch {number}: the loss does not depend on any targeted module. Name modules in "
            "target_modules that the loss is computed from, and do not detach in the model or in loss_fn; "
            "with torch.utils.checkpoint in the model's own code, pass use_reentrant=False"
        )
    return loss


def make_taps(
    targets: Mapping[str, Target],
    grids: Mapping[str, BlockGrid],
    config: SMTConfig,
    accumulator_device: torch.device | str | None,
    shapes_only: bool = False,
) -> Taps:
    """What scores each target; `shapes_only`: on the meta device, where weights are not read but for their shape."""
    if config.score == "activation":
        for name, target in targets.items():
            if target.is_table:
                raise ValueError(
                    f"{name}: score='activation' measures the inputs of a linear layer, but those of an embedding are "
                    "token ids; take another score, such as 'grad_abs', or add this module to exclude_modules"
                )
        return ActivationTaps(
            targets,
            {
                name: (ActivationScore if isinstance(target, Target) else MatrixActivation)(
                    name, _weight(target), grids[name]
                )
                for name, target in targets.items()
            },
        )
    if isinstance(config.score, str) and config.score not in GradientScore.NAMES:
        raise ValueError(
            f"score={config.score!r} was read from a file and names a function that cannot be called any "
            "more; set score to the function itself or to a score's name"
        )
    if config.score == "taylor" or callable(config.score):
        for target in targets.values():
            check_readable(target, config.score_name)
            if not shapes_only and (reason := why_absent(target.stored)):
                raise ValueError(
                    f"{target.name}: score={config.score_name!r} reads the weight, which is {reason}; take a score "
                    "that needs no weight values, such as 'grad_abs', or select before the model is sharded"
                )
    scores = {
        name: _gradient_score(target, grids[name], config.score, accumulator_device) for name, target in targets.items()
    }
    sums = [score.dense for score in scores.values() if score.dense is not None]
    if sums:
        size = sum(dense.numel() * dense.element_size() for dense in sums) / 2**20
        say(
            f"score='grad_sum_abs' keeps {size:,.1f} MiB of gradient sums on {sums[0].device}; accumulator_device="
            "'cpu' keeps them off the accelerator, score='mean_abs' needs none"
        )
    return GradientTaps(targets, scores)


def _gradient_score(target: Target, grid: BlockGrid, score: str | Callable, device: Any) -> GradientScore:
    if target.is_table:
        return TableScore(target.module, target.name, _weight(target), grid, score, device)
    return GradientScore(target.name, _weight(target), grid, score, device, target.read)


def _weight(target: Target) -> Tensor:
    """The weight, or in place of one that is offloaded an empty tensor of its dtype, on the device it is used on."""
    if not is_offloaded(target.module):
        return target.weight
    return torch.empty(0, dtype=target.weight.dtype, device=execution_device(target.module))


def _check_reached(names: list[str], reached: set[str]) -> None:
    flags = _summed(torch.tensor([float(name in reached) for name in names]))
    missed = [name for name, flag in zip(names, flags.tolist(), strict=True) if flag == 0]
    if len(missed) == len(names):
        raise ValueError(
            f"none of the {len(names)} targeted modules was reached in any batch ({', '.join(missed[:3])}"
            ", ...); name modules in target_modules that the loss depends on, or call them as modules"
        )
    if missed:
        listed = ", ".join(missed[:5]) + (", ..." if len(missed) > 5 else "")
        warnings.warn(
            f"{len(missed)} of {len(names)} targeted modules were not reached in any batch and score 0: {listed}",
            stacklevel=5,
        )


def _processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _summed(tensor: Tensor) -> Tensor:
    """Sum a tensor over all processes, in place."""
    if _processes() > 1:
        with torch.no_grad():
            on_device = tensor.cuda() if dist.get_backend() == "nccl" else tensor
            dist.all_reduce(on_device)
            tensor.copy_(on_device)
    return tensor


def _check_loader(dataloader: Any, config: SMTConfig) -> None:
    if dataloader is None:
        raise ValueError(
            f"score={config.score_name!r} needs data: {_DATALOADER}, or choose a score without data, such as 'diagonal'"
        )
    if not hasattr(dataloader, "__iter__") and not hasattr(dataloader, "__getitem__"):
        raise TypeError(
            f"the dataloader is a {type(dataloader).__name__}, which cannot be iterated over; {_DATALOADER}"
        )


def _check_weights(base: nn.Module, targets: Mapping[str, Target]) -> None:
    """Raise `ValueError`, naming a weight, when no batch can pass through the model or no gradient come back."""
    # Weights that Accelerate has offloaded are on the meta device between calls, too.
    offloaded = any(hasattr(module, "_hf_hook") for module in base.modules())
    weights = {} if offloaded else dict(base.named_parameters())
    weights |= {f"{name}.weight": t.weight for name, t in targets.items() if not is_offloaded(t.module)}
    meta = [name for name, weight in weights.items() if weight.is_meta]
    if meta:
        raise ValueError(
            f"{meta[0]} is on the meta device ({len(meta)} weights are), so no batch can be scored; load the weights "
            "first (from_pretrained without offloading), or choose a score without data, such as 'diagonal'"
        )
    absent = [name for name, target in targets.items() if why_absent(target.stored) is not None]
    if absent and hasattr(targets[absent[0]].stored, "ds_id") and not base._forward_pre_hooks:
        raise ValueError(
            f"{absent[0]}: the weight is partitioned by DeepSpeed ZeRO-3, and no engine brings it in; pass the engine "
            "that deepspeed.initialize returns, or select on a model loaded without zero.Init and pass the selection on"
        )
    inference = next((name for name, parameter in base.named_parameters() if parameter.is_inference()), None)
    if inference is not None:
        raise ValueError(
            f"{inference} was made under torch.inference_mode(), so no gradient passes through it; build or load the "
            "model outside of it"
        )


def _length(dataloader: Any, num_batches: int) -> int:
    try:
        return min(num_batches, len(dataloader))
    except TypeError:
        return num_batches


def _tensors(batch: Any, key: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(batch, Tensor):
        yield key, batch
    elif isinstance(batch, (Mapping, tuple, list)):
        for name, value in batch.items() if isinstance(batch, Mapping) else enumerate(batch):
            yield from _tensors(value, f"{key}.{name}")


def _moved(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        # Autograd saves no inference tensor, but a copy of one.
        return (batch.clone() if batch.is_inference() else batch).to(device)
    if isinstance(batch, Mapping):
        return {name: _moved(value, device) for name, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_moved(value, device) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(_moved(value, device) for value in batch)
    return batch
