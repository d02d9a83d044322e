"""SMT layers train what they should, exactly, and give the base back bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import Mlp, batch, tiny_gpt2, tiny_llama
from peft import PeftModel, get_peft_model

from smt_peft import BlockSelection, SMTConfig
from smt_peft.tuner.layer import SMTLayer

ALL = {"target_modules": "all-linear", "score": "random"}


def smt_layers(model) -> dict[str, SMTLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, SMTLayer)}


def base_weights(model) -> dict[str, torch.Tensor]:
    """Weights of the base under the names they have without the tuner."""
    return {
        name.replace(".base_layer", "").removeprefix("base_model.model."): p.detach().clone()
        for name, p in model.named_parameters()
        if ".smt_blocks." not in name
    }


def assert_same(ours: dict, expected: dict) -> None:
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(ours[name], tensor), name


def train(model, steps: int = 5, same_batch: bool = False, autocast: torch.dtype | None = None) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    model.train()
    for step in range(steps):
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            loss = model(**batch(seed=0 if same_batch else step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("forward", ["swap", "additive"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("block_size", [8, (-1, 1), 7], ids=str)
def test_all_blocks_train_like_full_fine_tuning(forward, optimizer, block_size):
    full = Mlp(torch.float64)
    tuned = get_peft_model(copy.deepcopy(full), SMTConfig(**ALL, density=1.0, block_size=block_size, forward=forward))
    full.up.bias.requires_grad_(False)
    full.down.bias.requires_grad_(False)

    def run(model):
        trained = [p for p in model.parameters() if p.requires_grad]
        make = torch.optim.SGD if optimizer == "sgd" else torch.optim.AdamW
        # No weight decay: it pulls full fine-tuning toward zero and a delta toward the base.
        steps = make(trained, lr=1e-2, weight_decay=0.0)
        generator = torch.Generator().manual_seed(1)
        losses = []
        for _ in range(20):
            x, y = (torch.randn(9, n, dtype=torch.float64, generator=generator) for n in (20, 12))
            loss = torch.nn.functional.mse_loss(model(x), y)
            loss.backward()
            steps.step()
            steps.zero_grad()
            losses.append(loss.item())
        return torch.tensor(losses, dtype=torch.float64)

    expected = run(full)
    assert expected[-1] < 0.98 * expected[0]
    assert torch.allclose(run(tuned), expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("forward", ["swap", "additive"])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_block_gradients_are_the_dense_gradients_sub_blocks(make, forward):
    model = make().double()
    tuned = get_peft_model(copy.deepcopy(model), SMTConfig(**ALL, density=0.2, block_size=8, forward=forward)).train()
    dense = dict(model.train().requires_grad_(True).named_modules())
    torch.manual_seed(3)
    model(**batch()).loss.backward()
    torch.manual_seed(3)
    tuned(**batch()).loss.backward()
    for name, layer in smt_layers(tuned).items():
        blocks = layer.smt_blocks["default"]
        grad = dense[name.removeprefix("base_model.model.")].weight.grad
        grad = grad.t() if type(layer.base_layer).__name__ == "Conv1D" else grad
        for ours, (row, col) in zip(blocks.weight.grad, blocks.index.tolist(), strict=True):
            true = grad[row * 8 : row * 8 + 8, col * 8 : col * 8 + 8]
            assert torch.allclose(ours, true, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_the_base_comes_back_bit_for_bit(make, dtype):
    base = make().to(dtype)
    before = base_weights(base)
    model = get_peft_model(base, SMTConfig(**ALL, density=0.3, block_size=8))
    train(model)
    assert_same(base_weights(model), before)
    model.eval()
    tuned = model(**batch()).logits
    with model.disable_adapter():
        plain = model(**batch()).logits
    assert not torch.equal(tuned, plain)

    model.merge_adapter()
    assert not torch.equal(base_weights(model)[next(iter(smt_names(model)))], before[next(iter(smt_names(model)))])
    with model.disable_adapter():
        assert torch.equal(model(**batch()).logits, plain)
        assert_same(base_weights(model), before)
    model.merge_adapter()
    model.unmerge_adapter()
    assert_same(base_weights(model), before)

    model.add_adapter("other", SMTConfig(**ALL, density=0.2, block_size=4, seed=9, init_weights=False))
    model.set_adapter("other")
    assert not torch.equal(model(**batch()).logits, tuned)
    model.merge_adapter(["default", "other"])
    model.unmerge_adapter()
    model.set_adapter("default")
    assert torch.equal(model(**batch()).logits, tuned)
    assert_same(base_weights(model), before)
    assert_same(base_weights(model.unload()), before)


def smt_names(model):
    return [f"{name.removeprefix('base_model.model.')}.weight" for name in smt_layers(model)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merged_equals_swap_exactly(dtype):
    model = get_peft_model(
        tiny_llama().to(dtype), SMTConfig(**ALL, density=0.3, block_size=8, forward="swap", init_weights=False)
    ).eval()
    with torch.no_grad():
        swapped = model(**batch()).logits
        assert torch.equal(model.merge_and_unload()(**batch()).logits, swapped)


def test_a_damaged_index_is_merged_into_no_layer():
    model = get_peft_model(Mlp(), SMTConfig(target_modules=["up", "down"], score="random", init_weights=False))
    up, down = model.base_model.model.up, model.base_model.model.down
    before = up.base_layer.weight.clone()
    down.smt_blocks["default"].index[-1] = 10**6
    with pytest.raises(ValueError, match="down: block .* lies outside the grid"):
        model.merge_adapter()
    assert torch.equal(up.base_layer.weight, before) and not up.merged


def test_safe_merge_leaves_the_base_when_a_block_is_not_finite():
    model = get_peft_model(tiny_llama(), SMTConfig(**ALL, density=0.3, block_size=8, init_weights=False))
    before = base_weights(model)
    *_, last = smt_layers(model).values()
    with torch.no_grad():
        last.smt_blocks["default"].weight[0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaNs detected.*down_proj"):
        last.merge(safe_merge=True)
    assert_same(base_weights(model), before)
    assert not last.merged


def accumulated_gradients(seeds, reentrant=None) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(), SMTConfig(**ALL, density=0.2, block_size=8)).train()
    if reentrant is not None:
        model.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.base_model.model.enable_input_require_grads()
    for seed in seeds:
        model(**batch(seed=seed), use_cache=False).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_gradient(reentrant):
    assert_same(accumulated_gradients([0, 1], reentrant), accumulated_gradients([0, 1]))


def test_gradients_of_several_batches_add_up():
    one, two = accumulated_gradients([0]), accumulated_gradients([1])
    assert_same(accumulated_gradients([0, 1]), {name: grad + two[name] for name, grad in one.items()})


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
def test_training_under_autocast(autocast):
    model = get_peft_model(tiny_llama(), SMTConfig(**ALL, density=0.3, block_size=8))
    before = base_weights(model)
    losses = train(model, steps=8, same_batch=True, autocast=autocast)
    assert losses[-1] < losses[0] - 0.1
    assert_same(base_weights(model), before)


def test_blocks_of_a_half_precision_base_are_fp32_and_learn():
    model = get_peft_model(tiny_llama().to(torch.bfloat16), SMTConfig(**ALL, density=0.3, block_size=8))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    losses = train(model, steps=8, same_batch=True)
    assert losses[-1] < losses[0] - 0.1


def test_layers_without_a_block_are_not_wrapped_and_need_no_backward():
    base = tiny_llama(layers=3)
    config = SMTConfig(**ALL, density=0.1, block_size=8)
    name = "model.layers.2.mlp.down_proj"
    from smt_peft.bases.targets import find_targets
    from smt_peft.selection import select_without_data

    every = select_without_data(find_targets(base, config), config)
    config.selection = BlockSelection({name: every.blocks[name]}, every.grids)
    model = get_peft_model(base, config).train()
    assert list(smt_layers(model)) == [f"base_model.model.{name}"]
    seen = []
    model.base_model.model.model.layers[1].register_forward_hook(lambda *args: seen.append(args[2]))
    model(**batch()).loss.backward()
    output = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    assert not output.requires_grad


def test_several_active_adapters_add_up():
    model = get_peft_model(tiny_llama(), SMTConfig(**ALL, density=0.2, block_size=8, init_weights=False)).eval()
    model.add_adapter("other", SMTConfig(**ALL, density=0.2, block_size=4, seed=5, init_weights=False))
    model.base_model.set_adapter(["default", "other"])
    with torch.no_grad():
        both = model(**batch()).logits
        merged = model.merge_and_unload()(**batch()).logits
    assert torch.allclose(both, merged, atol=1e-5)


def test_rows_of_a_batch_can_have_their_own_adapter():
    model = get_peft_model(tiny_llama(), SMTConfig(**ALL, density=0.2, block_size=8, init_weights=False)).eval()
    model.add_adapter("other", SMTConfig(**ALL, density=0.2, block_size=4, seed=5, init_weights=False))
    ids = batch(rows=3)["input_ids"]
    with torch.no_grad():
        mixed = model(input_ids=ids, adapter_names=["other", "__base__", "default"]).logits
        single = {}
        for name in ("default", "other"):
            model.set_adapter(name)
            single[name] = model(input_ids=ids).logits
        with model.disable_adapter():
            single["__base__"] = model(input_ids=ids).logits
    for row, name in enumerate(["other", "__base__", "default"]):
        assert torch.allclose(mixed[row], single[name][row], atol=1e-5)


class TestGate:
    @staticmethod
    def model(**settings):
        return get_peft_model(Mlp(), SMTConfig(**ALL, density=0.3, block_size=4, init_weights=False, **settings))

    @staticmethod
    def told(model, x=None):
        model(torch.randn(3, 20) if x is None else x)
        return {layer._told for layer in smt_layers(model).values()}

    def test_training_swaps_and_evaluation_adds(self):
        model = self.model()
        assert self.told(model.train()) == {"swap"}
        assert self.told(model.eval()) == {"additive"}
        assert "forward=additive" in repr(model)
        assert self.told(self.model(forward="swap").eval()) == {"swap"}
        assert self.told(self.model(forward="additive").train()) == {"additive"}

    def test_hooks_on_the_base_layer_run(self):
        model = self.model().train()
        called = []
        for layer in smt_layers(model).values():
            layer.base_layer.register_forward_hook(lambda *_: called.append(1))
        assert self.told(model) == {"additive"} and len(called) == 2

    @pytest.mark.parametrize("change", ["trainable", "shared", "replaced", "subclass"])
    def test_what_must_not_be_written_is_added_to(self, change):
        model = self.model().train()
        x = torch.randn(3, 20)
        expected = model(x)
        for layer in smt_layers(model).values():
            base = layer.base_layer
            if change == "trainable":
                base.weight.requires_grad_()
            elif change == "shared":
                base.weight.share_memory_()
            elif change == "replaced":
                base.forward = type(base).forward.__get__(base)
            else:
                base.__class__ = type("Special", (torch.nn.Linear,), {})
        assert self.told(model, x) == {"additive"}
        assert torch.allclose(model(x), expected, atol=1e-5)

    def test_a_forced_swap_that_cannot_run_is_an_error(self):
        model = self.model(forward="swap")
        smt_layers(model)["base_model.model.up"].base_layer.register_forward_hook(lambda *_: None)
        with pytest.raises(RuntimeError, match="up: forward='swap' is set, but hooks.*forward='auto'"):
            model(torch.randn(3, 20))

    def test_overlay_is_refused_on_a_plain_layer(self):
        with pytest.raises(ValueError, match="up: forward='overlay' serves quantised"):
            self.model(forward="overlay")

    def test_func_transforms_and_export_take_the_traceable_form(self):
        model = self.model().train()
        x = torch.randn(5, 20)
        expected = model(x)
        assert torch.allclose(torch.vmap(model)(x[:, None])[:, 0], expected, atol=1e-5)
        jacobian = torch.func.jacrev(model)(x[0])
        assert jacobian.shape == (12, 20)
        exported = torch.export.export(model.eval(), (x,)).module()
        assert torch.allclose(exported(x), expected, atol=1e-5)

    @pytest.mark.parametrize("lead", [(), (0,), (4,), (2, 3), (2, 3, 2)], ids=str)
    def test_inputs_of_any_rank(self, lead):
        model = self.model()
        x = torch.randn(*lead, 20)
        merged = copy.deepcopy(model).merge_and_unload()
        for mode in (model.train(), model.eval()):
            y = mode(x)
            y.sum().backward()
            assert torch.allclose(y, merged(x), atol=1e-5)


def test_deepcopy_and_state_dict_round_trips():
    model = get_peft_model(tiny_llama(), SMTConfig(**ALL, density=0.2, block_size=8, init_weights=False)).eval()
    expected = model(**batch()).logits
    assert torch.equal(copy.deepcopy(model)(**batch()).logits, expected)
    other = get_peft_model(tiny_llama(), SMTConfig(**ALL, density=0.2, block_size=8, seed=7)).eval()
    assert not torch.equal(other(**batch()).logits, expected)
    # The positions travel with the state dict, and the layouts derived from them follow.
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(**batch()).logits, expected)


def test_effective_parameter_count_leaves_padding_out():
    model = get_peft_model(Mlp(), SMTConfig(**ALL, density=1.0, block_size=8))
    assert isinstance(model, PeftModel)
    trainable, total = model.base_model.get_nb_trainable_parameters()
    assert trainable == 20 * 36 + 36 * 12
    assert total == trainable + sum(p.numel() for p in Mlp().parameters())
