"""Models and callers that are not the usual ones: grad modes, packed, inference and meta weights, failing scores."""

import pytest
import torch
from helpers import Mlp, batch, tiny_llama
from test_warmup import BATCHES, EVERY, select, squares
from torch import nn

from smt_peft import SMTConfig, select_blocks


def test_none_takes_the_list_of_the_architecture_and_records_its_modules():
    model = tiny_llama()
    config = SMTConfig(**EVERY | {"target_modules": None})
    names = [f"model.layers.{layer}.self_attn.{name}_proj" for layer in range(2) for name in "qv"]
    for score, loader in (("grad_abs", BATCHES), ("diagonal", None)):
        config.score = score
        selection = select_blocks(model, config, loader, progress=False)
        assert list(selection.blocks) == names
        assert selection.provenance["target_modules"] == names
    assert config.target_modules is None


@pytest.mark.parametrize("score", ["grad_abs", "grad_sum_abs", "activation", "magnitude"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_grad_mode_of_the_caller_does_not_matter(mode, score):
    model = tiny_llama()
    expected = select(model, score=score)
    with mode():
        found = select(model, [batch(seed=i) for i in range(3)], score=score)
        assert not torch.is_grad_enabled() and torch.is_inference_mode_enabled() == (mode is torch.inference_mode)
    assert found == expected
    assert not any(blocks.is_inference() for blocks in found.blocks.values())


def test_weights_that_no_gradient_passes_through_are_named():
    with torch.inference_mode():
        model = tiny_llama()
        with pytest.raises(ValueError, match=r"embed_tokens\.weight was made under torch\.inference_mode"):
            select(model)
        assert select_blocks(model, SMTConfig(**EVERY | {"score": "magnitude"})).blocks


@pytest.mark.parametrize("score", ["grad_abs", "activation"])
def test_weights_on_the_meta_device_are_named(score):
    with torch.device("meta"):
        model = tiny_llama()
    with pytest.raises(ValueError, match=r"\.weight is on the meta device .*load the weights first"):
        select(model, score=score)
    part = Mlp()
    part.down.to("meta")
    with pytest.raises(ValueError, match=r"down\.weight is on the meta device \(2 weights are\)"):
        select(part, [torch.randn(3, 20)], loss_fn=squares, target_modules=["up"])


class Packed(nn.Linear):
    """Two 4-bit values per byte, as quantised bases keep them; computes with the weight it was made from."""

    def __init__(self, base):
        super().__init__(base.in_features, base.out_features)
        self.full, self.bias = base.weight.detach(), base.bias
        self.weight = nn.Parameter(torch.zeros(base.weight.numel() // 2, 1, dtype=torch.uint8), requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.full, self.bias)


class Int8(Packed):
    def __init__(self, base):
        super().__init__(base)
        self.weight = nn.Parameter(torch.zeros(base.weight.shape, dtype=torch.int8), requires_grad=False)


@pytest.mark.parametrize("kind", [Packed, Int8])
def test_packed_weights(kind):
    model, x = Mlp(), torch.randn(5, 20)
    expected = select(model, [x], loss_fn=squares).scores
    model.up = kind(model.up)
    found = select(model, [x], loss_fn=squares).scores
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    for score in ("magnitude", "low_rank_magnitude", "taylor", lambda weight, grad: grad.abs()):
        with pytest.raises(ValueError, match=r"up: score=.* reads the weight, .*int8 .* 36 x 20 matrix; .*'grad_abs'"):
            select(model, [x], loss_fn=squares, score=score)
    assert "up" in select(model, score="diagonal").blocks


def test_a_score_function_that_raises_is_named_with_its_module():
    def wrong(weight, grad):
        raise KeyError("missing")

    with pytest.raises(ValueError, match=r"(up|down): the score function raised KeyError: 'missing'") as caught:
        select(Mlp(), [torch.randn(5, 20)], loss_fn=squares, score=wrong)
    assert isinstance(caught.value.__cause__, KeyError)
