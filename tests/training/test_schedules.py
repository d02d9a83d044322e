"""Schedules in a run: from YAML to checkpoints."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from runs import Workshop, assert_resumed_alike
from safetensors.torch import load_file

from smt_peft import BlockSelection
from smt_peft.report.files import FINAL_SELECTION, read_run
from smt_peft.schedules import Freezing, LayerSampling
from smt_peft.training import outputs
from smt_peft.training.errors import ConfigError
from smt_peft.training.run import train
from smt_peft.training.yaml.schema import load_run


@pytest.fixture(scope="module")
def workshop(workshop, tmp_path_factory) -> Workshop:
    """The same model and data in a place of its own, as a run refuses a directory that holds another's."""
    return replace(workshop, directory=tmp_path_factory.mktemp("schedules"))


#: Settings of each by which something changes before and after the checkpoint of step 4.
BLOCKS = {
    "layer_sampling": {"layers": 1, "every": 3, "moments": "move"},
    # The checkpoint falls into an interval.
    "freezing": {"share": 0.7, "every": 3},
}


def test_moved_moments_of_8_bits_go_on_from_a_checkpoint(workshop, tmp_path):
    assert_resumed_alike(
        replace(workshop, directory=tmp_path), optim="smt_adamw_8bit", layer_sampling=BLOCKS["layer_sampling"]
    )


def test_a_run_that_drops_moments_goes_on_from_a_checkpoint_between_two_periods(workshop, tmp_path):
    assert_resumed_alike(
        replace(workshop, directory=tmp_path), layer_sampling={"layers": 1, "every": 4, "order": "shuffle"}
    )


@pytest.mark.parametrize("optim", ["smt_adamw", "smt_adamw_bf16", "smt_adamw_8bit"])
@pytest.mark.parametrize("dropped", ["revert", "keep"])
def test_regrown_blocks_go_on_from_a_checkpoint(workshop, tmp_path, optim, dropped):
    """One that is saved while scores are gathered, and after blocks were replaced."""
    regrowth = {"every": 3, "score_steps": 3, "share": 0.9, "dropped": dropped}
    assert_resumed_alike(replace(workshop, directory=tmp_path), optim=optim, regrowth=regrowth)


@pytest.mark.parametrize("dropped", ["revert", "keep"])
def test_the_blocks_at_the_end_lie_beside_those_of_the_start(workshop, tmp_path, dropped):
    """The adapter is verified against them, and a run that was cut off after its last step ends as it would have."""
    workshop = replace(workshop, directory=tmp_path)
    regrowth = {"every": 2, "score_steps": 1, "share": 0.9, "dropped": dropped}
    steps = {"save_strategy": "steps", "save_steps": 8, "optim": "smt_adamw"}
    path = workshop.write("run", regrowth=regrowth, verify=True, **steps)
    metrics = train(load_run(path))
    assert metrics["verified"]["selected"] and all(metrics["verified"]["passed"].values())
    directory = tmp_path / "run"
    start, final = (BlockSelection.load(directory / name) for name in (outputs.SELECTION, FINAL_SELECTION))
    assert start != final and final.provenance["regrown_blocks"] > 0
    assert metrics["trainable_parameters"] == start.effective_numel
    assert (final.num_blocks > start.num_blocks) == (dropped == "keep")
    assert read_run(directory).selection == final
    assert final.summary() in (directory / outputs.REPORT).read_text()
    trained = load_file(directory / "adapter_model.safetensors")
    # Saved, and neither verified nor reported; then not saved either.
    for lost in ((outputs.METRICS,), (outputs.METRICS, "adapter_model.safetensors", FINAL_SELECTION)):
        for name in lost:
            (directory / name).unlink()
        again = train(load_run(path))
        assert again["trainable_parameters"] == metrics["trainable_parameters"]
        assert again["after"]["eval_loss"] == metrics["after"]["eval_loss"]
        saved = load_file(directory / "adapter_model.safetensors")
        assert saved.keys() == trained.keys() and all(torch.equal(saved[key], trained[key]) for key in saved)
        assert BlockSelection.load(directory / FINAL_SELECTION) == final


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"optim": "adamw_torch"}, "optim: adamw_torch counts no steps by block.*say smt_adamw or"),
        ({}, "optim: adamw_torch counts no steps by block"),
        ({"optim": "smt_adamw", "layer_sampling": {}}, "both decide which blocks train; leave one of them out"),
        ({"optim": "smt_adamw", "torch_compile": True}, "regrowth watches layers that torch_compile"),
        ({"optim": "smt_adamw", "fsdp": "full_shard"}, "regrowth changes what trains, which FSDP does not follow"),
        (
            {"optim": "smt_adamw", "regrowth": {"every": 3}},
            "score_steps=5 do not fit between two reselections, every=3",
        ),
        ({"optim": "smt_adamw", "regrowth": {"dropped": "burn"}}, "regrowth.dropped must be 'revert' or 'keep'"),
    ],
)
def test_what_regrowth_does_not_go_with_is_said_with_its_line(workshop, changed, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_run(workshop.write("wrong", **{"regrowth": {}} | changed))
    assert "line" in str(caught.value)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("optim", ["adamw_torch", "smt_adamw"])
def test_a_run_goes_on_from_its_checkpoint_as_if_it_had_not_stopped(workshop, tmp_path, name, optim):
    assert_resumed_alike(replace(workshop, directory=tmp_path), optim=optim, **{name: BLOCKS[name]})


def test_a_block_reaches_its_schedule_and_the_settings_that_are_saved(workshop):
    run = load_run(workshop.write("blocks", layer_sampling={"layers": 1}), ["layer_sampling.every=7"])
    assert run.schedules == (LayerSampling(layers=1, every=7),)
    assert run.resolved["layer_sampling"] == {
        "layers": 1,
        "every": 7,
        "order": "draw",
        "moments": "drop",
        "seed": 0,
    }


def test_an_empty_block_takes_the_defaults_and_null_leaves_it_out(workshop):
    assert load_run(workshop.write("empty", layer_sampling={})).schedules == (LayerSampling(),)
    assert load_run(workshop.write("none"), ["layer_sampling=null"]).schedules == ()


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"layer": 1}, "unknown key 'layer_sampling.layer'; did you mean 'layer_sampling.layers'"),
        ({"layers": 0}, "layer_sampling.layers: layers must be at least 1, got 0"),
        ({"moments": "burn"}, "layer_sampling.moments must be 'drop' or 'move'"),
        ({"order": "sideways"}, "layer_sampling.order must be"),
        (2, "layer_sampling is a block of settings"),
    ],
)
def test_what_is_wrong_in_a_block_is_said_with_its_line(workshop, block, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_run(workshop.write("wrong", layer_sampling=block))
    assert "line" in str(caught.value)


def test_low_rank_pairs_are_refused_beside_a_schedule_with_their_line(workshop):
    smt = {**workshop.settings["smt"], "lora_rank": 2}
    with pytest.raises(ConfigError, match=r"line \d+: smt.lora_rank does not go with layer_sampling"):
        load_run(workshop.write("pairs", layer_sampling={"layers": 1}, smt=smt))


def test_what_is_wrong_in_freezing_is_said_with_its_line(workshop):
    with pytest.raises(ConfigError, match="freezing.share: share must be above 0 and at most 0.95") as caught:
        load_run(workshop.write("wrong", freezing={"share": 0.97}))
    assert "line" in str(caught.value)
    assert load_run(workshop.write("unbounded", freezing={"rest": None})).schedules == (Freezing(rest=None),)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"layer_sampling": {"layers": 3}}, "layer_sampling: layers=3 train at a time, but only 2 have blocks"),
        ({"freezing": {"share": 0.9, "rest": 2}}, "freezing: rest=2, but with share=0.9 it takes 7 intervals"),
    ],
)
def test_what_the_model_does_not_allow_is_said_with_its_line(workshop, tmp_path, block, message):
    workshop = replace(workshop, directory=tmp_path)
    with pytest.raises(ConfigError, match=rf"line \d+: {message}"):
        train(load_run(workshop.write("run", **block)))


def test_two_blocks_that_both_decide_what_trains_are_refused_with_a_line(workshop):
    with pytest.raises(ConfigError, match="layer_sampling and freezing both decide which blocks train") as caught:
        load_run(workshop.write("both", freezing={}, layer_sampling={"layers": 1}))
    assert "line" in str(caught.value)


@pytest.mark.parametrize(
    ("changed", "environment", "message"),
    [
        ({"fsdp": "full_shard"}, {}, "layer_sampling changes what trains, which FSDP does not follow"),
        ({"deepspeed": "zero2.json"}, {}, "layer_sampling changes what trains, which DeepSpeed does not follow"),
        ({}, {"ACCELERATE_USE_FSDP": "true"}, "which FSDP does not follow"),
        ({}, {"WORLD_SIZE": "2"}, "set ddp_find_unused_parameters: true"),
        ({"optim": "paged_adamw_8bit"}, {}, "optim: paged_adamw_8bit cannot give up the state of layers that rest"),
        ({"optim": "lomo"}, {}, "optim: lomo cannot give up"),
    ],
)
def test_what_layers_cannot_take_turns_with_is_said_before_anything_is_loaded(
    workshop, monkeypatch, changed, environment, message
):
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(ConfigError, match=message) as caught:
        load_run(workshop.write("refused", layer_sampling={"layers": 1}, **changed))
    assert "line" in str(caught.value)


def test_a_run_without_schedules_has_no_callback_of_them(workshop, monkeypatch):
    def never(*schedules):
        raise AssertionError("made")

    monkeypatch.setattr("smt_peft.training.run.ScheduleCallback", never)
    train(load_run(workshop.write("plain"), ["max_steps=1"]))


def test_the_moments_that_a_run_reports_are_those_of_the_layers_that_train(workshop):
    report = {}
    for name, block in (("whole", None), ("turns", {"layers": 1, "every": 3})):
        report[name] = train(load_run(workshop.write(name, layer_sampling=block), ["max_steps=2"]))["memory"]
    # Two layers, which are alike.
    assert report["whole"]["trained"] == report["turns"]["trained"]
    assert report["turns"]["moments"] * 2 == report["whole"]["moments"]
