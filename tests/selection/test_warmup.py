"""The warm-up pass against gradients that plain autograd leaves on trainable weights."""

import copy
import logging
import warnings
import weakref
from functools import partial

import pytest
import torch
from helpers import Mlp, batch, tiny_gpt2, tiny_llama
from test_scores import dense_means
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import BatchEncoding
from transformers.pytorch_utils import Conv1D

from smt_peft import BlockSelection, SMTConfig, select_blocks
from smt_peft.bases.targets import find_targets

BATCHES = [batch(seed=i) for i in range(3)]
SCORES = ("grad_abs", "grad_sq", "taylor", "mean_abs", "grad_sum_abs", "activation")
EVERY = {"score": "grad_abs", "density": 0.3, "block_size": (4, 8)}


def select(model, batches=None, num_batches=3, loss_fn=None, accumulator_device=None, **settings):
    config = SMTConfig(**EVERY | settings)
    return select_blocks(
        model,
        config,
        BATCHES if batches is None else batches,
        num_batches,
        loss_fn=loss_fn,
        accumulator_device=accumulator_device,
        progress=False,
    )


def squares(model, x):
    return model(x).square().sum()


def raising_loader():
    yield BATCHES[0]
    raise OSError("the disk is gone")


def dense_gradients(model, batches, config, loss_of=lambda model, batch: model(**batch).loss):
    """Per batch and target the gradient that autograd puts on a trainable weight, (out_features, in_features)."""
    model = copy.deepcopy(model).eval()
    targets = find_targets(model, config)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for target in targets.values():
        target.module.weight = nn.Parameter(target.module.weight.detach().clone())
    gradients = []
    for each in batches:
        model.zero_grad()
        loss_of(model, each).backward()
        grads = {name: target.module.weight.grad for name, target in targets.items()}
        gradients.append(
            {
                name: torch.zeros(target.shape)
                if grads[name] is None
                else (grads[name].t() if target.transposed else grads[name]).clone()
                for name, target in targets.items()
            }
        )
    return gradients


def truth_of(score, model, batches, config, **kwargs):
    gradients = dense_gradients(model, batches, config, **kwargs)
    scores = {}
    for name, target in find_targets(model, config).items():
        stack, weight = torch.stack([grads[name] for grads in gradients]).double(), target.weight.detach().double()
        grid = config.grid(target.shape)
        dense = {
            "grad_abs": stack.abs(),
            "grad_sq": stack**2,
            "taylor": (weight * stack).abs(),
            "mean_abs": stack,
            "grad_sum_abs": stack,
        }[score].mean(0)
        scores[name] = {
            "mean_abs": lambda d, g: dense_means(d, g).abs(),
            "grad_sum_abs": lambda d, g: dense_means(d.abs(), g),
        }.get(score, dense_means)(dense, grid)
    return scores


def assert_scores(selection, truth, rtol=1e-4):
    assert selection.scores.keys() == truth.keys()
    for name, expected in truth.items():
        torch.testing.assert_close(
            selection.scores[name].double(),
            expected.double(),
            rtol=rtol,
            atol=rtol * expected.abs().max().item() + 1e-12,
            msg=lambda m, n=name: f"{n}: {m}",
        )


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, partial(tiny_llama, tied=True)])
@pytest.mark.parametrize("score", [score for score in SCORES if score != "activation"])
def test_scores_are_those_of_dense_gradients(build, score):
    model = build()
    config = SMTConfig(**EVERY | {"score": score})
    assert_scores(select(model, score=score), truth_of(score, model, BATCHES, config))


def test_callable_score_over_a_model():
    model = tiny_gpt2()
    config = SMTConfig(**EVERY)
    selection = select(model, score=lambda weight, grad: (weight * grad) ** 2)
    gradients = dense_gradients(model, BATCHES, config)
    name = "transformer.h.1.mlp.c_fc"
    weight = find_targets(model, config)[name].weight.detach()
    dense = torch.stack([(weight * grads[name]) ** 2 for grads in gradients]).mean(0)
    torch.testing.assert_close(
        selection.scores[name], dense_means(dense, config.grid(tuple(weight.shape))), rtol=1e-4, atol=1e-12
    )
    with pytest.raises(ValueError, match=r"transformer\.h\.\d.*the score function returned"):
        select(model, score=lambda weight, grad: grad.t())


def test_activation_score_needs_forward_only():
    model = Mlp()
    xs = [torch.randn(2, 5, 20), torch.randn(3, 20)]

    def loss_fn(model, x):
        assert not torch.is_grad_enabled()
        return model(x)

    selection = select(model, xs, loss_fn=loss_fn, score="activation", target_modules=["up", "down"])
    for name, see in (("up", lambda x: x), ("down", lambda x: torch.tanh(model.up(x)))):
        columns = torch.stack(
            [see(x).detach().reshape(-1, model.get_submodule(name).in_features).abs().mean(0) for x in xs]
        ).mean(0)
        grid = selection.grids[name]
        torch.testing.assert_close(selection.scores[name], dense_means(columns.expand(grid.shape), grid))


def test_tied_head_counts_its_own_use_only():
    model = tiny_gpt2()
    assert model.lm_head.weight is model.transformer.wte.weight
    config = SMTConfig(**EVERY | {"target_modules": ["lm_head", "c_fc"]})
    selection = select(model, target_modules=["lm_head", "c_fc"])
    assert "lm_head" in selection.blocks
    assert_scores(selection, truth_of("grad_abs", model, BATCHES, config))


class Twice(nn.Module):
    """One linear used twice, one segment of it checkpointed on request."""

    def __init__(self, kind=None):
        super().__init__()
        self.first, self.shared, self.spare = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 12)
        self.kind = kind

    def _segment(self, x):
        return torch.tanh(self.shared(x))

    def forward(self, x):
        if self.kind is None:
            run = self._segment
        else:
            run = partial(checkpoint, self._segment, use_reentrant=self.kind == "reentrant")
        return run(run(torch.tanh(self.first(x)))).square().mean()


@pytest.mark.parametrize("kind", [None, "reentrant", "non-reentrant"])
@pytest.mark.parametrize("score", ["grad_abs", "mean_abs"])
def test_a_module_used_twice_sums_before_the_absolute_value(kind, score):
    model = Twice(kind)
    xs = [(torch.randn(4, 12),) for _ in range(2)]
    names = ["first", "shared"]
    config = SMTConfig(target_modules=names, density=0.3, block_size=4, score=score)
    selection = select_blocks(model, config, xs, progress=False)
    plain = Twice()
    plain.load_state_dict(model.state_dict())
    assert_scores(selection, truth_of(score, plain, xs, config, loss_of=lambda model, each: model(*each)))


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("score", ["grad_abs", "activation"])
def test_checkpointing_gives_the_same_scores(build, reentrant, score):
    model = build()
    plain = select(model, score=score)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    # The hook that Transformers adds for the reentrant kind; a model without it must do as well.
    model.disable_input_require_grads()
    model.train()
    layer = next(m for n, m in model.named_modules() if n.endswith("mlp"))
    calls = []
    layer.register_forward_pre_hook(lambda *args: calls.append(torch.is_grad_enabled()))
    function = next(m for m in model.modules() if getattr(m, "gradient_checkpointing", False) is True)
    before = function._gradient_checkpointing_func
    again = select(model, score=score)
    assert len(calls) == (6 if score == "grad_abs" else 3), "each layer runs a second time during backward"
    assert function._gradient_checkpointing_func is before
    assert again == plain
    for name, expected in plain.scores.items():
        assert torch.equal(again.scores[name], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_base_dtypes(dtype):
    model = tiny_llama()
    config = SMTConfig(**EVERY)
    truth = truth_of("grad_abs", copy.deepcopy(model).double(), BATCHES, config)
    selection = select(model.to(dtype))
    assert all(score.dtype == torch.float32 for score in selection.scores.values())
    assert_scores(selection, truth, rtol=5e-2 if dtype == torch.bfloat16 else 1e-6)


def test_autocast_of_the_caller():
    model = tiny_llama()
    truth = truth_of("grad_abs", copy.deepcopy(model).double(), BATCHES, SMTConfig(**EVERY))
    with torch.autocast("cpu", torch.bfloat16):
        selection = select(model)
        assert torch.is_autocast_enabled("cpu")
    assert_scores(selection, truth, rtol=5e-2)


class Live(TorchDispatchMode):
    """Counts the storages of one shape and dtype that are alive at once."""

    def __init__(self, shape):
        super().__init__()
        self.sizes = {shape, shape[::-1]}
        self.alive: dict[int, weakref.ref] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and tuple(tensor.shape) in self.sizes and tensor.dtype == torch.float32:
                storage = tensor.untyped_storage()
                self.alive.setdefault(storage.data_ptr(), []).append(weakref.ref(tensor))
        self.alive = {key: live for key, refs in self.alive.items() if (live := [r for r in refs if r() is not None])}
        self.peak = max(self.peak, len(self.alive))
        return out


class Stack(nn.Module):
    """Six bf16 linears of one shape, so that fp32 tensors of that shape are gradients."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(24, 24, bias=False, dtype=torch.bfloat16) for _ in range(6))

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x.float().mean()


@pytest.mark.parametrize(("score", "at_once"), [("grad_abs", 1), ("grad_sq", 1), ("taylor", 1), ("mean_abs", 0)])
def test_one_dense_gradient_at_a_time(score, at_once):
    model = Stack()
    with Live((24, 24)) as live:
        select(
            model,
            [(torch.randn(5, 24, dtype=torch.bfloat16),)] * 2,
            score=score,
            target_modules=r"layers\.\d",
            block_size=4,
        )
    assert live.peak == at_once


def test_accumulators_are_dense_and_said(caplog):
    caplog.set_level(logging.INFO, logger="smt_peft")
    with Live((24, 24)) as live:
        select(
            Stack(),
            [(torch.randn(5, 24, dtype=torch.bfloat16),)],
            score="grad_sum_abs",
            block_size=4,
            target_modules=r"layers\.\d",
            accumulator_device="cpu",
        )
    assert live.peak >= 6
    assert any("grad_sum_abs" in line and "MiB" in line for line in caplog.messages)


def test_backward_stops_at_the_lowest_target():
    model = tiny_llama(layers=3)
    reached = []
    for index, layer in enumerate(model.model.layers):
        layer.mlp.down_proj.register_full_backward_pre_hook(lambda m, g, i=index: reached.append(i))
    selection = select(model, layers_to_transform=[2], layers_pattern="layers", target_modules=["up_proj"])
    assert list(selection.blocks) == ["model.layers.2.mlp.up_proj"]
    assert set(reached) == {2}


@pytest.mark.parametrize("kind", ["dict", "encoding", "tuple", "list", "tensor", "loss_fn", "object"])
def test_kinds_of_batches(kind):
    class Lossy(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(6, 8)

        def forward(self, x, labels=None):
            loss = (self.proj(x) - (0 if labels is None else labels)).square().mean()
            return loss if labels is None else {"loss": loss}

    model, x, y = Lossy(), torch.randn(3, 6), torch.randn(3, 8)
    each = {
        "dict": {"x": x, "labels": y},
        "encoding": BatchEncoding({"x": x, "labels": y}),
        "tuple": (x, y),
        "list": [x, y],
        "tensor": x,
        "loss_fn": {"anything": [x]},
        "object": object(),
    }[kind]
    call = {"loss_fn": lambda model, b: model(b["anything"][0]), "object": lambda model, b: model(x)}.get(kind)
    selection = select(model, [each], target_modules=["proj"], loss_fn=call, block_size=2)
    grad_of = copy.deepcopy(model)
    out = grad_of(x, y) if kind in ("dict", "encoding", "tuple", "list") else grad_of(x)
    (out["loss"] if isinstance(out, dict) else out).backward()
    truth = dense_means(grad_of.proj.weight.grad.abs(), selection.grids["proj"])
    torch.testing.assert_close(selection.scores["proj"], truth)


@pytest.mark.parametrize("lead", [(), (1,), (5,), (2, 3), (2, 1, 3)])
@pytest.mark.parametrize("layer", [nn.Linear(6, 8), Conv1D(8, 6)])
def test_inputs_of_any_rank(lead, layer):
    model = nn.Sequential(layer)
    x = torch.randn(*lead, 6)
    if isinstance(layer, Conv1D) and not lead:
        x = x[None]
    selection = select(model, [x], loss_fn=squares, target_modules=["0"], block_size=3)
    model.zero_grad()
    model(x).square().sum().backward()
    grad = layer.weight.grad.t() if isinstance(layer, Conv1D) else layer.weight.grad
    torch.testing.assert_close(selection.scores["0"], dense_means(grad.abs(), selection.grids["0"]))


def test_empty_batches_score_nothing():
    model = nn.Sequential(nn.Linear(6, 8))
    xs = [torch.randn(3, 6), torch.randn(0, 6)]
    halved = select(model, xs, loss_fn=squares, target_modules=["0"], block_size=3)
    alone = select(model, xs[:1], loss_fn=squares, target_modules=["0"], block_size=3)
    torch.testing.assert_close(halved.scores["0"] * 2, alone.scores["0"])


def test_a_model_that_goes_on_in_place():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 4), nn.ReLU(inplace=True))
    x = torch.randn(5, 6)
    found = select(model, [x], loss_fn=squares, target_modules=["0", "2"], block_size=2)
    model(x).square().sum().backward()
    for name in ("0", "2"):
        truth = dense_means(model[int(name)].weight.grad.abs(), found.grids[name])
        torch.testing.assert_close(found.scores[name], truth)


def test_gradients_are_those_of_the_linear_itself():
    """A hook of the user that changes a target's output comes after the tap."""
    model, x = Mlp(), torch.randn(5, 20)
    model.up.register_forward_hook(lambda module, args, out: 3 * out)
    found = select(model, [x], loss_fn=squares, target_modules=["up"])
    model(x).square().sum().backward()
    torch.testing.assert_close(found.scores["up"], dense_means(model.up.weight.grad.abs(), found.grids["up"]))


def test_unreached_targets_score_zero_and_are_named():
    model = Twice()
    with pytest.warns(UserWarning, match="1 of 3 targeted modules .* score 0: spare") as caught:
        selection = select(model, [(torch.randn(4, 12),)], target_modules=["first", "shared", "spare"], block_size=4)
    assert caught[0].filename == __file__
    assert not selection.scores["spare"].any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        select(model, [(torch.randn(4, 12),)], target_modules=["first", "shared"], block_size=4)
    with pytest.raises(ValueError, match="batch 1: the loss does not depend on any targeted module"):
        select(model, [(torch.randn(4, 12),)], target_modules=["spare"], block_size=4)
    with pytest.raises(ValueError, match=r"none of the 1 targeted modules .*spare"):
        select(model, [(torch.randn(4, 12),)], target_modules=["spare"], block_size=4, score="activation")


def test_errors_name_the_repair():
    model = tiny_llama()
    with pytest.raises(ValueError, match="num_batches must be a positive int, got 0"):
        select(model, num_batches=0)
    with pytest.raises(ValueError, match="gave no batch"):
        select(model, [])
    with pytest.raises(ValueError, match="score='grad_abs' needs data: pass an iterable"):
        select_blocks(model, SMTConfig(**EVERY))
    with pytest.raises(TypeError, match="the dataloader is a int"):
        select(model, 3)
    with pytest.raises(TypeError, match="batch 1 is a str"):
        select(model, BATCHES[0])
    with pytest.raises(ValueError, match="batch 1: .*no 'labels': add them"):
        select(model, [{"input_ids": BATCHES[0]["input_ids"]}])
    with pytest.raises(ValueError, match=r"batch 1: the loss has shape \(2, 8, 64\)"):
        select(model, loss_fn=lambda model, each: model(**each).logits)
    with pytest.raises(ValueError, match="batch 1: .*loss_fn must return a scalar tensor"):
        select(model, loss_fn=lambda model, each: 3.0)
    with pytest.raises(ValueError, match="batch 1: the loss does not depend"):
        select(model, loss_fn=lambda model, each: model(**each).loss.detach())
    with pytest.raises(ValueError, match="batch 1: the loss is inf"):
        select(model, loss_fn=lambda model, each: model(**each).loss / 0)
    with pytest.raises(RuntimeError, match=r"batch 1: the model refused it \(ValueError: You must specify.*loss_fn"):
        select(model, [{"nonsense": torch.ones(2)}])
    with pytest.raises(ValueError, match="read from a file"):
        select(model, score="callable:mine")
    with pytest.raises(ValueError, match=r"up_proj: .* block scores are not finite"):
        select(model, score=lambda weight, grad: grad * float("inf"), target_modules=["up_proj"])


def test_fewer_batches_and_the_summary_are_said(caplog):
    caplog.set_level(logging.INFO, logger="smt_peft")
    selection = select(tiny_llama(), num_batches=64)
    assert any("held 3 batches, fewer than num_batches=64" in line for line in caplog.messages)
    assert f"chose {selection.summary()}" in caplog.messages
    assert selection.provenance["num_batches"] == 3


def test_provenance_and_file(tmp_path):
    model = tiny_llama()
    selection = select(model)
    record = selection.provenance
    assert (record["score"], record["num_tokens"], record["seed"]) == ("grad_abs", 48, 0)
    other = select(model, [batch(seed=9)] + BATCHES[1:])
    assert other.provenance["data_fingerprint"] != record["data_fingerprint"]
    assert other.provenance["base_fingerprint"] == record["base_fingerprint"] != {}
    selection.save(tmp_path / "s.safetensors")
    loaded = BlockSelection.load(tmp_path / "s.safetensors")
    assert loaded == selection
    assert loaded.provenance == {**record, "block_size": [4, 8]}
    config = SMTConfig(**EVERY)
    assert not select_blocks(model, config, BATCHES, keep_scores=False, progress=False).scores


def test_data_free_scores_need_no_loader():
    model = tiny_gpt2()
    for score in ("magnitude", "low_rank_magnitude", "random", "diagonal"):
        selection = select_blocks(model, SMTConfig(**EVERY | {"score": score}))
        assert selection.provenance["score"] == score
        assert selection.provenance["base_fingerprint"]
        assert bool(selection.scores) == (score in ("magnitude", "low_rank_magnitude"))


def _worker(rank, path, queue):
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = tiny_llama()
    for score in ("grad_abs", "grad_sum_abs", "activation"):
        selection = select(model, BATCHES[:2] if rank == 0 else BATCHES[2:], score=score)
        queue.put(
            (
                rank,
                score,
                {name: value.tolist() for name, value in selection.scores.items()},
                selection.provenance["num_batches"],
            )
        )
    try:
        select(model, raising_loader() if rank == 0 else BATCHES)
    except Exception as error:
        queue.put((rank, "error", type(error).__name__, str(error)))
    torch.distributed.destroy_process_group()


def test_two_processes_hold_the_same_scores(tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=_worker, args=(rank, tmp_path / "store", queue)) for rank in range(2)]
    for worker in workers:
        worker.start()
    answers = {(rank, kind): rest for rank, kind, *rest in (queue.get(timeout=120) for _ in range(8))}
    for worker in workers:
        worker.join(timeout=60)
    torch.manual_seed(0)
    model = tiny_llama()
    for score in ("grad_abs", "grad_sum_abs", "activation"):
        assert answers[0, score] == answers[1, score]
        scores, num_batches = answers[0, score]
        assert num_batches == 3
        for name, expected in select(model, score=score).scores.items():
            torch.testing.assert_close(torch.tensor(scores[name]), expected, rtol=1e-5, atol=1e-9)
    assert answers[0, "error"] == ["OSError", "the disk is gone"]
    assert answers[1, "error"][0] == "RuntimeError" and "another process" in answers[1, "error"][1]
