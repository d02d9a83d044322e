"""Grids of scores and blocks made small enough to draw."""

from __future__ import annotations

import numpy as np
import torch

MAX_CELLS = 160


def shade(score: torch.Tensor) -> np.ndarray:
    """Log scores from 0 (lowest) to 1 (highest), at most `MAX_CELLS` a side."""
    logs = coarse(score.float().cpu()).clamp_min(1e-30).log()
    low, high = torch.quantile(logs, 0.02), logs.max()
    return ((logs - low) / (high - low).clamp_min(1e-12)).clamp(0, 1).numpy()


def coarse(values: torch.Tensor) -> torch.Tensor:
    """At most `MAX_CELLS` a side, each the largest value it stands for, so that no chosen block vanishes."""
    sides = [min(side, MAX_CELLS) for side in values.shape]
    return torch.nn.functional.adaptive_max_pool2d(values[None].float(), sides)[0]
