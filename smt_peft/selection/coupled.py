"""Choosing channels that several matrices share, in place of blocks of each; see `bases.couplings`.

A channel's score is the mean over all its weights, in every matrix that trains; its cost is their number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from ..bases.couplings import Coupling, Member
from ..bases.target import Target
from ..config import SMTConfig
from ..say import say
from .budget import _exact, _groups, module_seed
from .spread import fit


def choose_coupled(scores: Mapping[str, Tensor], targets: Mapping[str, Target], config: SMTConfig) -> dict[str, Tensor]:
    """The best channels within the budget, as blocks of every matrix that shares them.

    Args:
        scores: per module the score of each block, `(R, C)`, finite; empty: channels are drawn at random.
        targets: as from `find_targets`; those without a coupling are passed over.
        config: its `density`, `density_pattern`, `budget` and `seed` decide. A scope whose budget is below one channel
            takes one.

    Returns:
        Per module its blocks, int32 `(B, 2)`, sorted.

    Raises:
        ValueError: an entry of `density_pattern` is the first to match no matrix that reads channels.
    """
    couplings = {each.coupling.name: each.coupling for each in targets.values() if each.coupling is not None}
    chosen: dict[str, Tensor] = {}
    raised = []
    for label, density, names in _scopes(couplings, config):
        group = [couplings[name] for name in names]
        cost = np.concatenate([np.full(each.channels, _cost(each, targets)) for each in group])
        score = np.concatenate([_channel_scores(each, scores, targets, config) for each in group])
        order = np.argsort(-score, kind="stable")
        taken = np.zeros(len(order), dtype=bool)
        taken[order[fit(cost[order], math.floor(_exact(density) * int(cost.sum())))[0]]] = True
        if not taken.any():
            taken[order[0]] = True
            raised.append(label)
        for each, mask in zip(group, np.split(taken, np.cumsum([each.channels for each in group])[:-1]), strict=True):
            if mask.any():
                chosen[each.name] = torch.from_numpy(np.nonzero(mask)[0])
    if raised:
        others = f", and {len(raised) - 1} more" if len(raised) > 1 else ""
        say(f"the budget is below one channel in {raised[0]}{others}; one is taken there")
    return _as_blocks(chosen, targets)


def _scopes(couplings: Mapping[str, Coupling], config: SMTConfig) -> list[tuple[str, float, list[str]]]:
    """Who shares a budget: what it is called, its density, and the couplings' names."""
    keys = {name: config.density_key(name) for name in couplings}
    for pattern in config.density_pattern or ():
        if pattern not in keys.values():
            raise ValueError(
                f"density_pattern[{pattern!r}] is the first to match none of the {len(keys)} modules that read coupled "
                f"channels, such as {', '.join(list(keys)[-3:])}; it goes by these, as rows follow their columns. "
                "Change the pattern or its place, or take the entry out"
            )
    scopes = []
    for label, names in _groups(list(couplings), config.budget).items():
        for key in dict.fromkeys(keys[name] for name in names):
            density = config.density if key is None else config.density_pattern[key]
            scopes.append((label, density, [name for name in names if keys[name] == key]))
    return scopes


def _channel_scores(
    coupling: Coupling, scores: Mapping[str, Tensor], targets: Mapping[str, Target], config: SMTConfig
) -> np.ndarray:
    """The mean score of the weights of each channel, float64."""
    if not scores:
        generator = torch.Generator().manual_seed(module_seed(config.seed, coupling.name))
        return torch.rand(coupling.channels, generator=generator, dtype=torch.float64).numpy()
    channels = torch.arange(coupling.channels)
    total = sum(
        scores[member.name].double().flatten()[member.stripes(channels)] * _size(member, targets)
        for member in coupling.members
    )
    return (total / _cost(coupling, targets)).numpy()


def _cost(coupling: Coupling, targets: Mapping[str, Target]) -> int:
    """Weights of a channel."""
    return sum(_size(member, targets) for member in coupling.members)


def _size(member: Member, targets: Mapping[str, Target]) -> int:
    rows, cols = targets[member.name].shape
    return member.width * (cols if member.by_rows else rows)


def _as_blocks(chosen: Mapping[str, Tensor], targets: Mapping[str, Target]) -> dict[str, Tensor]:
    blocks = {}
    for name, target in targets.items():
        if target.coupling is not None and target.coupling.name in chosen:
            channels = chosen[target.coupling.name]
            stripes = torch.cat([member.stripes(channels) for member in target.coupling.of(name)])
            lines = torch.stack((stripes.sort()[0], torch.zeros_like(stripes)), dim=1).to(torch.int32)
            blocks[name] = lines if target.coupling.of(name)[0].by_rows else lines.flip(1)
    return blocks
