"""A borrowed model is still while it is scored and is handed back exactly as it was found."""

import copy

import pytest
import torch
from helpers import tiny_gpt2, tiny_llama
from mixtures import EXPERTS, tiny_mixtral
from peft import LoraConfig, get_peft_model
from test_warmup import BATCHES, EVERY, raising_loader, select
from torch.utils.data import DataLoader

from smt_peft import SMTConfig, select_blocks


def test_dropout_makes_no_noise():
    quiet, noisy = tiny_gpt2(), tiny_gpt2()
    noisy.load_state_dict(quiet.state_dict())
    noisy.train()
    quiet.eval()
    assert noisy.config.attn_pdrop > 0
    for prepare in (lambda model: None, lambda model: model.gradient_checkpointing_enable()):
        prepare(noisy)
        for name, expected in select(quiet).scores.items():
            torch.testing.assert_close(select(noisy).scores[name], expected, rtol=0, atol=0)


def snapshot(model):
    """All that must be found again afterwards."""
    hooks = (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_backward_hooks",
        "_backward_pre_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_pre_hooks_with_kwargs",
        "_forward_hooks_always_called",
    )
    return {
        "weights": {n: p.detach().clone() for n, p in model.state_dict().items()},
        "grads": {n: (id(p.grad), None if p.grad is None else p.grad.clone()) for n, p in model.named_parameters()},
        "flags": {n: p.requires_grad for n, p in model.named_parameters()},
        "modes": {n: m.training for n, m in model.named_modules()},
        "hooks": {(n, h): list(getattr(m, h)) for n, m in model.named_modules() for h in hooks},
        "attributes": {n: sorted(vars(m)) for n, m in model.named_modules()},
        "rng": torch.get_rng_state(),
        "use_cache": model.config.use_cache,
        "checkpointing": [getattr(m, "_gradient_checkpointing_func", None) for m in model.modules()],
    }


def same(one, two):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(same, one, two))
    return one == two


def marked(model):
    """A model in a state of its own: gradients, frozen parts, mixed modes, hooks."""
    model.train()
    model(**BATCHES[2]).loss.backward()
    model.get_input_embeddings().weight.requires_grad_(False)
    next(model.children()).eval()
    model.get_input_embeddings().register_forward_hook(lambda m, args, out: None)
    return model


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("score", ["grad_abs", "grad_sum_abs", "activation", "magnitude"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_everything_is_left_as_found(build, score, checkpointed):
    model = marked(build())
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    config = SMTConfig(**EVERY | {"score": score})
    settings = copy.deepcopy(config.to_dict())
    before = snapshot(model)
    loader = DataLoader(BATCHES, batch_size=None, shuffle=True)
    first = select_blocks(model, config, loader, 2, progress=False)
    for part, expected in before.items():
        assert same(expected, snapshot(model)[part]), part
    assert config.to_dict() == settings
    torch.rand(3)
    assert select_blocks(model, config, loader, 2, progress=False) == first, "the seed decides, not the random state"


@pytest.mark.parametrize(
    "fail",
    [
        {"batches": raising_loader(), "expected": (OSError, "the disk is gone")},
        {"batches": [BATCHES[0], {"input_ids": "text"}], "expected": (RuntimeError, "batch 2: the model refused it")},
        {
            "loss_fn": lambda model, each: model(**each).loss * float("nan"),
            "expected": (ValueError, "batch 1: the loss is nan"),
        },
        {
            "score": lambda weight, grad: 1 / 0,
            "expected": (ValueError, "the score function raised ZeroDivisionError: division by zero"),
        },
    ],
)
def test_everything_is_left_as_found_after_an_error(fail):
    fail = dict(fail)
    kind, message = fail.pop("expected")
    model = marked(tiny_llama())
    before = snapshot(model)
    with pytest.raises(kind, match=message) as caught:
        select(model, **fail)
    assert caught.value is not None
    for part, expected in before.items():
        assert same(expected, snapshot(model)[part]), part


def test_peft_model_is_scored_without_its_adapter():
    torch.manual_seed(1)
    base = tiny_llama()
    plain = select(copy.deepcopy(base))
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight.requires_grad_(False)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    found = select(model)
    assert found == plain
    assert flags == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with torch.no_grad():
        with model.disable_adapter():
            off = model(**BATCHES[0]).loss
        assert model(**BATCHES[0]).loss != off, "the adapter is on again"
    model.merge_adapter()
    with pytest.raises(ValueError, match="q_proj: an adapter is merged .*unmerge_adapter"):
        select(model)


@pytest.mark.parametrize("score", ["grad_abs", "activation"])
def test_a_model_with_an_adapter_inside_is_scored_without_it(score):
    config = SMTConfig(
        target_modules=["q_proj", "embed_tokens"] if score == "grad_abs" else ["q_proj"],
        target_parameters=EXPERTS,
        density=0.2,
        block_size=8,
        score=score,
    )
    torch.manual_seed(1)
    model = tiny_mixtral().eval()
    plain = select_blocks(model, config, BATCHES, 2, keep_scores=True, progress=False)
    model.add_adapter(
        SMTConfig(
            target_modules=["q_proj", "embed_tokens"], target_parameters=EXPERTS, score="random", init_weights=False
        )
    )
    on = model(**BATCHES[0]).loss
    again = select_blocks(model, config, BATCHES, 2, keep_scores=True, progress=False)
    for name, scores in plain.scores.items():
        assert torch.equal(again.scores[name], scores), name
    assert torch.equal(model(**BATCHES[0]).loss, on), "the adapter is on again"
