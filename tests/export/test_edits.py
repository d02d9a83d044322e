"""Where an element of a parameter lies in the tensors it is stored in."""

from __future__ import annotations

import pytest
import torch

from smt_peft.export.edits import Part

VIEWS = {
    "itself": lambda p: p,
    "one expert": lambda p: p[1],
    "the half of an expert": lambda p: p[2].chunk(2)[1],
    "transposed": lambda p: p[0].t(),
    "transposed within each expert": lambda p: p.transpose(1, 2),
    "the second half of the columns": lambda p: p[1, :, 3:],
    "every other row": lambda p: p[:, ::2],
    "one row": lambda p: p[1, 2:3],
    "one column": lambda p: p[2, :, 5:6],
    "with sides of one": lambda p: p[1][None, :, None],
    "reshaped": lambda p: p.view(3, 2, 2, 6),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_each_element_is_found_where_the_view_has_it(view):
    parameter = torch.arange(3 * 4 * 6).view(3, 4, 6)
    stored = view(parameter)
    part = Part("stored", tuple(stored.shape), stored.stride(), stored.storage_offset())
    flat = torch.arange(parameter.numel())
    inside, place = part.find(flat)
    assert torch.equal(flat[inside].sort().values, stored.reshape(-1).sort().values)
    assert torch.equal(stored.reshape(-1)[place], flat[inside])
    assert torch.equal(part.of(parameter), stored.reshape(-1))
    assert part.last == int(stored.max())
