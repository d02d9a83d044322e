"""Selection files in a run: of another task, several as their union, avoided, and what contradicts them."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
from runs import Workshop, assert_resumed_alike, smt, write_jsonl
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from smt_peft import BlockSelection, SMTConfig, select_blocks
from smt_peft.cli import main
from smt_peft.training.errors import ConfigError
from smt_peft.training.run import select, train
from smt_peft.training.yaml.schema import load_run


@pytest.fixture(scope="module")
def workshop(workshop, tmp_path_factory) -> Workshop:
    """The same model and data in a place of its own, as a run refuses a directory that holds another's."""
    return replace(workshop, directory=tmp_path_factory.mktemp("reuse"))


SMT = {"block_size": 8, "density": 0.1, "warmup_batches": 2}


@pytest.fixture(scope="module")
def chosen(workshop):
    """The selection file of a run, and another that avoids it, of other data."""
    select(load_run(workshop.write("first", smt=SMT)))
    first = workshop.directory / "first" / "selection.safetensors"
    rows = [{"prompt": f"lower: WORD{i % 5}\n", "completion": f"word{i % 5}"} for i in range(24)]
    data = write_jsonl(workshop.directory / "other.jsonl", rows)
    select(load_run(workshop.write("second", dataset_path=str(data), smt=SMT | {"avoid": [str(first)]})))
    return first, workshop.directory / "second" / "selection.safetensors"


def errors_of(path, *overrides) -> str:
    with pytest.raises(ConfigError) as caught:
        load_run(path, overrides)
    return str(caught.value)


def test_a_selection_serves_another_task_and_other_data(workshop, chosen):
    rows = [{"prompt": "Q: 1\n", "chosen": f"yes {i % 3}", "rejected": "no"} for i in range(12)]
    data = write_jsonl(workshop.directory / "pairs.jsonl", rows)
    path = workshop.write(
        "pairs",
        task="dpo",
        dataset_path=str(data),
        eval_dataset_path=None,
        max_steps=2,
        smt={"selection": str(chosen[0])},
    )
    train(load_run(path))
    assert BlockSelection.load(workshop.directory / "pairs" / "selection.safetensors") == BlockSelection.load(chosen[0])


def test_what_a_run_avoids_it_does_not_train(workshop, chosen):
    first, second = map(BlockSelection.load, chosen)
    assert first.num_common(second) == 0 and first.num_blocks == second.num_blocks


def test_several_files_are_their_union(workshop, chosen):
    path = workshop.write("both", max_steps=2, verify=True, smt={"selection": [str(file) for file in chosen]})
    process = smt("train", path)
    assert process.returncode == 0, process.stderr
    assert f"selection from {chosen[0]} and {chosen[1]}: " in process.stdout
    made = BlockSelection.load(workshop.directory / "both" / "selection.safetensors")
    assert made == BlockSelection.load(chosen[0]) | BlockSelection.load(chosen[1])
    # The settings that a run writes are read again.
    assert load_run(workshop.directory / "both" / "run.yaml").selection == [str(file) for file in chosen]


def test_it_resumes(workshop, chosen):
    directory = assert_resumed_alike(workshop, smt=SMT | {"avoid": str(chosen[0])})
    config = (directory / "adapter_config.json").read_text()
    assert "avoid" not in config and load_file(directory / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("settings", "line", "message"),
    [
        ({"density": 0.02}, "smt.density", "density=0.02 has no effect beside a selection"),
        ({"block_size": 4}, "smt.block_size", "block_size=4 .* was made with block_size=8; leave block_size out"),
        ({"score": "diagonal"}, "smt.score", "score='diagonal' .* was made with score='grad_abs'"),
        ({"max_lora_rank": 8}, "smt.max_lora_rank", "max_lora_rank=8 .* was made with max_lora_rank=None"),
    ],
)
@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
def test_a_setting_that_says_otherwise_is_refused_with_its_line(workshop, chosen, settings, line, message, several):
    files = [str(file) for file in chosen] if several else str(chosen[0])
    path = workshop.write("otherwise", smt={"selection": files, **settings})
    number = next(
        n for n, text in enumerate(path.read_text().splitlines(), 1) if text.strip().startswith(line[4:] + ":")
    )
    with pytest.raises(ConfigError, match=rf"otherwise.yaml, line {number}: smt\.{message}"):
        load_run(path)
    assert "command line: smt.density=0.3 has no effect" in errors_of(path, "smt.density=0.3")
    # What says the same is no contradiction.
    load_run(workshop.write("alike", smt={"selection": files, **SMT}))


def test_files_that_are_none_are_refused_by_item(workshop, chosen):
    damaged = workshop.directory / "damaged.safetensors"
    damaged.write_bytes(chosen[0].read_bytes()[:50])
    path = workshop.write("none", smt={"selection": [str(chosen[0]), "nowhere"], "avoid": [str(damaged)]})
    told = errors_of(path)
    assert "smt.selection.1: there is no file nowhere; make it with `smt select`, or say auto" in told
    assert "smt.avoid.0: " in told and "truncated" in told
    assert "smt.selection is an empty list" in errors_of(workshop.write("empty", smt={"selection": []}))
    path = workshop.write("meets", smt={"selection": str(chosen[0]), "avoid": str(chosen[0])})
    assert "smt.avoid: " in (told := errors_of(path)) and "has blocks of one to avoid" in told


def test_a_budget_that_has_no_room_left_is_refused_before_the_training(workshop, chosen, capsys):
    path = workshop.write("full", smt=SMT | {"density": 0.95, "avoid": [str(file) for file in chosen]})
    for words in (["select"], ["train"], ["train", "--dry-run"]):
        assert main([*words, str(path)]) == 2
        assert "are not among those to avoid" in capsys.readouterr().err
    assert not (workshop.directory / "full" / "adapter_model.safetensors").exists()


def test_a_selection_of_another_base_is_refused(workshop, chosen, tmp_path):
    shutil.copytree(workshop.settings["model_name_or_path"], tmp_path / "other")
    weights = load_file(tmp_path / "other" / "model.safetensors")
    scaled = {name: 1.5 * tensor for name, tensor in weights.items()}
    save_file(scaled, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    for smt_block in ({"selection": str(chosen[0])}, SMT | {"avoid": str(chosen[0])}):
        path = workshop.write("base", model_name_or_path=str(tmp_path / "other"), max_steps=1, smt=smt_block)
        with pytest.raises(ConfigError, match="another base model"):
            train(load_run(path))


def test_python_reads_what_a_run_wrote(workshop, chosen):
    model = AutoModelForCausalLM.from_pretrained(workshop.settings["model_name_or_path"])
    config = SMTConfig(score="random", density=0.1, block_size=8, avoid=[str(file) for file in chosen])
    made = select_blocks(model, config)
    assert all(made.num_common(BlockSelection.load(file)) == 0 for file in chosen)
