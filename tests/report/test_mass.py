"""Shares of the score are those of a count over every single weight."""

from __future__ import annotations

import pytest
import torch

from smt_peft.blocks import BlockGrid, BlockSelection
from smt_peft.report.mass import mass
from smt_peft.report.words import duration, percent, size


def selection(scores: dict[str, torch.Tensor], **provenance) -> BlockSelection:
    """Ragged at both edges; the chosen ones are not the best."""
    grids = {"layers.0.a": BlockGrid(10, 20, 4, 4), "layers.1.a": BlockGrid(6, 6, 3, 3)}
    blocks = {"layers.0.a": [[0, 0], [2, 4]], "layers.1.a": [[1, 0]]}
    tensors = {name: torch.tensor(value, dtype=torch.int32) for name, value in blocks.items()}
    return BlockSelection(tensors, grids, scores, {"score": "grad_sq", **provenance})


@pytest.fixture
def scores() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"layers.0.a": torch.rand(3, 5, generator=generator), "layers.1.a": torch.rand(2, 2, generator=generator)}


def per_weight(chosen: BlockSelection) -> tuple[torch.Tensor, torch.Tensor]:
    """The score of each weight, and whether it is chosen."""
    values, masks = [], []
    for name, grid in chosen.grids.items():
        rows = torch.arange(grid.rows) // grid.block_rows
        cols = torch.arange(grid.cols) // grid.block_cols
        values.append(chosen.scores[name][rows][:, cols].reshape(-1).double())
        masks.append(chosen.layout(name).mask().reshape(-1))
    return torch.cat(values), torch.cat(masks)


def test_shares_are_those_of_a_count_over_every_weight(scores):
    chosen = selection(scores)
    found = mass(chosen)
    values, mask = per_weight(chosen)
    assert found.budget == mask.double().mean().item() == chosen.density
    assert found.held == pytest.approx((values[mask].sum() / values.sum()).item(), rel=1e-12)
    descending = values.sort(descending=True).values
    cumulative = descending.cumsum(0) / descending.sum()
    for weight, held in found.points:
        # Whole blocks: as many weights as the point says, the best first.
        assert held == pytest.approx(cumulative[round(weight * len(values)) - 1].item(), rel=1e-12)
    assert found.points[-1] == pytest.approx((1.0, 1.0))
    # The best blocks that fit into the budget, and the first with which half is reached.
    fitting = [held for weight, held in found.points if weight <= found.budget + 1e-12]
    assert found.best == pytest.approx(fitting[-1]) and found.best > found.held
    assert found.half == pytest.approx(next(weight for weight, held in found.points if held >= 0.5))
    assert f"hold {percent(found.held)} of the squared gradient" in found.sentence()
    assert found.sentence().endswith(f"in the best-scored {percent(found.half)}.")


def test_what_is_no_share_of_anything_is_not_told(scores):
    assert mass(selection({})) is None
    assert mass(selection({"layers.0.a": scores["layers.0.a"]})) is None
    assert mass(selection(scores, score="random")) is None
    assert mass(selection({name: -score for name, score in scores.items()})) is None
    assert mass(selection({name: 0 * score for name, score in scores.items()})) is None


def test_numbers_as_they_are_read():
    assert [percent(share) for share in (0, 0.0084, 0.00001, 0.123, 0.9994, 0.99999, 1)] == [
        "0%", "0.84%", "1.0e-03%", "12.3%", "99.9%", ">99.9%", "100%"
    ]  # fmt: skip
    assert [size(n) for n in (0, 12, 2048, 3 * 2**30)] == ["0 B", "12 B", "2.0 KiB", "3.0 GiB"]
    assert [duration(s) for s in (3.14, 90, 3725)] == ["3.1 s", "1.5 min", "1 h 02 min"]
