"""What the optimizer keeps of layers that rest, in bytes and in bits."""

from __future__ import annotations

import gc
from itertools import chain

import pytest
import torch
from scheduled import adapted, optimizer_of, train
from transformers.optimization import Adafactor

from smt_peft.optim import SMTAdamW
from smt_peft.schedules import LayerSampling
from smt_peft.schedules.moments import Moments
from smt_peft.schedules.trained import by_layer, trained_blocks
from smt_peft.training.measures import _stored, _tensors

OPTIMIZERS = {
    "adamw": (torch.optim.AdamW, {}),
    "adamw, fused": (torch.optim.AdamW, {"fused": True}),
    "adamw, amsgrad": (torch.optim.AdamW, {"amsgrad": True}),
    "adafactor": (Adafactor, {"scale_parameter": False, "relative_step": False}),
    "adagrad": (torch.optim.Adagrad, {}),
    "rmsprop": (torch.optim.RMSprop, {"momentum": 0.9}),
    "sgd": (torch.optim.SGD, {"momentum": 0.9}),
    "smt_adamw": (SMTAdamW, {}),
    "smt_adamw_bf16": (SMTAdamW, {"state_dtype": "bfloat16"}),
    "smt_adamw_8bit": (SMTAdamW, {"state_dtype": "8bit"}),
}


def stored(optimizer) -> int:
    return _stored(_tensors(optimizer.state))


def bits(state) -> dict:
    """A state, copied, so that it can be compared when the optimizer has gone on."""
    return {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in state.items()}


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value, other[key]) and value.dtype == other[key].dtype
        if isinstance(value, torch.Tensor)
        else value == other[key]
        for key, value in one.items()
    )


@pytest.mark.parametrize("keeping", ["drop", "move"])
def test_the_optimizer_holds_the_moments_of_the_layers_that_train_and_no_more(keeping):
    model = adapted()
    whole = optimizer_of(model)
    model(input_ids=torch.zeros(1, 2, dtype=torch.long), labels=torch.zeros(1, 2, dtype=torch.long)).loss.backward()
    whole.step()
    of_all = stored(whole)
    model.zero_grad()
    blocks, optimizer, peaks = trained_blocks(model), optimizer_of(model), []

    def look(step):
        held = {name for name, module in blocks.items() if module.weight in optimizer.state}
        assert held <= {name for name, module in blocks.items() if module.weight.requires_grad}
        peaks.append(stored(optimizer))

    train(model, LayerSampling(layers=1, every=2, moments=keeping), 16, optimizer, look)
    # All four layers are alike.
    assert max(peaks) == of_all // 4 and stored(optimizer) <= of_all // 4


def test_dropped_moments_are_given_back_to_the_allocator():
    model = adapted()
    optimizer, schedule = optimizer_of(model), LayerSampling(layers=1, every=1, order="ascending")
    schedule.begin(model, optimizer, 2)
    model(input_ids=torch.zeros(1, 2, dtype=torch.long), labels=torch.zeros(1, 2, dtype=torch.long)).loss.backward()
    optimizer.step()
    gone = {id(tensor) for state in optimizer.state.values() for tensor in state.values()}
    assert gone
    optimizer.zero_grad()
    schedule.after_update(1)
    assert not gone & {id(found) for found in gc.get_objects() if type(found) is torch.Tensor}


@pytest.mark.parametrize("every", [1, 3])
def test_dropped_moments_begin_afresh_in_every_period_also_of_a_layer_that_is_drawn_again(every):
    model = adapted(layers=2)
    blocks, optimizer = trained_blocks(model), optimizer_of(model)

    def look(step):
        counts = {int(state["step"]) for state in optimizer.state.values()}
        assert counts == ({(step - 1) % every} if (step - 1) % every else set())

    train(model, LayerSampling(layers=1, every=every), 12, optimizer, look)
    assert len(blocks) > 2


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moved_moments_come_back_bit_for_bit(name):
    kind, settings = OPTIMIZERS[name]
    model = adapted(layers=3)
    blocks, optimizer = trained_blocks(model), optimizer_of(model, kind, **settings)
    layers = by_layer(blocks)
    noted: dict[str, dict] = {}
    came_back = []

    def look(step):
        # What was noted of the layer when it last trained is what it begins with now.
        for module in layers[f"model.layers.{((step - 1) // 2) % 3}"]:
            if step % 2 == 1 and step > 6:
                assert same(optimizer.state[blocks[module].weight], noted[module])
                came_back.append(module)

    schedule = LayerSampling(layers=1, every=2, order="ascending", moments="move")
    rest = Moments.rest

    def noting(self, parameters):
        parameters = list(parameters)
        noted.update({n: bits(self.optimizer.state[p]) for n, p in parameters if p in self.optimizer.state})
        rest(self, parameters)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Moments, "rest", noting)
        train(model, schedule, 14, optimizer, look)
    assert len(came_back) == 4 * len(layers["model.layers.0"])


def test_moved_moments_go_on_as_if_the_layer_had_never_rested():
    """Two trainings of one layer each, interleaved, are the two by themselves."""
    losses = {}
    weights = {}
    for kind in ("alone", "in turn"):
        model = adapted(layers=2)
        blocks = trained_blocks(model)
        layers = list(by_layer(blocks).values())
        optimizer = optimizer_of(model, lr=1e-2, weight_decay=0.1)
        torch.manual_seed(0)
        gradients = [{name: torch.randn_like(blocks[name].weight) for name in layers[i % 2]} for i in range(10)]
        if kind == "in turn":
            schedule = LayerSampling(layers=1, every=1, order="ascending", moments="move")
            schedule.begin(model, optimizer, 10)
        for step, given in enumerate(gradients, start=1):
            for name, gradient in given.items():
                blocks[name].weight.grad = gradient
            if kind == "in turn":
                schedule.before_update(step)
            optimizer.step()
            optimizer.zero_grad()
            if kind == "in turn":
                schedule.after_update(step)
        weights[kind] = [module.weight.detach().clone() for module in blocks.values()]
        losses[kind] = len(optimizer.state)
    assert all(torch.equal(a, b) for a, b in zip(*weights.values(), strict=True))
    assert losses["in turn"] == losses["alone"] // 2


def test_nested_states_and_plain_numbers_come_back_as_they_were():
    """As of optimizers that keep lists of tensors, and of those that count steps in Python."""
    parameter = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    state = {"step": 7, "factors": [torch.ones(2), (torch.zeros(1), {"a": torch.full((1,), 5.0)})], "name": "x"}
    optimizer.state[parameter] = state
    moments = Moments(optimizer, "move", {"p": parameter})
    moments.rest([("p", parameter)])
    assert parameter not in optimizer.state
    moments.load_state_dict(moments.state_dict())
    moments.wake([("p", parameter)])
    back = optimizer.state[parameter]
    assert back["step"] == 7 and back["name"] == "x" and isinstance(back["factors"][1], tuple)
    tensors = chain(back["factors"][:1], back["factors"][1][:1], back["factors"][1][1].values())
    assert [tensor.tolist() for tensor in tensors] == [[1.0, 1.0], [0.0], [5.0]]


def test_what_lay_on_another_device_than_its_parameter_comes_back_there():
    """PyTorch's AdamW counts steps on the CPU; on a GPU it would wait for the device at every one."""
    parameter = torch.nn.Parameter(torch.zeros(3, device="meta"))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    optimizer.state[parameter] = {"step": torch.tensor(4.0), "exp_avg": torch.zeros(3)}
    moments = Moments(optimizer, "move", {"p": parameter})
    moments.rest([("p", parameter)])
    moments.wake([("p", parameter)])
    assert {key: value.device.type for key, value in optimizer.state[parameter].items()} == {
        "step": "cpu",
        "exp_avg": "cpu",
    }


def test_at_the_end_what_was_moved_away_stays_away():
    """All of it might not fit on the device, for which the layers took turns."""
    model = adapted()
    optimizer = optimizer_of(model)
    schedule = LayerSampling(layers=1, every=1, order="ascending", moments="move")
    train(model, schedule, 4, optimizer)
    # Step 4 has switched to the first layer again, whose moments are there.
    names = by_layer(trained_blocks(model))["model.layers.0"]
    assert {id(parameter) for parameter in optimizer.state} == {id(trained_blocks(model)[n].weight) for n in names}
    assert not schedule.state_dict()["moments"]


def test_an_optimizer_that_lacks_blocks_is_refused_by_name():
    model = adapted()
    blocks = trained_blocks(model)
    first, *others = (module.weight for module in blocks.values())
    with pytest.raises(ValueError, match=rf"AdamW does not hold the blocks of {next(iter(blocks))} \(1 of 28"):
        LayerSampling().begin(model, torch.optim.AdamW(others), 10)
    assert all(module.weight.requires_grad for module in blocks.values())
    assert first.requires_grad


def test_a_paged_optimizer_is_refused_by_name():
    model = adapted()
    optimizer = optimizer_of(model)
    optimizer.is_paged = True
    with pytest.raises(ValueError, match="optim: the pages of a paged optimizer"):
        LayerSampling().begin(model, optimizer, 10)
    assert all(module.weight.requires_grad for module in trained_blocks(model).values())
