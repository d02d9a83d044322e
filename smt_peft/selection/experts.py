"""Parameters that hold one matrix per expert: each matrix is scored and chosen from as a module's weight would be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from ..bases.parameters import ParameterTarget
from ..bases.sharded import is_offloaded
from ..bases.stand_in import StandIn, replaced
from ..bases.target import Target
from ..blocks import BlockGrid, BlockSelection
from .guard import _set
from .scores import ActivationScore

TAPPABLE = (None, "eager", "batched_mm", "grouped_mm")
Targets = Mapping[str, Target | ParameterTarget]


def matrices(targets: Targets) -> dict[str, Target | ParameterTarget]:
    """The targets, those of several experts split into one per expert, `experts.down_proj[3]`."""
    return {matrix.name: matrix for target in targets.values() for matrix in target.matrices()}


def joined(selection: BlockSelection, targets: Targets) -> BlockSelection:
    """The inverse for a selection: blocks, grids and scores of experts under the name of their parameter.

    Its provenance says how many matrices lie in each bare parameter, one below the other (`experts`).
    """
    blocks, grids, scores = dict(selection.blocks), dict(selection.grids), dict(selection.scores)
    for name, target in targets.items():
        parts = [matrix.name for matrix in target.matrices()]
        if parts == [name] or parts[0] not in grids:
            continue
        one = grids[parts[0]]
        chosen = [blocks.pop(part, torch.empty(0, 2, dtype=torch.int32)) for part in parts]
        shifted = [part + torch.tensor([e * one.row_stripes, 0], dtype=torch.int32) for e, part in enumerate(chosen)]
        if any(map(len, chosen)):
            blocks[name] = torch.cat(shifted)
        grids = {key: grid for key, grid in grids.items() if key not in parts}
        grids[name] = BlockGrid(len(parts) * one.rows, one.cols, *one.block_shape)
        if parts[0] in scores:
            scores[name] = torch.cat([scores.pop(part) for part in parts])
    bare = {name: target.num_experts for name, target in targets.items() if isinstance(target, ParameterTarget)}
    return BlockSelection(blocks, grids, scores, selection.provenance | ({"experts": bare} if bare else {}))


@contextmanager
def tappable_experts(targets: Targets) -> Iterator[None]:
    """Experts that compute by kernels of their own, past PyTorch's operations, compute eagerly meanwhile."""
    with ExitStack() as stack:
        for target in targets.values():
            config = getattr(target.module, "config", None)
            if getattr(config, "_experts_implementation", None) not in TAPPABLE:
                _set(stack, config, "_experts_implementation_internal", "eager")
        yield


class TappedProducts:
    """Computes with the frozen parameter and shows every product's input and output to a tap.

    Args:
        targets: the parameter's matrices.
        tap: `(name of the matrix, input, output, flipped) -> output`; see `stand_in.Products` for `flipped`.
    """

    def __init__(self, targets: list[ParameterTarget], tap):
        self.names = {target.expert: target.name for target in targets}
        self.name, self.weight, self.tap = targets[0].name.partition("[")[0], targets[0].stored, tap
        if self.weight.is_meta and is_offloaded(targets[0].module):
            raise ValueError(
                f"{self.name} is offloaded, so its products cannot be seen; load the model without offloading, or take "
                "a score without data, such as 'diagonal'"
            )

    def product(self, x: Tensor, expert: int | None, flipped: bool, bias: Tensor | None) -> Tensor:
        weight = self.weight if expert is None else self.weight[expert]
        y = F.linear(x, weight.t() if flipped else weight, bias)
        return self.tap(self.names[expert], x, y, flipped)

    def grouped(self, *_) -> type(NotImplemented):
        # Each expert has a tap of its own.
        return NotImplemented

    def dense(self, operation: str) -> Tensor:
        raise ValueError(
            f"{self.name}: the module computes '{operation}' with the weight, which cannot be scored by gradients or "
            "activations; load the model with experts_implementation='eager', or take a score without data, such as "
            "'magnitude' or 'diagonal'"
        )


@contextmanager
def parameters_tapped(targets: Targets, tap) -> Iterator[None]:
    """While their modules run, the parameters among the targets are replaced by what shows their products to `tap`."""
    owners: dict[int, dict[str, list[ParameterTarget]]] = {}
    for target in targets.values():
        if isinstance(target, ParameterTarget):
            owners.setdefault(id(target.module), {}).setdefault(target.parameter, []).append(target)
    with ExitStack() as stack:
        for parameters in owners.values():
            module = next(iter(parameters.values()))[0].module
            open_calls: list[ExitStack] = []

            def enter(module, args, parameters=parameters, open_calls=open_calls):
                call = ExitStack()
                stand_ins = {name: StandIn(TappedProducts(found, tap)) for name, found in parameters.items()}
                call.enter_context(replaced(module, stand_ins))
                open_calls.append(call)

            def leave(module, args, output, open_calls=open_calls):
                if open_calls:
                    open_calls.pop().close()

            stack.callback(module.register_forward_pre_hook(enter).remove)
            # Also called when the forward raises.
            stack.callback(module.register_forward_hook(leave, always_call=True).remove)
        yield


class MatrixActivation:
    """`ActivationScore` of a matrix of which it shows only in use whether its rows or its columns are the inputs."""

    def __init__(self, name: str, weight: Tensor, grid: BlockGrid):
        self.columns = ActivationScore(name, weight, grid)
        self.rows = ActivationScore(name, weight.t(), grid.transposed)
        self._sums = torch.cat((self.columns.sums, self.rows.sums))
        self.columns.sums, self.rows.sums = self._sums.split([grid.cols, grid.rows])

    def see(self, x: Tensor, flipped: bool) -> None:
        (self.rows if flipped else self.columns).see(x)

    def close_batch(self) -> None:
        self.columns.close_batch()
        self.rows.close_batch()

    def state(self) -> Tensor:
        """What has to be summed over processes before `finish`."""
        return self._sums

    def finish(self, num_batches: int) -> Tensor:
        return self.columns.finish(num_batches) + self.rows.finish(num_batches).t()
