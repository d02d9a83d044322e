"""What only a GPU can show: whole training steps, determinism beside other work, graphs, peak memory, bulk copies.

Run by `make gpu`. Single operations meet the truth in tests/ops, on a GPU as well.
"""

from __future__ import annotations

import copy
import gc
from dataclasses import replace

import pytest
import torch
from helpers import assert_no_worse_than_torch, batch, random_layout, tiny_llama
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from smt_peft import SMTConfig, ops
from smt_peft.bench.cases import clustered, matched
from smt_peft.bench.products import slices
from smt_peft.blocks import BlockGrid, BlockLayout
from smt_peft.ops.dispatch import FASTER
from smt_peft.optim import SMTAdamW

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
BF16 = torch.bfloat16


class Layer(nn.Module):
    def __init__(self, rows: int, cols: int):
        super().__init__()
        self.linear = nn.Linear(cols, rows, bias=False, device=CUDA, dtype=BF16)

    def forward(self, x):
        return self.linear(x)


def on_cuda(layout: BlockLayout) -> BlockLayout:
    return BlockLayout(layout.grid, layout.blocks.to(CUDA)).prepare()


def smt_layer(rows: int = 512, cols: int = 768, **settings):
    settings = {"score": "random", "density": 0.05, "block_size": 64, **settings}
    return get_peft_model(Layer(rows, cols), SMTConfig(target_modules=["linear"], **settings)).train()


def delta_of(model) -> nn.Parameter:
    return next(parameter for parameter in model.parameters() if parameter.requires_grad)


def losses_of(model, device, steps: int = 8) -> torch.Tensor:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = SMTAdamW(trained, lr=1e-3)
    losses = []
    for number in range(steps):
        loss = model(**{name: ids.to(device) for name, ids in batch(4, 32, seed=number % 2).items()}).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach().cpu())
    return torch.stack(losses)


@pytest.mark.parametrize("forward", ["swap", "additive"])
@pytest.mark.parametrize("pattern", ["matched", "clustered"])
def test_a_model_trains_to_the_losses_of_the_truth(forward, pattern):
    """bf16 with our kernels, bf16 with plain PyTorch, and fp64 on the CPU, from the same weights."""
    base = tiny_llama(hidden=256).to(BF16)
    shape = {"block_size": 16} if pattern == "matched" else {"block_size": 64, "spread": "free"}
    config = SMTConfig(target_modules="all-linear", score="random", density=0.06, forward=forward, **shape)
    model = get_peft_model(base, config).train()
    truth = losses_of(copy.deepcopy(model).double(), "cpu")
    with ops.use_backend("reference"):
        plain = losses_of(copy.deepcopy(model).to(CUDA), CUDA)
    ours = losses_of(model.to(CUDA), CUDA)
    assert truth[-1] < truth[0]
    assert_no_worse_than_torch(ours, plain.to(BF16), truth)


def test_the_base_is_put_back_bit_for_bit_also_when_the_gemm_raises():
    weight = torch.randn(512, 768, device=CUDA, dtype=BF16)
    layout = on_cuda(random_layout(BlockGrid.fit((512, 768), 64), 20))
    delta = torch.randn(20, 64, 64, device=CUDA)
    before = weight.clone()
    x, dy = torch.randn(100, 768, device=CUDA, dtype=BF16), torch.randn(100, 512, device=CUDA, dtype=BF16)
    merged = ops.block_scatter_(weight.clone(), ops.add_rounded(ops.block_gather(weight, layout), delta), layout)
    for name in ("native", "reference"):
        with ops.use_backend(f"swap_linear={name},swap_matmul={name}"):
            assert torch.equal(ops.swap_linear(x, weight, None, delta, layout), x @ merged.t()), name
            assert torch.equal(ops.swap_matmul(dy, weight, delta, layout), dy @ merged), name
            for call, operand in ((ops.swap_linear, (x[:, :-1], weight, None)), (ops.swap_matmul, (x[:, 1:], weight))):
                with pytest.raises((RuntimeError, ValueError)):
                    call(*operand, delta, layout)
                assert torch.equal(weight, before), name


def test_a_step_leaves_the_base_as_it_was():
    model = smt_layer()
    weight = model.base_model.model.linear.base_layer.weight
    delta_of(model).data.normal_()
    before = weight.clone()
    x = torch.randn(64, 768, device=CUDA, dtype=BF16, requires_grad=True)
    y = model(x)
    assert torch.equal(weight, before)
    y.float().square().sum().backward()
    assert torch.equal(weight, before)


def gradients(operation_backend, layout, beside=None):
    """Ten gradients of the same operands, bit for bit, maybe beside a stream that keeps the GPU busy."""
    dy, x = (torch.randn(4096, side, device=CUDA, dtype=BF16) for side in layout.grid.shape)
    torch.cuda.synchronize()
    results = []
    with ops.use_backend(f"block_grad={operation_backend}"):
        for _ in range(10):
            if beside is not None:
                with torch.cuda.stream(beside):
                    for _ in range(4):
                        busy = torch.randn(2048, 2048, device=CUDA)
                        busy @ busy
            results.append(ops.block_grad(dy, x, layout))
    torch.cuda.synchronize()
    return results


@pytest.mark.parametrize("busy", [False, True], ids=["alone", "beside a busy stream"])
@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("make", ["matched", "clustered", "few"])
def test_gradients_repeat_bit_for_bit(make, backend, busy):
    layout = {
        "matched": lambda: matched((2048, 1024), 16, CUDA),
        "clustered": lambda: clustered((2048, 1024), 128, 0.2, CUDA),
        # So few that the tokens are split and summed by a second kernel.
        "few": lambda: on_cuda(random_layout(BlockGrid.fit((2048, 1024), 256), 1)),
    }[make]()
    first, *others = gradients(backend, layout, torch.cuda.Stream() if busy else None)
    assert all(torch.equal(first, other) for other in others)


def test_a_step_repeats_bit_for_bit_beside_a_busy_stream():
    model = smt_layer(1024, 1024)
    x, dy = (torch.randn(2048, 1024, device=CUDA, dtype=BF16) for _ in range(2))
    delta = delta_of(model)
    delta.data.normal_(std=0.01)
    stream, results = torch.cuda.Stream(), []
    for _ in range(10):
        with torch.cuda.stream(stream):
            busy = torch.randn(2048, 2048, device=CUDA)
            busy @ busy
        delta.grad = None
        inputs = x.clone().requires_grad_()
        y = model(inputs)
        y.backward(dy)
        results.append((y.detach().clone(), inputs.grad, delta.grad))
    for parts in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(parts, results[0], strict=True))


@pytest.mark.parametrize("forward", ["swap", "additive"])
def test_a_step_of_a_layer_is_captured_in_a_graph(forward):
    model = smt_layer(forward=forward)
    delta = delta_of(model)
    delta.data.normal_(std=0.01)
    x, dy = (torch.randn(256, side, device=CUDA, dtype=BF16) for side in (768, 512))
    x.requires_grad_()

    def step():
        model(x).backward(dy)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            delta.grad = x.grad = None
            step()
    torch.cuda.current_stream().wait_stream(side)
    delta.grad = x.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for seed in range(3):
        torch.manual_seed(seed)
        with torch.no_grad():
            x.normal_()
            dy.normal_()
            delta.normal_(std=0.01)
        captured = delta.grad, x.grad
        graph.replay()
        replayed = [gradient.clone() for gradient in captured]
        delta.grad = x.grad = None
        step()
        assert torch.equal(replayed[0], delta.grad) and torch.equal(replayed[1], x.grad)
        delta.grad, x.grad = captured


@pytest.mark.parametrize("forward", ["swap", "additive"])
def test_a_compiled_model_runs_in_cuda_graphs(forward):
    torch._dynamo.reset()
    model = tiny_llama(hidden=256).to(CUDA, BF16)
    model = get_peft_model(model, SMTConfig(density=0.05, block_size=32, score="random", forward=forward)).train()
    truth = copy.deepcopy(model).float()
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    torch._dynamo.utils.counters.clear()

    def step(model, run, inputs) -> tuple[torch.Tensor, torch.Tensor]:
        model.zero_grad()
        loss = run(**inputs).loss
        loss.backward()
        return loss.detach().clone(), delta_of(model).grad.clone()

    for seed in range(5):
        inputs = {name: ids.to(CUDA) for name, ids in batch(4, 32, seed=seed).items()}
        torch.compiler.cudagraph_mark_step_begin()
        ours = step(model, compiled, inputs)
        with ops.use_backend("reference"):
            plain = step(model, model, inputs)
        for parts in zip(ours, plain, step(truth, truth, inputs), strict=True):
            assert_no_worse_than_torch(*parts)
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0


def optimized(device, backend="reference", dtype=torch.float32, make=SMTAdamW, **settings) -> torch.Tensor:
    """All parameters, flat and on the CPU, after ten steps on the same gradients."""
    torch.manual_seed(0)
    start = [torch.randn(50, 64, 64) * 0.02, torch.randn(3, 17, 5) * 0.02]
    params = [tensor.to(device, dtype).requires_grad_() for tensor in start]
    optimizer = make(params, lr=1e-3, **settings)
    with ops.use_backend(f"block_adamw_={backend}"):
        for _ in range(10):
            for param in params:
                param.grad = torch.randn(param.shape).to(device, dtype)
            optimizer.step()
    return torch.cat([param.detach().cpu().flatten() for param in params])


def test_the_optimizer_on_cuda_is_no_worse_than_pytorch():
    ours = optimized("cuda", "native")
    plain = optimized("cpu", make=torch.optim.AdamW)
    assert_no_worse_than_torch(ours, plain, optimized("cpu", dtype=torch.float64, make=torch.optim.AdamW))


@pytest.mark.parametrize("state_dtype", ["bfloat16", "8bit"])
def test_the_optimizer_on_cuda_follows_the_reference_on_the_cpu(state_dtype):
    settings = {"state_dtype": state_dtype, "max_grad_norm": 1.0, "seed": 5}
    moved = (optimized("cuda", "native", **settings).double() - optimized("cpu", **settings).double()).abs()
    # Where arithmetic tips a stored moment over to its neighbour, its own element moves, and no other.
    assert (moved <= 1e-6).double().mean() > 0.99
    assert moved.max() <= 1e-2


def peak_of_a_step(model, optimizer, autocast: bool) -> int:
    """Bytes at the peak of the second step: all states are there by then."""
    for _ in range(2):
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        embeds = torch.randn(4, 512, model.config.hidden_size, device=CUDA, dtype=BF16)
        labels = torch.randint(0, 1000, (4, 512), device=CUDA)
        with torch.autocast("cuda", BF16, enabled=autocast):
            loss = model(inputs_embeds=embeds, labels=labels, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        del loss
        peak = torch.cuda.max_memory_allocated()
    return peak


@pytest.mark.parametrize("block_size", ["auto", 64])
def test_peak_memory_is_below_that_of_lora_with_as_many_trained_weights(block_size):
    def wrapped(config, **kwargs):
        torch.manual_seed(0)
        shape = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "vocab_size": 1000}
        base = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=16, num_key_value_heads=16))
        model = get_peft_model(base.to(BF16).to(CUDA), config, **kwargs).train()
        return model, [parameter for parameter in model.parameters() if parameter.requires_grad]

    # Adapters in fp32, PEFT's default, as SMT's are.
    model, trained = wrapped(LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    count = sum(parameter.numel() for parameter in trained)
    targeted = sum(p.numel() for n, p in model.named_parameters() if "base_layer" in n)
    lora = peak_of_a_step(model, torch.optim.AdamW(trained, fused=True), autocast=True)
    del model, trained
    spread = {} if block_size == "auto" else {"spread": "free", "block_size": block_size}
    config = SMTConfig(target_modules="all-linear", score="random", density=count / targeted, **spread)
    model, trained = wrapped(config)
    assert sum(parameter.numel() for parameter in trained) == pytest.approx(count, rel=0.1)
    smt = peak_of_a_step(model, SMTAdamW(trained), autocast=False)
    assert smt <= lora, f"SMT {smt >> 20} MiB, LoRA {lora >> 20} MiB"


@pytest.mark.parametrize(("tokens", "splits"), [(63, 1), (2000, 1), (2000, 3)])
@pytest.mark.parametrize(("side", "shape"), [(64, (512, 768)), (128, (640, 512)), (256, (1024, 1100))], ids=str)
@pytest.mark.parametrize("route", ["bulk", "pointers"])
def test_both_ways_to_load_a_tile_meet_the_truth(route, side, shape, tokens, splits, monkeypatch):
    """Bulk copies (TMA) where the GPU has them, and plain pointers, which it would not choose itself."""
    grad = pytest.importorskip("smt_peft.ops.triton.grad")
    rule = grad.plan

    def forced(*question):
        chosen = rule(*question)
        if chosen.route not in ("bulk", "pointers"):
            pytest.fail(f"the rule takes {chosen.route!r} for these blocks; choose fewer")
        if route == "bulk" and chosen.route != "bulk":
            pytest.skip("this GPU has no bulk copies")
        return replace(chosen, route=route, splits=splits)

    monkeypatch.setattr(grad, "plan", forced)
    layout = on_cuda(random_layout(BlockGrid.fit(shape, side), 3))
    dy, x = (torch.randn(tokens, size, device=CUDA, dtype=BF16) for size in shape)
    truth, plain = slices(dy.double().t() @ x.double(), layout), slices(dy.t() @ x, layout)
    out = torch.full_like(truth, float("nan"), dtype=torch.float32)
    with ops.use_backend("block_grad=triton"):
        ours = ops.block_grad(dy, x, layout, out=out)
        again = ops.block_grad(dy, x, layout, out=ours.clone(), accumulate=True)
    assert_no_worse_than_torch(ours, plain, truth)
    assert_no_worse_than_torch(again, 2 * plain, 2 * truth)


def test_the_fast_backends_serve_here():
    """What this file shows is worth little where the reference runs in their place."""
    served = {operation: name for operation, name, _ in ops.explain("cuda")}
    expected = {operation: faster for operation, faster in FASTER.items() if faster}
    for operation, faster in expected.items():
        assert served[operation] in faster, operation
