"""BlockGrid, BlockLayout and BlockSelection against indexing in plain PyTorch."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from helpers import layouts, random_layout
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from smt_peft.blocks import BlockGrid, BlockLayout, BlockSelection
from smt_peft.ops import block_gather, block_scatter_, dense


def true_mask(layout: BlockLayout) -> torch.Tensor:
    grid, mask = layout.grid, torch.zeros(layout.grid.shape, dtype=torch.bool)
    for row, col in layout.blocks.tolist():
        mask[
            row * grid.block_rows : (row + 1) * grid.block_rows, col * grid.block_cols : (col + 1) * grid.block_cols
        ] = True
    return mask


@given(layouts())
def test_mask_columns_and_effective_count(layout):
    mask = true_mask(layout)
    assert torch.equal(layout.mask(), mask)
    assert torch.equal(layout.columns.long(), mask.any(dim=0).nonzero().squeeze(1))
    assert layout.effective_numel == mask.sum() == layout.padding_mask().sum()
    assert layout.grid.effective_sizes().sum() == layout.grid.numel


@given(layouts(), st.booleans())
def test_gather_and_scatter_are_exact(layout, transposed):
    weight = torch.randn(layout.grid.shape[::-1]).t() if transposed else torch.randn(layout.grid.shape)
    mask = true_mask(layout)
    blocks = block_gather(weight, layout)
    assert torch.equal(dense(blocks, layout), torch.where(mask, weight, 0))
    assert blocks[~layout.padding_mask()].abs().sum() == 0

    other = torch.randn(layout.grid.shape)
    target = weight.clone()
    block_scatter_(target, block_gather(other, layout), layout)
    assert torch.equal(target, torch.where(mask, other, weight))


def test_scatter_rounds_once_and_refuses_a_strided_matrix():
    layout = random_layout(BlockGrid.fit((8, 8), 4), 2)
    blocks = torch.randn(2, 4, 4, dtype=torch.float64)
    weight = torch.zeros(8, 8, dtype=torch.bfloat16)
    block_scatter_(weight, blocks, layout)
    assert torch.equal(block_gather(weight, layout), blocks.to(torch.bfloat16))
    with pytest.raises(ValueError, match="contiguous"):
        block_scatter_(torch.zeros(16, 16)[::2, ::2], blocks, layout)


@given(layouts())
def test_packed_layout_is_the_same_blocks_over_the_touched_columns(layout):
    weight = torch.randn(layout.grid.shape)
    packed = layout.packed
    assert packed.grid.cols == layout.columns.numel()
    assert torch.equal(packed.mask(), true_mask(layout)[:, layout.columns])
    assert torch.equal(block_gather(weight[:, layout.columns].contiguous(), packed), block_gather(weight, layout))


@pytest.mark.parametrize(
    ("size", "expected"), [(4, (4, 4)), (99, (6, 10)), (-1, (6, 10)), ((-1, 1), (6, 1)), ((1, -1), (1, 10))]
)
def test_fit(size, expected):
    assert BlockGrid.fit((6, 10), size).block_shape == expected


@pytest.mark.parametrize("sides", [(0, 4), (4, -2), (4.0, 4), (True, 4)])
def test_grid_refuses_impossible_sides(sides):
    with pytest.raises(ValueError, match="positive int"):
        BlockGrid(8, 8, *sides)


def selection(seed: int = 0, **provenance) -> BlockSelection:
    grids = {"a": BlockGrid.fit((20, 36), 8), "b": BlockGrid.fit((12, 20), (4, -1)), "c": BlockGrid.fit((8, 8), 4)}
    blocks = {name: random_layout(grids[name], 2, seed).blocks for name in ("a", "b")}
    scores = {"a": torch.rand(grids["a"].stripes)}
    return BlockSelection(blocks, grids, scores, provenance)


def test_selection_counts():
    made = selection()
    mask = sum(int(made.layout(name).mask().sum()) for name in made.blocks)
    assert made.effective_numel == mask
    assert made.density == mask / (20 * 36 + 12 * 20 + 64)
    rows, cols = made.stripe_coverage()
    assert rows == (len(set(made.blocks["a"][:, 0].tolist())) + 2) / (3 + 3 + 2)
    assert cols == (len(set(made.blocks["a"][:, 1].tolist())) + 1) / (5 + 1 + 2)
    assert "in 2 of 3 modules" in made.summary()


@given(st.data())
def test_the_blocks_that_share_a_weight_with_those_of_another_tiling(data):
    theirs = data.draw(layouts(max_side=20))
    sides = st.integers(1, 9)
    grid = BlockGrid.fit(theirs.grid.shape, (data.draw(sides), data.draw(sides)))
    everything = torch.cartesian_prod(torch.arange(grid.row_stripes), torch.arange(grid.col_stripes)).int()
    mask = true_mask(theirs)
    expected = torch.stack([(true_mask(BlockLayout(grid, block[None])) & mask).any() for block in everything])
    touched = grid.touched_by(theirs)
    assert torch.equal(touched.flatten(), expected)
    for block in everything[:: max(1, len(everything) // 4)]:
        assert BlockLayout(grid, block[None]).meets(theirs) == bool(touched[tuple(block.tolist())])


def test_what_a_combination_knows_of_where_it_comes_from():
    one, two = selection(0, base_fingerprint={"a": [1.0], "b": [2.0]}, density=0.1), selection(1)
    assert (one | two).provenance == {"combined": True}
    two.provenance |= {"base_fingerprint": {"b": [2.0], "c": [3.0]}, "experts": {"b": 2}}
    assert (one - two | two).provenance["experts"] == {"b": 2}
    assert (one | two).provenance["base_fingerprint"] == {"a": [1.0], "b": [2.0], "c": [3.0]}
    two.provenance["base_fingerprint"]["b"] = [2.5]
    assert "base_fingerprint" not in (one | two).provenance


def test_the_blocks_in_common_are_counted():
    one, two = selection(0), selection(1)
    sets = [{(n, *b) for n, blocks in s.blocks.items() for b in blocks.tolist()} for s in (one, two)]
    assert one.num_common(two) == len(sets[0] & sets[1]) and one.num_common(one) == one.num_blocks
    coarse = BlockSelection({"a": torch.zeros(1, 2, dtype=torch.int32)}, {"a": BlockGrid.fit((20, 36), (8, 16))})
    with pytest.raises(ValueError, match="a: blocks of .* cannot be counted against each other; make both"):
        one.num_common(coarse)


def test_save_and_load_round_trip(tmp_path):
    made = selection(score="grad_abs", num_batches=3)
    made.save(tmp_path / "deep" / "s.safetensors")
    loaded = BlockSelection.load(tmp_path / "deep" / "s.safetensors")
    assert loaded == made
    assert loaded.grids == made.grids
    assert loaded.provenance == {"score": "grad_abs", "num_batches": 3}
    assert torch.equal(loaded.scores["a"], made.scores["a"])
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["s.safetensors"]
    code = "import sys; from smt_peft import BlockSelection; BlockSelection.load(sys.argv[1]).save(sys.argv[2])"
    files = tmp_path / "deep" / "s.safetensors", tmp_path / "again.safetensors"
    subprocess.run([sys.executable, "-c", code, *map(str, files)], check=True)
    assert files[0].read_bytes() == files[1].read_bytes()


def test_equality_and_set_operations():
    one, two = selection(0), selection(1)
    assert one == selection(0) and one != two and one != "blocks"
    sets = [{(n, *b) for n, blocks in s.blocks.items() for b in blocks.tolist()} for s in (one, two)]
    for combined, expected in ((one | two, sets[0] | sets[1]), (one - two, sets[0] - sets[1])):
        assert {(n, *b) for n, blocks in combined.blocks.items() for b in blocks.tolist()} == expected
    assert (one | two) & one == one
    with pytest.raises(ValueError, match="no block is left"):
        one - one
    other = BlockSelection({"a": torch.zeros(1, 2, dtype=torch.int32)}, {"a": BlockGrid.fit((20, 36), (8, 16))})
    with pytest.raises(ValueError, match="a: the selections tile this module differently"):
        one | other


BAD_BLOCKS = {
    "out of range": (torch.tensor([[0, 9]], dtype=torch.int32), "outside the grid"),
    "negative": (torch.tensor([[-1, 0]], dtype=torch.int32), "outside the grid"),
    "duplicated": (torch.tensor([[0, 1], [0, 1]], dtype=torch.int32), "listed twice"),
    "unsorted": (torch.tensor([[1, 0], [0, 1]], dtype=torch.int32), "not sorted"),
    "dtype": (torch.tensor([[0, 1]]), "must be int32"),
    "float": (torch.tensor([[0.0, 1.0]]), "must be int32"),
    "shape": (torch.tensor([0, 1], dtype=torch.int32), "shape"),
}


@pytest.mark.parametrize("kind", BAD_BLOCKS)
def test_a_damaged_selection_file_is_refused_by_module_name(tmp_path, kind):
    made = selection()
    made.save(tmp_path / "s.safetensors")
    tensors, header = load_file(tmp_path / "s.safetensors"), _metadata(tmp_path / "s.safetensors")
    bad, message = BAD_BLOCKS[kind]
    save_file({**tensors, "blocks:a": bad}, tmp_path / "s.safetensors", header)
    with pytest.raises(ValueError, match=f"a: .*{message}"):
        BlockSelection.load(tmp_path / "s.safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_scores_are_refused(tmp_path, value):
    made = selection()
    made.save(tmp_path / "s.safetensors")
    tensors = load_file(tmp_path / "s.safetensors")
    tensors["scores:a"][0, 0] = value
    save_file(tensors, tmp_path / "s.safetensors", _metadata(tmp_path / "s.safetensors"))
    with pytest.raises(ValueError, match="a: .*not finite"):
        BlockSelection.load(tmp_path / "s.safetensors")


@pytest.mark.parametrize("keep", [0, 4, 60, -10])
def test_a_truncated_selection_file_is_refused(tmp_path, keep):
    path = tmp_path / "s.safetensors"
    selection().save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="truncated"):
        BlockSelection.load(path)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="select_blocks"):
        BlockSelection.load(tmp_path / "none.safetensors")
    save_file({"weight": torch.zeros(2)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="no selection file"):
        BlockSelection.load(tmp_path / "w.safetensors")
    save_file(
        {}, tmp_path / "v.safetensors", {"smt_selection": json.dumps({"format": "smt-selection-1", "grids": {"a": 3}})}
    )
    with pytest.raises(ValueError, match="v.safetensors"):
        BlockSelection.load(tmp_path / "v.safetensors")


def _metadata(path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.metadata()
