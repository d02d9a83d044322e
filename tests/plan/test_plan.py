"""`smt plan`: a run from its YAML and a `config.json`, with no weight anywhere."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.cost.model import LLAMA_3_8B
from smt_peft import cli
from smt_peft.bases.targets import find_targets
from smt_peft.blocks import BlockSelection
from smt_peft.plan.plan import Plan, plan
from smt_peft.plan.table import plan_or_why_not, shown, size, table
from smt_peft.training.errors import ConfigError
from smt_peft.training.yaml.schema import load_run

TINY = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "dtype": "bfloat16",
}
MIXTRAL = {**TINY, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 64}


def write_run(directory: Path, config: dict, **settings) -> Path:
    model = directory / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(config))
    (directory / "rows.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    run = {
        "model_name_or_path": str(model),
        "dataset_path": str(directory / "rows.jsonl"),
        "output_dir": str(directory / "out"),
        "max_length": 32,
        "per_device_train_batch_size": 4,
        "gradient_checkpointing": False,
        "smt": {"density": 0.05},
        **settings,
    }
    path = directory / "run.yaml"
    path.write_text(json.dumps(run))
    return path


def planned(directory: Path, config: dict = TINY, changed: tuple[str, ...] = (), **arguments) -> Plan:
    return plan(load_run(write_run(directory, config), changed), **arguments)


def test_weights_gradients_and_moments_are_those_of_the_model(tmp_path):
    found = planned(tmp_path)
    model = AutoModelForCausalLM.from_config(load_config(tmp_path), dtype=torch.float32)
    floats = sum(parameter.nbytes for parameter in model.parameters())
    buffers = {buffer.untyped_storage()._cdata: buffer.nbytes for buffer in model.buffers()}
    assert found.smt.state.weights == {"float32": floats + sum(buffers.values())}
    full = found.methods[-1]
    assert full.method == "full"
    assert full.trainable == sum(parameter.numel() for parameter in model.parameters())
    assert full.gradients == floats
    for each in found.methods:
        assert each.gradients == 4 * each.trainable
        assert each.peak() >= each.state.total + each.step.saved


def test_a_run_without_a_backward_pass_holds_no_gradient_and_saves_nothing(tmp_path):
    found = planned(tmp_path, changed=("optim=mezo", "smt.score=random"))
    plain = plan(load_run(tmp_path / "run.yaml"))
    ours, other = found.smt, plain.smt
    assert ours.gradients == ours.state.moments == 0 and ours.other is None and ours.step.phase == "forward"
    # The batch and the loss.
    assert ours.step.saved < other.step.saved / 100
    assert ours.peak() < other.peak() and found.warm_up < plain.warm_up
    assert "gradients" not in table(found) and "optimizer state" not in table(found)


def test_choosing_blocks_takes_less_with_checkpointing(tmp_path):
    # Of one layer with it and of sixteen without: at these shapes little else counts.
    shape = {**TINY, "num_hidden_layers": 16, "vocab_size": 16}
    path = write_run(tmp_path, shape, max_length=64)
    without = plan(load_run(path))
    with_it = plan(load_run(path, ["gradient_checkpointing=true"]))
    weights = without.smt.state.weights["float32"]
    assert with_it.warm_up - weights < (without.warm_up - weights) / 2


def test_preferences_take_what_twice_as_many_sequences_take(tmp_path):
    path = write_run(tmp_path, TINY)
    twice = plan(load_run(path, ["per_device_train_batch_size=8"]))
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n")
    pairs = plan(load_run(path, ["task=dpo"]))
    assert pairs.smt.step.saved == twice.smt.step.saved
    assert pairs.warm_up == twice.warm_up


def test_an_encoder_with_classes_is_planned(tmp_path):
    bert = {
        "model_type": "bert",
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    found = plan(load_run(write_run(tmp_path, bert, task="classification")))
    assert [each.method.split()[0] for each in found.methods] == ["SMT", "LoRA", "DoRA", "full"]
    # The head trains in full beside the blocks.
    assert found.smt.trainable > 2 * 64 and found.warm_up > 0


def load_config(directory: Path):
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(directory / "model")


def test_a_model_of_8_billion_weights_is_planned_without_them(tmp_path):
    shape = {**LLAMA_3_8B, "model_type": "llama", "dtype": "bfloat16"}
    changed = ("max_length=2048", "per_device_train_batch_size=1", "smt.density=0.0084")
    found = planned(tmp_path, shape, changed, device="cuda")
    assert found.smt.state.weights["bfloat16"] == 2 * 8_030_261_248
    assert [each.method.split()[0] for each in found.methods] == ["SMT", "LoRA", "DoRA", "full"]
    assert found.smt.peak() <= found.methods[1].peak()
    # Two moments, a gradient and the weights, and what a step saves.
    assert found.methods[-1].peak() > 4 * found.smt.state.weights["bfloat16"]


def test_experts_are_counted_with_the_weights_and_the_blocks_they_have(tmp_path):
    changed = ("smt.target_modules=[q_proj]", "smt.target_parameters=[experts.gate_up_proj,experts.down_proj]")
    found = planned(tmp_path, MIXTRAL, changed)
    sized = load_run(tmp_path / "run.yaml", changed)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(load_config(tmp_path), dtype=torch.float32)
    weights = sum(target.stored.numel() for target in find_targets(model, sized.smt).values())
    assert found.smt.trainable == pytest.approx(0.05 * weights, rel=0.2)
    assert [each.method.split()[0] for each in found.methods] == ["SMT", "LoRA", "full"]
    assert found.warm_up > 0


def test_a_selection_file_is_counted_instead_of_an_assumed_choice(tmp_path):
    path = write_run(tmp_path, TINY)
    drawn = plan(load_run(path))
    grids = BlockSelection.load(save_selection(tmp_path, path)).grids
    found = plan(load_run(path, [f"smt.selection={tmp_path / 'one.safetensors'}"]))
    (grid,) = (grid for name, grid in grids.items() if name == "model.layers.1.mlp.up_proj")
    assert found.smt.trainable == grid.block_rows * grid.block_cols
    assert found.smt.step.saved < drawn.smt.step.saved
    assert found.score == ""
    assert found.warm_up == 0


def save_selection(directory: Path, path: Path) -> Path:
    """One block in the last layer."""
    from smt_peft.plan.methods import assumed_selection, empty

    model = empty(lambda: AutoModelForCausalLM.from_config(load_config(directory)))
    whole = assumed_selection(model, load_run(path).smt)
    name = "model.layers.1.mlp.up_proj"
    file = directory / "one.safetensors"
    BlockSelection({name: whole.blocks[name][:1]}, whole.grids).save(file)
    return file


@pytest.mark.parametrize("share", [0.95, 0.6, 0.4])
def test_what_is_suggested_fits_and_its_keys_say_so_too(tmp_path, share):
    given = ["optim=adamw_torch"]
    path = write_run(tmp_path, TINY)
    peak = plan(load_run(path, given)).peak
    found = plan(load_run(path, given), limit=int(share * peak))
    assert found.fits is False
    assert 1 <= len(found.changes) <= 3
    assert len({change.keys for change in found.changes}) == len(found.changes)
    text = " ".join(table(found).split())
    for change in found.changes:
        assert change.peak <= found.limit
        assert f"{shown(change.peak)} with {change.keys} costs {change.cost}" in text
        if "load_in_4bit" in change.keys and find_spec("bitsandbytes") is None:
            continue
        again = plan(load_run(path, [*given, *change.keys.split()]))
        assert again.peak == change.peak


def test_where_nothing_fits_the_least_that_could_be_is_told(tmp_path):
    found = planned(tmp_path, changed=("optim=adamw_torch",), limit=2**16)
    (change,) = found.changes
    assert 2**16 < change.peak < found.peak
    for key in ("optim=smt_adamw_8bit", "per_device_train_batch_size=1", "gradient_checkpointing=true"):
        assert key in change.keys
    assert "nor does anything that could be changed" in table(found)


def test_the_lines_are_80_columns_wide(tmp_path):
    found = planned(tmp_path, {**TINY, **LLAMA_3_8B}, limit=2**20, device="cuda")
    assert max(map(len, table(found).splitlines()[1:])) <= 80


def test_a_plan_that_cannot_be_made_says_why_in_one_line(tmp_path):
    run = load_run(write_run(tmp_path, TINY))
    assert "peak of a step" in plan_or_why_not(run)
    (tmp_path / "model" / "config.json").write_text("{}")
    told = plan_or_why_not(run)
    assert "ConfigError: model_name_or_path" in told
    assert "\n" not in told


def test_processes_that_share_the_weights_hold_a_part_each(tmp_path):
    run = load_run(write_run(tmp_path, TINY))
    one, copies = plan(run).smt, plan(run, processes=4).smt
    shared = plan(run, processes=4, sharded=True).smt
    assert copies.peak() == one.peak() + one.gradients
    assert shared.state.weights["float32"] == -(-one.state.weights["float32"] // 4)
    assert shared.state.moments < one.state.moments
    assert shared.gathered > 0


def test_blocks_are_chosen_on_the_whole_model_but_where_it_is_loaded_in_parts(tmp_path, monkeypatch):
    run = load_run(write_run(tmp_path, TINY))
    one, shared = plan(run).warm_up, plan(run, processes=4, sharded=True).warm_up
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert shared == one
    assert plan(run).warm_up != one


def test_accumulating_keeps_the_gradients_between_batches(tmp_path):
    run = load_run(write_run(tmp_path, TINY))
    more = load_run(tmp_path / "run.yaml", ["gradient_accumulation_steps=2"])
    one, two = plan(run).methods[-1], plan(more).methods[-1]
    assert two.step.gradients == one.step.gradients
    assert two.peak() > one.peak()


def test_the_command_line_prints_the_table(tmp_path, capsys):
    path = write_run(tmp_path, TINY)
    assert cli.main(["plan", str(path), "smt.density=0.1", "--memory", "24GiB"]) == 0
    out = capsys.readouterr().out
    for line in ("weights, float32", "gradients", "saved for backward", "peak of choosing blocks", "fits: "):
        assert line in out


def test_mistakes_are_told_and_how_to_mend_them(tmp_path, capsys):
    path = write_run(tmp_path, TINY)
    assert cli.main(["plan", str(path), "--memory", "much"]) == 2
    assert "24GiB" in capsys.readouterr().err
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="model_name_or_path"):
        plan(load_run(path))


@pytest.mark.parametrize(
    ("text", "expected"), [("24GiB", 24 * 2**30), ("24", 24 * 2**30), ("80 GB", 80 * 10**9), ("0.5gib", 2**29)]
)
def test_sizes_are_read(text, expected):
    assert size(text) == expected
    assert shown(24 * 2**30) == "24.0 GiB"


@pytest.mark.parametrize("text", ["", "GiB", "-1", "12 apples"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="24GiB"):
        size(text)
