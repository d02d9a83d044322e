"""Runs of `task: classification`: an encoder, or a decoder, with a head of classes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from helpers import byte_tokenizer
from peft import PeftModel
from runs import Workshop, assert_resumed_alike, smt, write_jsonl
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    DebertaV2Config,
    DebertaV2ForMaskedLM,
    EvalPrediction,
    ModernBertConfig,
    ModernBertForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

from smt_peft import BlockSelection, cli, select_blocks
from smt_peft.training import outputs
from smt_peft.training.run import choose, prepare, train
from smt_peft.training.tasks.classification import scores
from smt_peft.training.yaml.schema import load_run

SIZES = {"vocab_size": 264, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 257}
WORDS = {"good": ("ooooo", "oooo", "ooo"), "bad": ("aaaaa", "aaaa", "aaa"), "plain": ("iiiii", "iiii", "iii")}
ROWS = [{"text": f"{word} {i}", "label": label} for i in range(8) for label, ws in WORDS.items() for word in ws]
ENCODERS = {
    "bert": lambda: BertForMaskedLM(BertConfig(**SIZES, intermediate_size=48)),
    "roberta": lambda: RobertaForMaskedLM(RobertaConfig(**SIZES, intermediate_size=48, max_position_embeddings=340)),
    "deberta": lambda: DebertaV2ForMaskedLM(DebertaV2Config(**SIZES, intermediate_size=48)),
    "modernbert": lambda: ModernBertForMaskedLM(
        ModernBertConfig(**SIZES, intermediate_size=48, cls_token_id=None, sep_token_id=None)
    ),
}


def save_encoder(directory: Path, name: str) -> Path:
    torch.manual_seed(0)
    ENCODERS[name]().save_pretrained(directory)
    tokenizer = byte_tokenizer()
    # As an encoder's: it has no end of text.
    tokenizer.eos_token = None
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def reviews(workshop, tmp_path_factory) -> Workshop:
    directory = tmp_path_factory.mktemp("reviews")
    settings = {
        **workshop.settings,
        "model_name_or_path": str(save_encoder(directory / "model", "bert")),
        "task": "classification",
        "dataset_path": str(write_jsonl(directory / "train.jsonl", ROWS)),
        "eval_dataset_path": str(write_jsonl(directory / "test.jsonl", ROWS[:12])),
        "learning_rate": 1e-2,
        "max_steps": 8,
        "per_device_train_batch_size": 8,
    }
    return Workshop(directory, settings)


@pytest.fixture(scope="module")
def whole(reviews):
    """One run through the command line, with everything."""
    path = reviews.write("whole", verify=True, compare_lora=True, max_steps=30, gradient_checkpointing=True)
    done = smt("train", path)
    assert done.returncode == 0, done.stderr
    directory = reviews.directory / "whole"
    return done, directory, json.loads((directory / outputs.METRICS).read_text())


def test_a_run_learns_the_classes_saves_and_verifies(whole):
    done, directory, metrics = whole
    assert metrics["after"]["eval_loss"] < metrics["before"]["eval_loss"]
    assert metrics["after"]["accuracy"] > 0.6 > metrics["before"]["accuracy"]
    assert 0 < metrics["after"]["f1"] <= 1 and "lora" in metrics
    assert set(metrics["verified"]["passed"].values()) == {True}
    assert metrics["verified"]["reload_difference"] == 0
    assert "text/label, 72 rows" in done.stdout and "3 classes: bad, good, plain" in done.stdout
    assert "accuracy" in (directory / outputs.REPORT).read_text()
    config = json.loads((directory / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS"
    assert len(config["modules_to_save"]) == len(set(config["modules_to_save"]))
    assert json.loads((directory / outputs.LABELS).read_text()) == {"0": "bad", "1": "good", "2": "plain"}
    selection = BlockSelection.load(directory / outputs.SELECTION)
    assert all(name.startswith("bert.encoder.") for name in selection.grids)


def test_the_measures_are_those_of_the_saved_adapter_in_plain_pytorch(whole, reviews):
    _, directory, metrics = whole
    labels = json.loads((directory / outputs.LABELS).read_text())
    base = reviews.settings["model_name_or_path"]
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=len(labels))
    model = PeftModel.from_pretrained(model, directory).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    numbers = {name: int(number) for number, name in labels.items()}
    rows = ROWS[:12]
    with torch.no_grad():
        logits = torch.cat([model(**tokenizer(row["text"], return_tensors="pt")).logits for row in rows])
    truth = torch.tensor([numbers[row["label"]] for row in rows])
    loss = torch.nn.functional.cross_entropy(logits, truth).item()
    assert metrics["after"]["eval_loss"] == pytest.approx(loss, rel=1e-4)
    assert metrics["after"]["accuracy"] == pytest.approx((logits.argmax(-1) == truth).float().mean().item())


def test_a_merged_classifier_is_whole_in_plain_transformers(whole, tmp_path, capsys):
    _, directory, _ = whole
    assert cli.main(["merge", str(directory), str(tmp_path / "merged")]) == 0
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert merged.config.id2label == {0: "bad", 1: "good", 2: "plain"}
    base = json.loads((directory / "adapter_config.json").read_text())["base_model_name_or_path"]
    adapted = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    adapted = PeftModel.from_pretrained(adapted, directory).eval()
    tokens = AutoTokenizer.from_pretrained(tmp_path / "merged")(ROWS[0]["text"], return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(merged(**tokens).logits, adapted(**tokens).logits)
    assert cli.main(["verify", str(directory), "--merged", str(tmp_path / "merged")]) == 0
    told = capsys.readouterr().out
    assert all(f"{name:<8}  ok" in told for name in ("files", "reload", "merge", "merged"))
    assert cli.main(["export", str(directory), str(tmp_path / "patch"), "--format", "patch"]) == 2
    assert "which is no parameter of the base; merge it: smt merge" in capsys.readouterr().err


def test_f1_is_the_mean_over_the_classes():
    logits = torch.eye(3)[[0, 0, 1, 2, 2]].numpy()
    found = scores(EvalPrediction(logits, torch.tensor([0, 1, 1, 2, 0]).numpy()))
    assert found["accuracy"] == 3 / 5
    assert found["f1"] == pytest.approx((1 / 2 + 2 / 3 + 2 / 3) / 3)


def test_it_resumes_with_the_losses_of_one_that_never_stopped(reviews):
    assert_resumed_alike(reviews, verify=True)


def test_layers_in_turn_resume_within_a_period_and_the_head_always_trains(reviews):
    assert_resumed_alike(reviews, layer_sampling={"layers": 1, "every": 3, "order": "shuffle", "moments": "move"})


@pytest.mark.parametrize("name", ["roberta", "deberta", "modernbert", "llama"])
def test_every_architecture_trains_and_verifies(name, reviews, workshop, tmp_path):
    """Of DeBERTa a pooler is new besides the head, of RoBERTa linear layers lie in the head, a Llama needs padding."""
    model = workshop.directory / "model" if name == "llama" else save_encoder(tmp_path / name, name)
    path = reviews.write(name, model_name_or_path=str(model), max_steps=3, verify=True, optim="smt_adamw")
    metrics = train(load_run(path))
    assert set(metrics["verified"]["passed"].values()) == {True}
    selection = BlockSelection.load(reviews.directory / name / outputs.SELECTION)
    assert not [key for key in selection.grids if key.startswith(("classifier", "score", "pooler"))]


def test_blocks_are_scored_by_the_loss_of_the_classes(reviews):
    run = load_run(reviews.write("scored", max_steps=1))
    prepared = prepare(run)
    chosen = choose(run, prepared, None)
    assert chosen == select_blocks(
        prepared.model,
        run.smt,
        prepared.trainer.get_train_dataloader(),
        2,
        loss_fn=lambda model, batch: torch.nn.functional.cross_entropy(
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits, batch["labels"]
        ),
        progress=False,
    )


def test_pairs_columns_and_numbers_are_read(reviews, capsys):
    rows = [{"premise": f"it rains {i}", "hypothesis": "it is wet", "gold": i % 2} for i in range(12)]
    path = reviews.write(
        "pairs",
        dataset_path=str(write_jsonl(reviews.directory / "pairs.jsonl", rows)),
        eval_dataset_path=None,
        dataset_text_field="premise",
        dataset_text_pair_field="hypothesis",
        dataset_label_field="gold",
        max_steps=2,
    )
    train(load_run(path))
    assert "2 classes: 0, 1" in capsys.readouterr().out
    row = next(iter(prepare(load_run(path, ["output_dir=other"])).train_set))
    assert len(row["input_ids"]) == len("it rains 0it is wet")


def test_a_dry_run_shows_a_text_with_its_label(reviews, capsys):
    assert cli.main(["train", "--dry-run", str(reviews.write("dry"))]) == 0
    out = capsys.readouterr().out
    assert "one sample, 7 tokens, of the class 'good':\nooooo 0" in out
    assert "max_length: 512" in out and "packing" not in out


BROKEN = [
    ([{"text": "a", "label": 0.5}], "line 1: label must be the name or the number of a class, got float; .*regression"),
    ([{"text": "a", "label": "x"}, {"text": "b"}], "line 2: label must be .*, got nothing"),
    ([{"text": "a", "label": "x"}, {"text": "", "label": "y"}], "line 2: text is empty"),
    ([{"text": "a", "label": 1}, {"text": "b", "label": -1}], "line 2: label is -1, which is no class"),
    ([{"text": "a", "label": 1}, {"text": ["b"], "label": 2}], "line 2: text must be text, got list"),
    ([{"text": "a", "label": 1}, {"text": "b", "label": True}], "line 2: label must be .*, got bool"),
    ([{"text": "a", "text_pair": "b", "label": 1}, {"text": "b", "label": 2}], "line 2: text_pair is missing"),
    ([{"text": "a", "label": "x"}] * 3, "label: all rows of the training set have the label 'x'"),
    ([{"sentence": "a", "label": "x"}], "need the columns text, label .*; rename text"),
    ([{"text": "a", "label": "0.5"}, {"text": "b", "label": "1.5"}], "label: the labels are numbers with fractions"),
]


@pytest.mark.parametrize(("rows", "message"), BROKEN)
def test_a_row_that_cannot_be_is_named(reviews, capsys, rows, message):
    data = write_jsonl(reviews.directory / "broken.jsonl", rows)
    assert cli.main(["train", "--dry-run", str(reviews.write("broken", dataset_path=str(data)))]) == 2
    assert re.search(message, error := capsys.readouterr().err), error
    assert "broken.jsonl" in error or "label:" in error


def test_a_label_that_the_training_set_lacks_is_named_with_its_line(reviews, capsys):
    rows = [{"text": "a", "label": "good"}, {"text": "b", "label": "new"}]
    data = write_jsonl(reviews.directory / "unknown.jsonl", rows)
    path = reviews.write("unknown", eval_dataset_path=str(data))
    assert cli.main(["train", "--dry-run", str(path)]) == 2
    assert "unknown.jsonl, line 2: no row of the training set has the label 'new'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"packing": True}, "unknown key 'packing' for task: classification; it is a key of task: sft"),
        ({"dataset_streaming": True}, "dataset_streaming: task: classification reads all rows first"),
        ({"eval_exact_match": True}, "eval_exact_match is about completions"),
        ({"num_labels": 2}, "num_labels is no key of a run; the classes are those of the training set"),
    ],
)
def test_what_cannot_be_is_refused_by_name(reviews, capsys, changed, message):
    assert cli.main(["train", "--dry-run", str(reviews.write("refused", **changed))]) == 2
    assert message in capsys.readouterr().err
