"""Layer sampling: which layers train, and that they train as the papers say."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
import torch
from helpers import batch
from scheduled import adapted, optimizer_of, train
from torch import nn

from smt_peft import SMTConfig
from smt_peft.optim import SMTAdamW
from smt_peft.presets import preset
from smt_peft.schedules import LayerSampling
from smt_peft.schedules.trained import by_layer, trained_blocks


def layers_by_step(model, schedule, steps: int, optimizer) -> list[set[str]]:
    """The layers that have a gradient, step by step; all modules of a layer have one or none has."""
    blocks = trained_blocks(model)
    layers, seen = by_layer(blocks), []

    def look(step):
        with_gradient = {name for name, module in blocks.items() if module.weight.grad is not None}
        seen.append({layer for layer, names in layers.items() if with_gradient & set(names)})
        assert with_gradient == {name for layer in seen[-1] for name in layers[layer]}
        assert all(module.weight.requires_grad == (name in with_gradient) for name, module in blocks.items())

    train(model, schedule, steps, optimizer, look)
    return seen


def numbers(seen: list[set[str]]) -> list[list[int]]:
    return [sorted(int(layer.rpartition(".")[2]) for layer in active) for active in seen]


@pytest.mark.parametrize("kind", [torch.optim.AdamW, SMTAdamW])
def test_as_many_layers_train_as_asked_for_and_others_after_a_period(kind):
    model = adapted(layers=4)
    seen = layers_by_step(model, LayerSampling(layers=2, every=3), 30, optimizer_of(model, kind))
    assert all(len(active) == 2 for active in seen)
    assert all(seen[start] == seen[start + 1] == seen[start + 2] for start in range(0, 30, 3))
    assert len({frozenset(active) for active in seen}) > 3
    assert set().union(*seen) == set(by_layer(trained_blocks(model)))


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("ascending", [[0, 1], [2, 3], [4], [0, 1], [2, 3]]),
        ("descending", [[3, 4], [1, 2], [0], [3, 4], [1, 2]]),
    ],
)
def test_layers_come_from_the_input_up_or_from_the_output_down(order, expected):
    model = adapted(layers=5)
    seen = layers_by_step(model, LayerSampling(layers=2, every=1, order=order), 5, optimizer_of(model))
    assert numbers(seen) == expected


def test_every_layer_comes_once_a_round_in_an_order_of_its_own():
    model = adapted(layers=4)
    seen = numbers(layers_by_step(model, LayerSampling(layers=1, every=1, order="shuffle"), 32, optimizer_of(model)))
    rounds = [[layer for [layer] in seen[start : start + 4]] for start in range(0, 32, 4)]
    assert all(sorted(each) == [0, 1, 2, 3] for each in rounds)
    assert len(set(map(tuple, rounds))) > 3


def test_a_round_whose_layers_do_not_divide_ends_with_those_that_are_left():
    schedule, layers = LayerSampling(layers=2, order="shuffle"), list("abcde")
    turns = [schedule.turn(layers, period) for period in range(6)]
    assert [len(turn) for turn in turns] == [2, 2, 1, 2, 2, 1]
    assert sorted(sum(turns[:3], [])) == sorted(sum(turns[3:], [])) == layers


def test_draws_hang_on_nothing_but_seed_and_period_and_are_even():
    schedule, layers = LayerSampling(layers=1), list("abcd")
    drawn = Counter(schedule.turn(layers, period)[0] for period in range(2000))
    # Of a fair draw, four standard deviations: 4 * sqrt(2000 * 1/4 * 3/4) = 77.
    assert all(abs(count - 500) < 78 for count in drawn.values())
    # What came before says nothing of what comes: a layer follows itself as often as any other.
    again = sum(a == b for a, b in pairwise(schedule.turn(layers, period) for period in range(2000)))
    assert abs(again - 500) < 78
    assert schedule.turn(layers, 7) == LayerSampling(layers=1).turn(layers, 7)
    assert any(schedule.turn(layers, p) != LayerSampling(layers=1, seed=1).turn(layers, p) for p in range(8))


def test_fixed_layers_stay_those_of_the_first_draw():
    model = adapted(layers=4)
    seen = layers_by_step(model, LayerSampling(layers=2, every=1, order="fixed"), 6, optimizer_of(model))
    assert all(active == seen[0] for active in seen)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, SMTAdamW])
def test_block_coordinate_descent_by_hand_gives_the_same_numbers(kind):
    """BAdam (arXiv 2404.02827, Algorithm 1): one layer at a time, each time with an Adam of its own."""
    model, every, rounds = adapted(layers=3), 2, 2
    schedule = LayerSampling(layers=1, every=every, order="ascending")
    losses = train(model, schedule, 3 * every * rounds, optimizer_of(model, kind, lr=1e-2, weight_decay=0.1))
    plain = adapted(layers=3)
    blocks = trained_blocks(plain)
    by_hand = []
    for names in list(by_layer(blocks).values()) * rounds:
        optimizer = kind([blocks[name].weight for name in names], lr=1e-2, weight_decay=0.1)
        for _ in range(every):
            loss = plain(**batch(seed=len(by_hand) + 1)).loss
            plain.zero_grad()
            loss.backward()
            optimizer.step()
            by_hand.append(loss.item())
    assert losses == by_hand
    for name, module in trained_blocks(model).items():
        assert torch.equal(module.weight, blocks[name].weight) and module.weight.any()


def test_resting_blocks_do_not_change_whatever_the_weight_decay():
    model = adapted()
    blocks, optimizer = trained_blocks(model), optimizer_of(model, lr=1e-2, weight_decay=0.5)
    before, resting = {}, {}

    def look(step):
        for name, module in blocks.items():
            if name in before and resting[name]:
                assert torch.equal(module.weight, before[name])
            before[name] = module.weight.detach().clone()
            resting[name] = not module.weight.requires_grad

    train(model, LayerSampling(layers=1, every=2, order="ascending"), 12, optimizer, look)
    assert all(module.weight.requires_grad and module.weight.any() for module in blocks.values())


def test_blocks_outside_of_the_layers_always_train():
    model = adapted(target_modules=["q_proj", "lm_head"])
    blocks = trained_blocks(model)
    seen = []
    train(
        model,
        LayerSampling(layers=1, every=1),
        4,
        optimizer_of(model),
        lambda step: seen.append({name for name, module in blocks.items() if module.weight.grad is not None}),
    )
    assert all("lm_head" in active and len(active) == 2 for active in seen)


def test_what_is_trained_besides_blocks_always_trains_and_keeps_its_moments():
    model = adapted(modules_to_save=["lm_head"])
    head = next(p for name, p in model.named_parameters() if "lm_head.modules_to_save" in name and p.requires_grad)
    optimizer = optimizer_of(model)

    def look(step):
        assert head.requires_grad and head.grad is not None
        assert int(optimizer.state[head]["step"]) == step - 1 if step > 1 else head not in optimizer.state

    train(model, LayerSampling(layers=1, every=1), 5, optimizer, look)


def test_blocks_outside_of_the_layers_keep_their_moments_when_those_of_layers_are_dropped():
    model = adapted(target_modules=["q_proj", "lm_head"])
    blocks, optimizer = trained_blocks(model), optimizer_of(model)

    def look(step):
        if step > 1:
            assert int(optimizer.state[blocks["lm_head"].weight]["step"]) == step - 1
        active = next(n for n, module in blocks.items() if n != "lm_head" and module.weight.grad is not None)
        assert blocks[active].weight not in optimizer.state

    train(model, LayerSampling(layers=1, every=1), 6, optimizer, look)


def test_the_norm_that_clipping_sees_is_that_of_the_layers_that_train():
    model = adapted()
    blocks, norms = trained_blocks(model), []

    def look(step):
        active = [module.weight.grad for module in blocks.values() if module.weight.requires_grad]
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        norms.append((norm.item(), torch.cat([grad.flatten() for grad in active]).norm().item()))

    expected = []

    def watch(step):
        expected.append(
            torch.cat([m.weight.grad.flatten() for m in blocks.values() if m.weight.requires_grad]).norm().item()
        )
        look(step)

    train(model, LayerSampling(layers=1, every=2), 4, optimizer_of(model), watch)
    for (norm, clipped), before in zip(norms, expected, strict=True):
        assert norm == pytest.approx(before, rel=1e-5) and clipped <= before


def test_two_adapters_that_train_at_once_are_refused_by_name():
    model = adapted()
    model.add_adapter("other", SMTConfig(block_size=4, density=0.05, score="random"))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="default, other all train"):
        LayerSampling().begin(model, optimizer_of(model), 10)


def test_gradients_that_are_accumulated_are_all_of_the_same_layers():
    """Two batches to an update are as one of both, across a change of layers."""

    def trained(accumulated: bool) -> list[torch.Tensor]:
        model = adapted()
        optimizer, schedule = optimizer_of(model, lr=1e-2), LayerSampling(layers=1, every=2)
        schedule.begin(model, optimizer, 6)
        for step in range(1, 7):
            halves = [batch(rows=2, seed=10 * step + half) for half in range(2)]
            whole = {key: torch.cat([half[key] for half in halves]) for key in halves[0]}
            for rows in halves if accumulated else [whole]:
                (model(**rows).loss / (2 if accumulated else 1)).backward()
            schedule.before_update(step)
            optimizer.step()
            optimizer.zero_grad()
            schedule.after_update(step)
        return [module.weight.detach() for module in trained_blocks_at_rest(model)]

    def trained_blocks_at_rest(model):
        return [module for name, module in model.named_modules() if name.endswith("smt_blocks.default")]

    for ours, truth in zip(trained(True), trained(False), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-3, atol=1e-6)


def test_a_training_that_was_cut_off_begins_again_with_all_layers():
    model = adapted()
    optimizer, schedule = optimizer_of(model), LayerSampling(layers=1, every=1, order="ascending")
    schedule.begin(model, optimizer, 10)
    with pytest.raises(ValueError, match=r"layers\.1\..* require no gradient.*set_adapter\('default'\)"):
        LayerSampling(layers=1).begin(model, optimizer, 10)
    assert len(set().union(*map(frozenset, layers_by_step_after(schedule, model, optimizer)))) == 4


def layers_by_step_after(schedule, model, optimizer) -> list[set[str]]:
    seen = []
    train(model, schedule, 4, optimizer, lambda step: seen.append(set(schedule.turn(list(schedule._layers), step - 1))))
    return seen


@pytest.mark.parametrize(
    ("names", "layers"),
    [
        (["model.layers.0.a", "model.layers.0.b", "model.layers.1.a"], ["model.layers.0", "model.layers.1"]),
        (["0.auto_model.layers.0.a", "0.auto_model.layers.1.a"], ["0.auto_model.layers.0", "0.auto_model.layers.1"]),
        (["vision.layers.0.a", "text.layers.0.a"], ["vision.layers.0", "text.layers.0"]),
        (["layers.0.experts.0.a", "layers.0.experts.1.a", "layers.1.experts.0.a"], ["layers.0", "layers.1"]),
        (["model.layers.3.a", "lm_head"], ["model.layers.3"]),
        (["embed_tokens", "lm_head"], []),
    ],
)
def test_modules_belong_to_the_layer_that_their_path_numbers(names, layers):
    assert list(by_layer(dict.fromkeys(names))) == layers


def test_low_rank_pairs_beside_the_blocks_are_refused_by_name():
    model = adapted(lora_rank=2)
    with pytest.raises(ValueError, match="low-rank pairs beside its blocks .lora_rank."):
        LayerSampling().begin(model, optimizer_of(model), 10)


def test_more_layers_than_there_are_is_refused_by_name():
    model = adapted(layers=2)
    with pytest.raises(ValueError, match="layers=3 train at a time, but only 2"):
        LayerSampling(layers=3).begin(model, optimizer_of(model), 10)


@pytest.mark.parametrize(
    "wrong",
    [
        {"layers": 0},
        {"layers": 2.5},
        {"layers": True},
        {"every": 0},
        {"every": "3"},
        {"seed": None},
        {"order": "sideways"},
        {"moments": "burn"},
    ],
)
def test_settings_out_of_range_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        LayerSampling(**wrong)


def test_any_whole_number_is_a_seed():
    layers = [str(i) for i in range(8)]
    for seed in (-1, 10**13, 10**30):
        assert len(LayerSampling(seed=seed).turn(layers, 5)) == 2


def test_the_presets_are_the_papers():
    assert LayerSampling(**preset("lisa")["layer_sampling"]) == LayerSampling(2, 20, "draw", "drop")
    assert LayerSampling(**preset("badam")["layer_sampling"]) == LayerSampling(1, 100, "shuffle", "drop")
