"""Drop and regrow: blocks that moved least give way to others that gradients ask for (SpIEL)."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..optim import SMTAdamW
from ..selection.avoid import avoided_selections, touched_blocks
from ..selection.replacement import regrown
from ..selection.scores import GradientScore
from ..selection.taps import TrainingTaps
from ..tuner.delta import SMTBlocks
from ..tuner.layer import SMTLayer
from ..tuner.linear import Linear
from .moments import check_held
from .schedule import Schedule, check_share, check_whole
from .trained import trained_blocks

Dropped = Literal["revert", "keep"]
# Those that keep no more than a number for each block, and read no weight.
RegrowthScore = Literal["grad_abs", "grad_sq", "mean_abs"]


@dataclass
class Regrowth(Schedule):
    """Every so many updates the blocks whose delta moved least give way to new ones (SpIEL: Ansell et al., arXiv
    2401.16405).

    A module keeps its number of blocks. A share of them, those with the smallest mean |delta|, is dropped; the blocks
    with the best scores among all that are left take their places, spread as the adapter's `spread` says. A dropped
    block that is among the best stays as it was. New blocks begin with fresh moments and a count of steps of their own,
    which takes `SMTAdamW`. The share falls linearly to 0 over the training.

    Args:
        every: updates from one reselection to the next.
        share: of each module's blocks that is dropped at first.
        score_steps: how many updates before a reselection gather scores.
        score: of a candidate, from the gradients of these updates: `"grad_abs"`, `"grad_sq"` or `"mean_abs"`.
        dropped: what becomes of the delta of a dropped block: `"revert"`, the weights are the base's again; `"keep"`,
            it goes on acting and is saved, trains no longer, and goes on from there if it is chosen again.
    """

    name: ClassVar[str] = "regrowth"
    decides_what_trains: ClassVar[bool] = True
    uncounted: ClassVar[str] = "regrowth: a step that gathers no scores; those that do keep the inputs of layers whole"

    every: int = 20
    share: float = 0.2
    score_steps: int = 5
    score: RegrowthScore = "grad_abs"
    dropped: Dropped = "revert"

    def __post_init__(self):
        check_whole(self, every=1, score_steps=1)
        if self.score_steps > self.every:
            raise ValueError(f"score_steps={self.score_steps} do not fit between two reselections, every={self.every}")
        check_share(self, 1)
        for name, kinds in (("score", RegrowthScore), ("dropped", Dropped)):
            if getattr(self, name) not in get_args(kinds):
                raise ValueError(f"{name} must be {' or '.join(get_args(kinds))}, got {getattr(self, name)!r}")
        self._taps: TrainingTaps | None = None
        self._installed = ExitStack()

    def check_arguments(self, args: Any) -> None:
        if getattr(args, "torch_compile", False):
            raise ValueError(
                "regrowth watches layers that torch_compile has compiled without it; leave one of them out"
            )
        if self.dropped == "keep" and getattr(args, "load_best_model_at_end", False):
            raise ValueError(
                "load_best_model_at_end reads the adapter of a checkpoint, without the blocks that dropped='keep' has "
                "retired; leave it out, or take dropped='revert'"
            )

    def begin(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        total_steps: int,
        state: dict[str, Any] | None = None,
    ) -> None:
        # Of a training that an error has cut off.
        self._unwatch()
        self._blocks = trained_blocks(model)
        self._layers = _layers_of(model, self._blocks)
        self._optimizer = _checked(getattr(optimizer, "optimizer", optimizer), self._blocks)
        config = _config_of(model, self._layers, self._blocks)
        check_movable(config)
        self._spread, self._closed = config.spread, _closed(self._blocks, config)
        self._total, self._replaced = total_steps, 0
        for blocks in self._blocks.values():
            self._optimizer.count_by_block(blocks.weight)
        if state is not None:
            self._load(state)
        self._watch(0 if state is None else state["step"], None if state is None else state["scores"])

    def after_update(self, step: int) -> None:
        if self._taps is not None:
            self._gather()
            if step % self.every == 0:
                self._reselect(step)
        self._watch(step)

    def end(self) -> None:
        self._unwatch()
        for blocks in self._blocks.values():
            blocks.take_in_retired()
        self._release()

    def state_dict(self) -> dict[str, Any]:
        retired = {name: blocks.retired for name, blocks in self._blocks.items() if blocks.retired is not None}
        return {
            "step": self._step,
            "replaced": self._replaced,
            "retired": {name: {"index": part.index, "weight": part.weight.detach()} for name, part in retired.items()},
            "closed": {name: torch.from_numpy(closed) for name, closed in self._closed.items()},
            "scores": {} if self._taps is None else {n: score.sums for n, score in self._taps.scores.items()},
        }

    def finish(self, model: nn.Module, state: dict[str, Any]) -> None:
        self._blocks = trained_blocks(model)
        self._retire(state["retired"])
        for blocks in self._blocks.values():
            blocks.take_in_retired()
        self._release()

    @property
    def replaced(self) -> int:
        """How many blocks have given way so far."""
        return self._replaced

    def _load(self, state: dict[str, Any]) -> None:
        self._replaced = state["replaced"]
        self._closed = {name: closed.numpy() for name, closed in state["closed"].items()}
        self._retire(state["retired"])

    def _retire(self, retired: dict[str, dict[str, Tensor]]) -> None:
        """Let these be the retired blocks, and not those that a training has left which went further."""
        for name, blocks in self._blocks.items():
            part = retired.get(name, {"index": blocks.index[:0], "weight": blocks.weight[:0]})
            blocks.retire(*(part[key].to(blocks.index.device) for key in ("index", "weight")))

    def _release(self) -> None:
        self._blocks, self._layers, self._closed, self._optimizer = {}, {}, {}, None

    def _watch(self, step: int, sums: dict[str, Tensor] | None = None) -> None:
        """Update `step` is done: gather scores from the next one on, or go on, or leave it."""
        self._step = step
        coming = (step // self.every + 1) * self.every
        if step < coming - self.score_steps or not self._any_gives_way(coming):
            self._unwatch()
            return
        if self._taps is not None:
            self._leave_to_first()
            return
        scores = {n: GradientScore(n, blocks.weight, blocks.grid, self.score) for n, blocks in self._blocks.items()}
        for name, saved in (sums or {}).items():
            scores[name].sums.copy_(saved)
        self._taps = TrainingTaps(self._layers, scores)
        self._installed.enter_context(self._taps.installed())
        self._leave_to_first()

    def _gather(self) -> None:
        """Sum the scores over all processes: after every update, so that a checkpoint holds those of all."""
        if _several_processes():
            sums = [score.state() for score in self._taps.scores.values()]
            for message in [dist.all_reduce(each, async_op=True) for each in sums]:
                message.wait()

    def _leave_to_first(self) -> None:
        """What was gathered stays in the first process alone, so that it is summed once."""
        if _several_processes() and dist.get_rank():
            for score in self._taps.scores.values():
                score.state().zero_()

    def _unwatch(self) -> None:
        self._installed.close()
        self._taps = None

    def _any_gives_way(self, step: int) -> bool:
        return any(self._count(blocks, step) for blocks in self._blocks.values())

    def _count(self, blocks: SMTBlocks, step: int) -> int:
        """How many blocks of a module are dropped after update `step`."""
        return int(len(blocks.index) * self.share * (1 - step / self._total)) if step < self._total else 0

    def _reselect(self, step: int) -> None:
        scores = {name: score.finish(1) for name, score in self._taps.scores.items()}
        # Seen and left out is another matter, as a loss scale that is still too high overflows at first.
        if not self._taps.reached:
            raise RuntimeError(
                f"regrowth saw no gradient of any of its {len(scores)} modules in {self.score_steps} updates, as when "
                "the model was compiled before; leave torch_compile out, or regrowth"
            )
        self._unwatch()
        for name, blocks in self._blocks.items():
            # A module that no gradient has reached gives nothing to choose by.
            if (count := self._count(blocks, step)) and bool(scores[name].any()):
                self._replace(name, blocks, scores[name], count)

    def _replace(self, name: str, blocks: SMTBlocks, score: Tensor, count: int) -> None:
        grid = blocks.grid
        old = grid.flatten(blocks.index)
        held = torch.ones(len(old), dtype=torch.bool, device=old.device)
        held[least_moved(blocks, count)] = False
        held_RC = np.zeros(grid.num_blocks, dtype=bool)
        held_RC[old[held].cpu().numpy()] = True
        held_RC = held_RC.reshape(grid.stripes)
        new_RC = regrown(score.double().numpy(), held_RC, count, self._spread, self._closed.get(name))
        new = torch.from_numpy(np.flatnonzero(held_RC | new_RC)).to(old.device)
        places = torch.searchsorted(old, new).clamp(max=len(old) - 1)
        sources = torch.where(old[places] == new, places, -1)
        self._replaced += int((sources < 0).sum())
        _move(blocks, self._optimizer, grid.unflatten(new), sources, keep=self.dropped == "keep")


def least_moved(blocks: SMTBlocks, count: int) -> Tensor:
    """Numbers of the `count` blocks with the smallest mean |delta|, int64; padding does not count."""
    sizes = blocks.grid.effective_sizes().to(blocks.index.device)
    sums = blocks.weight.detach().abs().sum(dim=(1, 2), dtype=torch.float64)
    means = sums / sizes[blocks.index[:, 0].long(), blocks.index[:, 1].long()]
    return torch.argsort(means, stable=True)[:count]


def _move(blocks: SMTBlocks, optimizer: SMTAdamW, index: Tensor, sources: Tensor, keep: bool) -> None:
    """Put blocks to other places, their moments with them; what leaves is retired, or let go."""
    before, values = blocks.index.clone(), blocks.weight.detach().clone()
    blocks.rearrange(index, sources)
    optimizer.move_blocks(blocks.weight, sources)
    if not keep:
        return
    grid = blocks.grid
    places, values = [grid.flatten(before)], [values]
    if blocks.retired is not None:
        places.append(grid.flatten(blocks.retired.index))
        values.append(blocks.retired.weight)
    places, order = torch.cat(places).sort()
    values, chosen = torch.cat(values)[order], grid.flatten(index)
    back = torch.isin(chosen, places) & (sources < 0)
    with torch.no_grad():
        blocks.weight[back] = values[torch.searchsorted(places, chosen[back])]
    gone = ~torch.isin(places, chosen)
    blocks.retire(grid.unflatten(places[gone]), values[gone])


def _layers_of(model: nn.Module, blocks: dict[str, SMTBlocks]) -> dict[str, nn.Module]:
    """The layers of these blocks, by name.

    Raises:
        ValueError: one is no linear layer, or its blocks are sharded; names it.
    """
    layers = {m.smt_name: m for m in model.modules() if isinstance(m, SMTLayer) and m.smt_name in blocks}
    for name, layer in layers.items():
        if not isinstance(layer, Linear):
            raise ValueError(
                f"{name}: regrowth moves blocks of linear layers, and this is {type(layer).__name__}; leave it out of "
                "target_modules or target_parameters, or leave regrowth out"
            )
        if type(blocks[name].weight) is not nn.Parameter or hasattr(blocks[name].weight, "ds_id"):
            raise ValueError(f"{name}: its blocks are sharded, so regrowth cannot move them; leave FSDP or ZeRO-3 out")
    return layers


def _config_of(model: nn.Module, layers: dict[str, nn.Module], blocks: dict[str, SMTBlocks]) -> Any:
    """The settings of the adapter that these blocks are of."""
    name, layer = next(iter(layers.items()))
    return model.peft_config[next(adapter for adapter, own in layer.smt_blocks.items() if own is blocks[name])]


def _checked(optimizer: torch.optim.Optimizer, blocks: dict[str, SMTBlocks]) -> SMTAdamW:
    """The optimizer itself, if it can count steps by block.

    Raises:
        ValueError: it cannot, or does not train the blocks.
    """
    if not isinstance(optimizer, SMTAdamW):
        raise ValueError(
            f"regrowth gives new blocks a count of steps of their own, which {type(optimizer).__name__} cannot; use "
            "SMTAdamW (optim: smt_adamw)"
        )
    check_held(optimizer, {name: module.weight for name, module in blocks.items()})
    return optimizer


def check_movable(config: Any) -> None:
    """Raise `ValueError` where the blocks that a config chooses belong together in more than one matrix."""
    if coupled := getattr(config, "coupled", None):
        raise ValueError(
            f"coupled={coupled!r} chooses channels that several matrices share, which regrowth would tear apart; leave "
            "one of them out"
        )


def _closed(blocks: dict[str, SMTBlocks], config: Any) -> dict[str, np.ndarray]:
    """Per module the blocks that may not be chosen, bool `(R, C)`: those to avoid, and what the config's caps close.

    What the caps left is no longer known; blocks within the columns, and for a cap of the rank also the rows, that the
    selection touches keep them.
    """
    closed = touched_blocks(avoided_selections(config), {name: module.grid for name, module in blocks.items()})
    if config.max_column_share is None and config.max_lora_rank is None:
        return closed
    for name, module in blocks.items():
        open_RC = np.zeros(module.grid.stripes, dtype=bool)
        rows, cols = module.index.cpu().numpy().T
        open_RC[:, cols] = True
        if config.max_lora_rank is not None:
            touched = np.zeros_like(open_RC)
            touched[rows] = True
            open_RC &= touched
        closed[name] = closed.get(name, False) | ~open_RC
    return closed


def _several_processes() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
