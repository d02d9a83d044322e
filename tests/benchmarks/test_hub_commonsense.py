"""Commonsense-170k: the published data made into runs, answers read as the papers do, YAMLs that are in order."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import save_tiny_model
from peft import get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from benchmarks.hub.commonsense import data, evaluate
from benchmarks.hub.commonsense.questions import TASKS, prompt, read_answer, read_rows
from smt_peft import SMTConfig
from smt_peft.bases.targets import find_targets
from smt_peft.selection import select_without_data
from smt_peft.training.evaluate import completions

ROOT = Path(__file__).parents[2]
YAMLS = ROOT / "benchmarks" / "hub" / "commonsense"
PUBLISHED = ROOT / "benchmarks" / "results" / "published" / "commonsense.json"
BY_NAME = {task.name: task for task in TASKS}
# Made up, in the wording of each task.
QUESTIONS = {
    "BoolQ": "Please answer the following question with true or false, question: is water wet?\n\n"
    "Answer format: true/false",
    "PIQA": "Please choose the correct solution to the question: open a door\n\nSolution1: push it\n\n"
    "Solution2: paint it\n\nAnswer format: solution1/solution2",
    "SIQA": "Please choose the correct answer to the question: Kim ran. Why?\n\nAnswer1: to rest Answer2: to be early "
    "Answer3: to eat\n\nAnswer format: answer1/answer2/answer3",
    "HellaSwag": "Please choose the correct ending to complete the given sentence: Cooking: She lifts it and\n\n"
    "Ending1: stirs. Ending2: flies. Ending3: sings. Ending4: naps.\n\nAnswer format: ending1/ending2/ending3/ending4",
    "WinoGrande": "Please choose the correct answer to fill in the blank to complete the given sentence: The cup did "
    "not fit the box as _ was too large.\n\nOption1: cup Option2: box Answer format: option1/option2",
    "ARC-e": "Please choose the correct answer to the question: What melts?\n\nAnswer1: ice Answer2: air Answer3: fire "
    "Answer4: light\n\nAnswer format: answer1/answer2/answer3/answer4",
    "ARC-c": "Please choose the correct answer to the question: What rusts?\n\nAnswer1: gold Answer2: iron "
    "Answer3: glass Answer4: wood\n\nAnswer format: answer1/answer2/answer3/answer4",
    "OBQA": "Please choose the correct answer to the question: Plants need\n\nAnswer1: light Answer2: noise "
    "Answer3: paint Answer4: steel\n\nAnswer format: answer1/answer2/answer3/answer4",
}


def row(name: str, answer: str, given: str = "") -> dict[str, str]:
    output = f"the correct answer is {answer}"
    return {"instruction": QUESTIONS[name], "input": given, "output": output, "answer": answer}


def rows(name: str, count: int = 3) -> list[dict[str, str]]:
    answers = BY_NAME[name].answers
    return [row(name, answers[i % 2]) for i in range(count)]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_the_answer_is_the_first_answer_word(task):
    first, second = task.answers[:2]
    assert read_answer(task, f"the correct answer is {first}") == first
    assert read_answer(task, f" The Correct Answer Is {second.upper()}.\n") == second
    assert read_answer(task, f"{second}, not {first}") == second
    assert read_answer(task, f"is{first}") == first
    assert read_answer(task, "the correct answer is") is None
    assert read_answer(task, "") is None


def test_words_of_other_tasks_are_no_answer():
    for task in TASKS:
        others = {word for other in TASKS for word in other.answers} - set(task.answers)
        assert read_answer(task, " ".join(sorted(others))) is None


def test_accuracy_counts_what_was_answered_rightly():
    said = ["the correct answer is true", "false", "who knows", "TRUE and false"]
    given = [row("BoolQ", answer) for answer in ("true", "true", "false", "true")]
    found = evaluate.grade(BY_NAME["BoolQ"], given, said)
    assert found == {"accuracy": 0.5, "rows": 4, "unanswered": 1, "whole": False}


def test_the_test_sets_have_the_published_sizes_together():
    assert [task.rows for task in TASKS] == [3270, 1838, 1954, 10042, 1267, 2376, 1172, 500]
    assert len({task.folder for task in TASKS}) == len(TASKS) == 8


def test_a_row_becomes_a_prompt_and_its_completion(tmp_path):
    plain, with_input = row("BoolQ", "true"), row("OBQA", "answer1", given="It is day.")
    assert prompt(plain) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{QUESTIONS['BoolQ']}\n\n### Response:\n"
    )
    assert prompt(with_input) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        f"response that appropriately completes the request.\n\n### Instruction:\n{QUESTIONS['OBQA']}\n\n"
        "### Input:\nIt is day.\n\n### Response:\n"
    )
    source = tmp_path / "commonsense_170k.json"
    everything = [row(name, task.answers[i % 2]) for i in range(5) for name, task in BY_NAME.items()]
    source.write_text(json.dumps(everything), "utf-8")
    assert data.convert(source, tmp_path / "out", validation=7, seed=1) == (33, 7)
    train, held = (
        [json.loads(line) for line in (tmp_path / "out" / f"{name}.jsonl").read_text("utf-8").splitlines()]
        for name in ("train", "validation")
    )
    expected = [{"prompt": prompt(row), "completion": row["output"]} for row in everything]
    assert sorted(map(str, train + held)) == sorted(map(str, expected))
    # In the order of the source.
    positions = iter(expected)
    assert all(any(row == other for other in positions) for row in train)
    before = (tmp_path / "out" / "train.jsonl").read_bytes()
    data.main([str(source), "--out", str(tmp_path / "out"), "--validation", "7", "--seed", "1"])
    assert (tmp_path / "out" / "train.jsonl").read_bytes() == before
    data.main([str(source), "--out", str(tmp_path / "out"), "--validation", "7", "--seed", "2"])
    assert (tmp_path / "out" / "train.jsonl").read_bytes() != before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "there is no file .*download it from github.com/AGI-Edgerunners/LLM-Adapters"),
        ("[{", "is no JSON"),
        ("{}", "must hold a list of rows, got dict"),
        ("[]", "must hold a list of rows"),
        ("[3]", "row 1: a row must be an object"),
        (json.dumps([row("BoolQ", "true"), {"instruction": "a"}]), "row 2: input must be text, got None"),
        (json.dumps([row("BoolQ", "true") | {"output": ""}]), "row 1: output must be text, got ''"),
        (json.dumps([row("BoolQ", "true")]), "has 1 rows, of which 120 cannot be held out"),
    ],
)
def test_damaged_data_are_refused_by_name(tmp_path, text, message):
    source = tmp_path / "source.json"
    if text is not None:
        source.write_text(text)
    with pytest.raises(ValueError, match=message):
        data.convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit, match="error: .*source.json"):
        data.main([str(source), "--out", str(tmp_path / "out")])


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A tiny model, an adapter that changes what it says, and the eight test sets with three rows each."""
    place = tmp_path_factory.mktemp("commonsense")
    save_tiny_model(place / "model")
    base = AutoModelForCausalLM.from_pretrained(place / "model")
    base.config.max_position_embeddings = 1024
    with torch.no_grad():
        for weight in base.parameters():
            # Large enough that what it says hangs on what it is asked.
            weight.mul_(8 if weight.ndim == 2 else 1)
        # The tokens of printable characters come first; others would be read as one and the same.
        base.lm_head.weight[94:] = 0
    base.save_pretrained(place / "model")
    config = SMTConfig(block_size=8, density=0.5, score="random", init_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    model.save_pretrained(place / "adapter")
    for task in TASKS:
        (place / "dataset" / task.folder).mkdir(parents=True)
        (place / "dataset" / task.folder / "test.json").write_text(json.dumps(rows(task.name)))
    return place


def test_completions_in_a_batch_are_those_of_each_prompt_alone(place):
    tuned, tokenizer = evaluate.load(place / "adapter", None, "float32", "cpu")
    prompts = ["one two three", "b", "longer than the others by far", "c?", "two words", "Answer:"]
    together = completions(tuned, tokenizer, prompts, batch_size=4, max_new_tokens=6, num_beams=4)
    assert len(set(together)) == len(prompts)
    for text, said in zip(prompts, together, strict=True):
        tokens = tokenizer(text, return_tensors="pt")["input_ids"]
        alone = tuned.generate(
            input_ids=tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=6, num_beams=4, do_sample=False
        )
        assert tokenizer.decode(alone[0, tokens.shape[1] :], skip_special_tokens=True) == said
    plain, _ = evaluate.load(None, str(place / "model"), "float32", "cpu")
    assert completions(plain, tokenizer, prompts, batch_size=4, max_new_tokens=6, num_beams=4) != together


def test_the_mean_is_told_of_eight_whole_test_sets_only(place, monkeypatch):
    monkeypatch.setattr(evaluate, "TASKS", tuple(type(task)(task.name, task.folder, task.answers, 3) for task in TASKS))
    # Right on every row whose answer is the task's first word: two of three.
    monkeypatch.setattr(
        evaluate, "completions", lambda _m, _t, prompts, label, **_: [BY_NAME[label].answers[0]] * len(prompts)
    )
    found = evaluate.evaluate(None, None, place / "dataset", evaluate.TASKS)
    assert found["mean"] == pytest.approx(2 / 3)
    assert evaluate.line(found).startswith("BoolQ 66.7, PIQA 66.7, ")
    assert evaluate.line(found).endswith("OBQA 66.7, mean 66.7")
    assert evaluate.evaluate(None, None, place / "dataset", evaluate.TASKS, limit=2)["mean"] is None
    few = evaluate.evaluate(None, None, place / "dataset", evaluate.TASKS[:7])
    assert few["mean"] is None
    assert "not told" in evaluate.line(few)


def test_an_adapter_is_evaluated_by_one_command(place):
    command = [sys.executable, "-m", "benchmarks.hub.commonsense.evaluate", "--adapter", str(place / "adapter")]
    command += [
        "--data",
        str(place / "dataset"),
        "--out",
        str(place / "result.json"),
        "--limit",
        "2",
        "--device",
        "cpu",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((place / "result.json").read_text())
    assert [*found["tasks"]] == [task.name for task in TASKS]
    assert {grade["rows"] for grade in found["tasks"].values()} == {2}
    assert found["mean"] is None
    assert found["adapter"] == str(place / "adapter")
    assert found["model"] == str(place / "model")
    assert found["versions"]["torch"] == torch.__version__


def test_a_missing_test_set_is_told_before_anything_is_asked(place, tmp_path):
    with pytest.raises(SystemExit, match=r"error: there is no file .*boolq"):
        evaluate.main(["--model", str(place / "model"), "--data", str(tmp_path), "--device", "cpu"])
    assert list(read_rows(place / "dataset" / "piqa" / "test.json"))[0]["answer"] == "solution1"


@pytest.fixture(scope="module")
def llama():
    """The shapes of LLaMA-2-7B."""
    config = LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    assert model.num_parameters() == 6_738_415_616
    return model


@pytest.mark.parametrize(
    ("name", "trained", "rank"), [("paper", 864 * 256**2, 72), ("default", None, 23), ("lora", 56_098_816, 32)]
)
def test_every_yaml_is_in_order_and_trains_what_it_says(name, trained, rank, llama, tmp_path):
    pytest.importorskip("trl")
    from smt_peft.training.compare import lora_config
    from smt_peft.training.yaml.schema import load_run

    source = tmp_path / "source.json"
    source.write_text(json.dumps(rows("BoolQ", 4)))
    data.convert(source, tmp_path, validation=1)
    here = [f"dataset_path={tmp_path}/train.jsonl", f"eval_dataset_path={tmp_path}/validation.jsonl"]
    loaded = load_run(YAMLS / f"{name}.yaml", here)
    assert loaded.resolved["output_dir"] == f"out/commonsense/{name}"
    selection = select_without_data(find_targets(llama, loaded.smt), loaded.smt)
    if trained is None:
        # Whole blocks per module do not add up to the paper's number.
        assert selection.effective_numel == pytest.approx(864 * 256**2, rel=0.002)
    else:
        assert selection.effective_numel == trained
    assert lora_config(selection).r == rank
    # Without the changes above the files of the data script are named, and nothing else is missing.
    text = (YAMLS / f"{name}.yaml").read_text()
    assert f"dataset_path: {data.OUT.as_posix()}/train.jsonl" in text
    assert f"eval_dataset_path: {data.OUT.as_posix()}/validation.jsonl" in text


def test_published_figures_name_their_source_and_add_up():
    published = json.loads(PUBLISHED.read_text("utf-8"))
    assert (
        {source["evidence"] for source in published["sources"].values()}
        <= set(published["evidence"])
        == {"read", "2nd"}
    )
    assert all(source["evidence"] != "read" or source["commit"] for source in published["sources"].values())
    for figures in published["rows"]:
        assert figures["source"] in published["sources"]
        assert 0 < figures["average"] < 100
        if figures["scores"] is not None:
            assert [*figures["scores"]] == [task.name for task in TASKS]
            # One of them cuts its means off after one digit.
            assert sum(figures["scores"].values()) / 8 == pytest.approx(figures["average"], abs=0.1)
