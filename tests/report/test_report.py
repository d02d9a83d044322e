"""The closing table and the picture show what the selection holds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from smt_peft.blocks import BlockGrid, BlockSelection
from smt_peft.report.picture import draw_selection, selection_figure
from smt_peft.report.places import places
from smt_peft.report.shade import MAX_CELLS
from smt_peft.report.table import by_kind, by_layer, report, results, table


@pytest.fixture
def selection() -> BlockSelection:
    """Two layers of two kinds; one matrix without a block; ragged edges."""
    grids = {f"model.layers.{layer}.{kind}": BlockGrid(10, 20, 4, 4) for layer in range(2) for kind in ("q", "mlp.up")}
    blocks = {"model.layers.0.q": [[0, 0], [2, 4]], "model.layers.0.mlp.up": [[1, 1]], "model.layers.1.q": [[0, 3]]}
    tensors = {name: torch.tensor(value, dtype=torch.int32) for name, value in blocks.items()}
    return BlockSelection(tensors, grids, {name: torch.rand(3, 5) for name in grids})


def test_places_are_read_from_the_names(selection):
    found = places(selection)
    assert [(place.layer, place.kind) for place in found] == [(0, "q"), (0, "up"), (1, "q"), (1, "up")]
    # The block in the lower right corner has 2 rows of the weight.
    assert found[0].share == (16 + 2 * 4) / 200
    assert found[3].share == found[3].blocks == 0


def test_kinds_stay_apart_when_their_last_names_agree():
    grids = {
        "layers.0.self.proj": BlockGrid(8, 8, 4, 4),
        "layers.0.cross.proj": BlockGrid(8, 8, 4, 4),
        "head": BlockGrid(8, 8, 4, 4),
    }
    selection = BlockSelection({"head": torch.tensor([[0, 0]], dtype=torch.int32)}, grids)
    assert [place.kind for place in places(selection)] == ["self.proj", "cross.proj", "head"]
    assert places(selection)[2].layer is None


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]


def test_blocks_by_kind_and_layer(selection):
    assert cells(by_kind(selection))[2:] == [
        ["q", "2 of 2", "3", "10.00%", "4 x 4"],
        ["up", "1 of 2", "1", "4.00%", "4 x 4"],
    ]
    assert cells(by_layer(selection))[2:] == [["0", "3", "10.00%"], ["1", "1", "4.00%"]]


def test_results_show_only_what_was_measured():
    metrics = {"before": {"eval_loss": 2.0}, "after": {"eval_loss": 1.0, "seconds": 3.2}, "trainable_parameters": 1234}
    assert cells(results(metrics))[0] == ["model", "eval loss", "trainable parameters", "training seconds"]
    assert cells(results(metrics))[2:] == [["before", "2.0000", "-", "-"], ["SMT", "1.0000", "1,234", "3"]]
    metrics["lora"] = {"rank": 2, "eval_loss": 1.5, "trainable_parameters": 1200, "seconds": 4.0}
    assert cells(results(metrics))[4] == ["LoRA, rank 2", "1.5000", "1,200", "4"]
    metrics["effective_update"] = {"share": 0.5}
    assert [row[3] for row in cells(results(metrics))[2:]] == ["-", "50.0%", "-"]


def test_columns_are_aligned(selection):
    text = report({"before": {}, "after": {}, "trainable_parameters": 5, "seconds": {"training": 2}}, selection)
    for block in text.split("\n\n"):
        lines = block.splitlines()
        if block.startswith("|"):
            assert len({len(line) for line in lines}) == 1
    assert table([["a", "b"], ["long", "1"]]).splitlines()[2] == "| long | 1 |"


def test_the_picture_shows_shares_and_blocks(selection):
    figure = selection_figure(selection)
    heat, *panels = [ax for ax in figure.get_axes() if ax.get_images()]
    shares = heat.get_images()[0].get_array()
    assert np.allclose(shares, [[12, 8], [8, 0]])
    assert [text.get_text() for text in heat.texts] == ["12.0", "8.0", "8.0", "0.0"]
    titles = [ax.get_title() for ax in panels if ax.get_title()]
    assert titles == ["layer 0, q", "layer 0, up"]
    chosen = panels[0].get_images()[-1].get_array()
    assert np.argwhere(~chosen.mask).tolist() == [[0, 0], [2, 4]]


def test_no_block_vanishes_from_a_large_grid(tmp_path):
    grid = BlockGrid(4096, 4096, 4, 4)
    lonely = torch.tensor([[511, 700]], dtype=torch.int32)
    figure = selection_figure(BlockSelection({"layers.0.q": lonely}, {"layers.0.q": grid}))
    panel = next(ax for ax in figure.get_axes() if "q" in ax.get_title() and ax.get_images())
    array = panel.get_images()[-1].get_array()
    assert array.shape == (MAX_CELLS, MAX_CELLS)
    assert 1 <= array.count() <= 4


def test_the_file_is_a_png(selection, tmp_path):
    draw_selection(selection, tmp_path / "sub" / "blocks.png")
    assert (tmp_path / "sub" / "blocks.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((tmp_path / "sub").iterdir())) == 1
