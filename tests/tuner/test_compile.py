"""Whole models under `torch.compile`: one graph, the numbers of eager code, and compiled anew for no step, no length
of a batch and no adapter that has been seen."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from helpers import batch, tiny_llama
from peft import get_peft_model
from torch._dynamo.backends.debugging import aot_eager

from smt_peft import SMTConfig

SETTINGS = {"density": 0.2, "block_size": 8, "score": "random", "init_weights": False}


def smt_llama(**settings):
    return get_peft_model(tiny_llama(), SMTConfig(**{**SETTINGS, **settings})).train()


class Compiler:
    """A backend that keeps the graphs it is given."""

    def __init__(self):
        torch._dynamo.reset()
        self.graphs = []

    def __call__(self, graph, example_inputs):
        self.graphs.append(graph)
        return aot_eager(graph, example_inputs)


def trained(model) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def step(model, run, inputs):
    """Loss and gradients of one batch."""
    model.zero_grad()
    loss = run(**inputs).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in trained(model).items()}


def assert_like_eager(model, compiled, inputs):
    truth, gradients = step(model, model, inputs)
    loss, ours = step(model, compiled, inputs)
    torch.testing.assert_close(loss, truth)
    assert ours.keys() == gradients.keys() and ours
    for name, gradient in gradients.items():
        torch.testing.assert_close(ours[name], gradient, msg=name)


def test_compiled_once_for_all_steps_lengths_and_switches_between_adapters():
    model = smt_llama()
    model.add_adapter("other", SMTConfig(**SETTINGS, seed=1))
    compiler = Compiler()
    compiled = torch.compile(model, backend=compiler, fullgraph=True)
    optimizer = torch.optim.SGD(trained(model).values(), lr=0.1)

    def steps(lengths):
        for length in lengths:
            assert_like_eager(model, compiled, batch(length=length))
            optimizer.step()

    steps([8, 8])
    assert len(compiler.graphs) == 1
    # The second length makes the compiler write one graph for every length.
    steps([9, 12, 21])
    assert len(compiler.graphs) == 2
    # PEFT reads the name of the active adapter, so the second adapter has a graph of its own; no third is ever made.
    model.set_adapter("other")
    steps([8, 13])
    assert len(compiler.graphs) == 3
    for name in ("default", "other", "default"):
        model.set_adapter(name)
        steps([8, 17])
    assert len(compiler.graphs) == 3


@contextmanager
def as_is(model):
    yield model


@contextmanager
def autocast(model):
    with torch.autocast("cpu", torch.bfloat16):
        yield model


@contextmanager
def checkpointing(model):
    # Two things of Transformers that break a graph: it logs that it sets this, and a hook calls `requires_grad_`.
    model.config.use_cache = False
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.disable_input_require_grads()
    yield model


@contextmanager
def two_adapters(model):
    model.add_adapter("other", SMTConfig(**SETTINGS, seed=1))
    model.base_model.set_adapter(["default", "other"])
    yield model


@pytest.mark.parametrize("forward", ["auto", "additive"])
@pytest.mark.parametrize("circumstance", [as_is, autocast, checkpointing, two_adapters])
def test_one_graph_with_the_numbers_of_eager_code(circumstance, forward):
    if circumstance is two_adapters and forward == "additive":
        pytest.skip("two active adapters are added in any case")
    compiler = Compiler()
    with circumstance(smt_llama(forward=forward)) as model:
        compiled = torch.compile(model, backend=compiler, fullgraph=True)
        for seed in range(2):
            assert_like_eager(model, compiled, batch(seed=seed))
    assert len(compiler.graphs) == 1


def test_evaluation_and_switched_off_adapters():
    model = smt_llama().eval()
    compiled = torch.compile(model, backend=Compiler(), fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**batch()).logits, model(**batch()).logits)
        with model.disable_adapter():
            off = compiled(**batch()).logits
            torch.testing.assert_close(off, model(**batch()).logits)
        assert not torch.equal(off, compiled(**batch()).logits)


def test_the_base_is_untouched_and_the_merged_model_compiles():
    model = smt_llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if "base_layer" in name}
    compiled = torch.compile(model, backend=Compiler(), fullgraph=True)
    step(model, compiled, batch())
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    merged = model.merge_and_unload()
    compiled = torch.compile(merged, backend=Compiler(), fullgraph=True)
    torch.testing.assert_close(compiled(**batch()).logits, merged(**batch()).logits)


def test_cuda_graphs_read_the_block_index_in_place():
    """A copy of an index would be checked anew, which waits for the device, and no capture outlives that."""
    compiler = Compiler()
    model = smt_llama()
    step(model, torch.compile(model, backend=compiler, fullgraph=True), batch())
    (graph,) = compiler.graphs
    inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
    indices = [node for node in inputs if node.meta["example_value"].dtype == torch.int32]
    layers = sum("smt_blocks" in name for name in trained(model))
    assert len(indices) >= layers
    for node in indices:
        assert "_dynamo_static_input_type" in node.meta["tensor_dict"], node
