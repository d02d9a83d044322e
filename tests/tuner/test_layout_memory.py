"""What an adapter keeps in memory beside its weights: index tables, to the byte."""

from __future__ import annotations

import pytest
import torch
from helpers import tiny_gpt2
from peft import get_peft_model
from torch import Tensor, nn

from smt_peft import SMTConfig, ops
from smt_peft.blocks import BlockLayout
from smt_peft.ops import native
from smt_peft.tuner.delta import SMTBlocks

needs_native = pytest.mark.skipif(native.available("cpu") is not None, reason="the compiled library is not built")


def storages(*roots: object) -> dict[int, int]:
    """Bytes of every piece of memory that tensors in these objects hold, by address."""
    found: dict[int, int] = {}
    for root in roots:
        if isinstance(root, Tensor):
            found[root.untyped_storage().data_ptr()] = root.untyped_storage().nbytes()
        elif isinstance(root, BlockLayout):
            found |= storages(*vars(root).values())
    return found


def adapted(shape: tuple[int, int], block_size: int, num_blocks: int, **settings) -> tuple[nn.Module, SMTBlocks]:
    """A model of one linear layer, and its blocks."""
    model = nn.Sequential(nn.Linear(shape[1], shape[0], bias=False))
    settings = {"target_modules": ["0"], "score": "random", **settings}
    model = get_peft_model(model, SMTConfig(block_size=block_size, num_blocks=num_blocks, **settings)).train()
    return model, next(module for module in model.modules() if isinstance(module, SMTBlocks))


def stepped(model: nn.Module, blocks: SMTBlocks) -> int:
    """Bytes of all tables after a training step: the saved index, its checked copy, and what is derived from it."""
    # The gradient of the input is asked for too, as in every layer but the first.
    model(torch.randn(5, blocks.grid.cols, requires_grad=True)).square().sum().backward()
    return sum(storages(blocks.index, blocks.layout()).values())


PLAIN, RAGGED = ((64, 128), 8), ((60, 123), 8)


@needs_native
@pytest.mark.parametrize(("shape", "side"), [PLAIN, RAGGED])
def test_compiled_kernels_need_no_table_beside_the_checked_index(shape, side):
    model, blocks = adapted(shape, side, 20)
    assert blocks.layout().num_columns == shape[1]
    assert stepped(model, blocks) == 2 * 8 * len(blocks.index) <= blocks.weight.nbytes / 16


@needs_native
@pytest.mark.parametrize(("shape", "side"), [PLAIN, RAGGED])
def test_an_input_kept_by_columns_costs_their_numbers_and_a_second_index(shape, side):
    model, blocks = adapted(shape, side, 5)
    columns = blocks.layout().num_columns
    assert columns <= 5 * side < 0.75 * shape[1]
    assert stepped(model, blocks) == 3 * 8 * 5 + 4 * columns


@pytest.mark.parametrize(("shape", "side"), [PLAIN, RAGGED])
def test_plain_pytorch_keeps_a_number_per_row_of_a_block_and_nothing_for_ragged_ones(shape, side):
    model, blocks = adapted(shape, side, 20)
    with ops.use_backend("reference"):
        held = stepped(model, blocks)
    segments = 0 if blocks.grid.is_ragged else 8 * side
    assert held == (2 * 8 + segments) * 20


@pytest.mark.parametrize(("shape", "side"), [PLAIN, RAGGED])
def test_the_additive_route_keeps_the_index_of_the_transposed_weight(shape, side):
    model, blocks = adapted(shape, side, 20, forward="additive")
    assert stepped(model, blocks) == 3 * 8 * 20


def test_a_table_that_is_looked_up_keeps_where_its_stripes_start():
    model = get_peft_model(
        tiny_gpt2(), SMTConfig(target_modules=["wte"], score="random", block_size=8, num_blocks=6)
    ).train()
    model(input_ids=torch.arange(12)[None]).logits.sum().backward()
    blocks = next(module for module in model.modules() if isinstance(module, SMTBlocks))
    assert sum(storages(blocks.index, blocks.layout()).values()) == 2 * 8 * 6 + 4 * (blocks.grid.row_stripes + 1)


def test_unmerging_goes_by_the_blocks_that_were_merged_though_others_are_loaded_meanwhile():
    model, blocks = adapted((64, 128), 8, 3, init_weights=False)
    weight = model.base_model.model[0].base_layer.weight
    before = weight.clone()
    model.merge_adapter()
    with torch.no_grad():
        blocks.index.copy_(torch.tensor([[0, 0], [0, 1], [7, 15]], dtype=torch.int32))
    model.unmerge_adapter()
    assert torch.equal(weight, before)


def test_tables_first_made_in_inference_mode_or_under_a_transform_serve_a_training_step_after_it():
    with ops.use_backend("reference"):
        model, blocks = adapted((64, 128), 8, 20, init_weights=False)
        x = torch.randn(5, 128)
        with torch.inference_mode():
            expected = model(x)
        jacobian = torch.func.jacrev(lambda row: model(row).sum(0))(x)
        assert torch.allclose(model(x), expected, atol=1e-5)
        x.requires_grad_()
        model(x).sum().backward()
        assert torch.allclose(jacobian.sum(0), x.grad, atol=1e-4)
        assert blocks.weight.grad.any()
