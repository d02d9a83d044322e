"""Which tokens each form of rows is trained on, through the run's own path, against expectations written by hand.

In the expectations trained text stands between guillemets.
"""

from __future__ import annotations

import json
import re

import pytest
from helpers import byte_tokenizer, save_tiny_model
from sets import TEMPLATE, write

from smt_peft.training.errors import ConfigError
from smt_peft.training.preview import preview
from smt_peft.training.run import prepare
from smt_peft.training.yaml.schema import load_run

CHAT = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "ho"},
    {"role": "user", "content": "1"},
    {"role": "assistant", "content": "2"},
]
SPOKEN = [{"from": {"user": "human", "assistant": "gpt"}[turn["role"]], "value": turn["content"]} for turn in CHAT]
IDS = byte_tokenizer()("abcdef")["input_ids"]
ASSISTANT = {"assistant_only_loss": True}

CASES = {
    "prompt/completion": ([{"prompt": "up", "completion": "UP"}], {}, ["up«UP<eos>»"]),
    "prompt/completion, whole": (
        [{"prompt": "up", "completion": "UP"}],
        {"completion_only_loss": False},
        ["«upUP<eos>»"],
    ),
    "prompt/completion of messages": (
        [{"prompt": CHAT[:3], "completion": CHAT[3:]}],
        {},
        ["u:hi;a:ho<eos>u:1;a:«2<eos>»"],
    ),
    "prompt/completion of messages, assistant": (
        [{"prompt": CHAT[:3], "completion": CHAT[3:]}],
        {**ASSISTANT, "completion_only_loss": False},
        ["u:hi;a:«ho<eos>»u:1;a:«2<eos>»"],
    ),
    "messages": ([{"messages": CHAT}], {}, ["«u:hi;a:ho<eos>u:1;a:2<eos>»"]),
    "messages, assistant": (
        [{"messages": CHAT}, {"messages": [{"role": "system", "content": "s"}, *CHAT[:2]]}],
        ASSISTANT,
        ["u:hi;a:«ho<eos>»u:1;a:«2<eos>»", "s:s;u:hi;a:«ho<eos>»"],
    ),
    "sharegpt, assistant": ([{"conversations": SPOKEN}], ASSISTANT, ["u:hi;a:«ho<eos>»u:1;a:«2<eos>»"]),
    "alpaca": (
        [
            {"instruction": "Add", "input": "1 2", "output": "3", "system": None},
            {"instruction": "Hi", "input": "", "output": "Ho", "system": "Be kind"},
        ],
        {},
        ["Add\n\n1 2\n\n«3<eos>»", "Be kind\n\nHi\n\n«Ho<eos>»"],
    ),
    "text": ([{"text": "abc"}], {}, ["«abc<eos>»"]),
    "tokenised": ([{"input_ids": IDS}], {}, ["«abcdef»"]),
    "tokenised with labels": (
        [{"input_ids": IDS, "labels": [-100, -100, *IDS[2:4], -100, IDS[5]]}],
        {"completion_only_loss": True},
        ["ab«cd»e«f»"],
    ),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("chat") / "model"
    save_tiny_model(directory)
    set_template(directory, TEMPLATE)
    return directory


def set_template(directory, template: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(directory)


def prepared(tmp_path, model, rows, **keys):
    settings = {
        "model_name_or_path": str(model),
        "dataset_path": write(tmp_path / "rows.jsonl", *rows),
        "output_dir": str(tmp_path / "out"),
        "gradient_checkpointing": False,
        "max_length": 64,
        "disable_tqdm": True,
        **keys,
    }
    (tmp_path / "run.yaml").write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))
    return prepare(load_run(tmp_path / "run.yaml"))


def marked(ids, labels) -> str:
    """The text of a row, what is trained between guillemets."""
    assert len(ids) == len(labels) and all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
    pieces = [
        f"«{byte_tokenizer().decode([token])}»" if label != -100 else byte_tokenizer().decode([token])
        for token, label in zip(ids, labels, strict=True)
    ]
    return re.sub("»«", "", "".join(pieces))


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(("rows", "keys", "expected"), CASES.values(), ids=CASES)
def test_the_tokens_that_are_trained(tmp_path, model, rows, keys, expected, packing):
    found = prepared(tmp_path, model, rows, packing=packing, **keys)
    documents = []
    for row in found.train_set:
        start = 0
        for length in row.get("seq_lengths", [len(row["input_ids"])]):
            documents.append(marked(row["input_ids"][start:][:length], row["labels"][start:][:length]))
            start += length
    assert sorted(documents) == sorted(expected)
    # The loss never reaches the first token of a document; all else arrives in the batches.
    batches = list(found.trainer.get_train_dataloader())
    trained = sum(int((batch["labels"] != -100).sum()) for batch in batches)
    first = sum(text.startswith("«") for text in expected) if packing else 0
    inside = "".join(re.findall("«(.*?)»", "".join(expected), flags=re.DOTALL)).replace("<eos>", "E")
    assert trained == len(inside) - first


@pytest.mark.parametrize("packing", [False, True])
def test_a_preview_shows_them(tmp_path, model, packing):
    rows, keys, _ = CASES["messages, assistant"]
    found = prepared(tmp_path, model, rows[:1], packing=packing, **keys)
    assert preview(found.train_set[0], found.tokenizer) == [
        ("u:hi;a:", False),
        ("ho<eos>", True),
        ("u:1;a:", False),
        ("2<eos>", True),
    ]


def test_a_preview_keeps_characters_whole():
    tokenizer = byte_tokenizer()
    ids = tokenizer("aéb")["input_ids"]
    assert preview({"input_ids": ids, "labels": [-100, -100, *ids[2:]]}, tokenizer) == [("a", False), ("éb", True)]
    assert preview({"input_ids": ids}, tokenizer) == [("aéb", True)]


@pytest.mark.parametrize(
    ("rows", "keys", "message"),
    [
        ("prompt/completion", ASSISTANT, "assistant_only_loss.*prompts and completions.*completion_only_loss"),
        ("text", ASSISTANT, "assistant_only_loss.*plain text.*leave assistant_only_loss out"),
        ("tokenised", ASSISTANT, "assistant_only_loss.*token ids"),
        ("messages", {"completion_only_loss": True}, "completion_only_loss.*say assistant_only_loss: true"),
        ("text", {"completion_only_loss": True}, "completion_only_loss.*plain text"),
        ("tokenised", {"completion_only_loss": True}, "completion_only_loss.*has no labels"),
    ],
)
def test_a_loss_that_the_rows_cannot_have_is_refused(tmp_path, model, rows, keys, message):
    with pytest.raises(ConfigError, match=message):
        prepared(tmp_path, model, CASES[rows][0], **keys)


def test_a_template_without_marks_is_refused_with_the_mend(tmp_path, model):
    path = tmp_path / "plain.jinja"
    path.write_text(TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", ""))
    rows = CASES["messages"][0]
    with pytest.raises(ConfigError, match=r"\{% generation %\}.*chat_template_path.*assistant_only_loss: false"):
        prepared(tmp_path, model, rows, assistant_only_loss=True, chat_template_path=str(path))
    path.write_text(TEMPLATE)
    assert len(prepared(tmp_path, model, rows, assistant_only_loss=True, chat_template_path=str(path)).train_set) == 1
