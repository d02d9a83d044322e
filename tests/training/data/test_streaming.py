"""Rows that are read as they are needed."""

from __future__ import annotations

import json

import pytest
from helpers import byte_tokenizer
from runs import write_jsonl
from sets import TEMPLATE

from smt_peft.training.run import prepare, train
from smt_peft.training.yaml.schema import load_run


def chat(number: int) -> dict:
    return {"messages": [{"role": "user", "content": f"{number}"}, {"role": "assistant", "content": f"n{number}"}]}


@pytest.fixture(scope="module")
def run(workshop):
    """Settings of a run over conversations."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    directory = workshop.directory / "chat_model"
    directory.mkdir()
    for file in (workshop.directory / "model").iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    tokenizer.save_pretrained(directory)
    rows = write_jsonl(workshop.directory / "chat.jsonl", [chat(number) for number in range(12)])

    def settings(name, **changed):
        return load_run(
            workshop.write(
                name,
                model_name_or_path=str(directory),
                dataset_path=str(rows),
                eval_dataset_path=None,
                assistant_only_loss=True,
                max_steps=3,
                **changed,
            )
        )

    return settings


@pytest.mark.parametrize("packing", [False, True])
def test_a_stream_gives_the_same_tokens(run, packing):
    whole = prepare(run("whole", packing=packing)).train_set
    stream = prepare(run("stream", packing=packing, dataset_streaming=True)).train_set
    columns = ["input_ids", "labels", *(["seq_lengths"] if packing else [])]
    rows = [{name: row[name] for name in columns} for row in stream]
    assert rows == whole.select_columns(columns).to_list()


def test_a_run_trains_on_a_packed_stream_of_what_the_assistant_says(run, workshop):
    metrics = train(run("streamed", packing=True, dataset_streaming=True))
    losses = [entry["loss"] for entry in metrics["log_history"] if "loss" in entry]
    assert len(losses) == 3 and losses[-1] < losses[0]
    assert json.loads((workshop.directory / "streamed" / "metrics.json").read_text())["trainable_parameters"] > 0
