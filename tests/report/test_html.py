"""`report.html`: what it shows is in the files, it needs nothing else, and nothing in a file can act in it."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import yaml

from smt_peft import cli
from smt_peft.blocks import BlockGrid, BlockSelection
from smt_peft.report.files import METRICS, RUN, SELECTION, UNFINISHED
from smt_peft.report.html import HTML, write_report
from smt_peft.report.shade import MAX_CELLS

VOID = {"meta", "link", "br", "image", "path", "rect", "circle"}


class Page(HTMLParser):
    """A page taken apart: attributes of every element, the text, and whether every element is closed in its order."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.chunks: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.chunks.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self) -> str:
        return "".join(self.chunks)

    @property
    def words(self) -> str:
        """The text with one space between words and between elements."""
        return " ".join(" ".join(self.chunks).split())


def selection() -> BlockSelection:
    """Two layers of two kinds; one matrix without a block; ragged edges."""
    grids = {f"model.layers.{layer}.{kind}": BlockGrid(10, 20, 4, 4) for layer in range(2) for kind in ("q", "mlp.up")}
    blocks = {"model.layers.0.q": [[0, 0], [2, 4]], "model.layers.0.mlp.up": [[1, 1]], "model.layers.1.q": [[0, 3]]}
    tensors = {name: torch.tensor(value, dtype=torch.int32) for name, value in blocks.items()}
    generator = torch.Generator().manual_seed(0)
    scores = {name: torch.rand(3, 5, generator=generator) for name in grids}
    return BlockSelection(
        tensors, grids, scores, {"score": "grad_abs", "num_batches": 4, "base_fingerprint": {"q": [7]}}
    )


def numbers() -> dict:
    history = [
        {"step": step, "loss": 2 / step, "learning_rate": 0.1, "num_tokens": 50 * step, "elapsed": step}
        for step in range(1, 5)
    ]
    return {
        "before": {"eval_loss": 2.0, "exact_match": 0.1},
        "after": {"eval_loss": 1.25, "exact_match": 0.5, "seconds": 90.0},
        "trainable_parameters": 56,
        "seconds": {"loading": 1.0, "training": 90.0},
        "effective_update": {
            "share": 0.5,
            "entries": 56,
            "moved": 42,
            "changed": 28,
            "dtype": "bfloat16",
            "modules": {
                "model.layers.0.q": [24, 18, 6],
                "model.layers.0.mlp.up": [16, 8, 8],
                "model.layers.1.q": [16, 16, 14],
            },
        },
        "memory": {"weights": 4096, "trained": 2048, "moments": 4096, "resident": 2**30},
        "plan": {
            "weights": 4096,
            "trained": 1024,
            "moments": 4096,
            "peak": 8192,
            "warm_up": 0,
            "gradients": 1,
            "saved": 2,
            "assumed": ["a thing"],
        },
        "tokens_per_second": 50.0,
        "command": "smt train run.yaml",
        "device": "cpu (abacus)",
        "python": "3.12.1",
        "threads": 2,
        "processes": 1,
        "versions": {"torch": "2.13.0"},
        "backends": {"block_grad": ["native"]},
        "verified": {
            "passed": {"reload": True, "merged": True},
            "rows": 4,
            "reload_difference": 0.0,
            "merged_difference": 1e-5,
            "merged_tolerance": 2e-5,
            "dtype": "float32",
        },
        "lora": {"rank": 2, "eval_loss": 1.5, "learning_rate": 0.01, "log_history": history},
        "log_history": history,
    }


def make(directory: Path, metrics: dict | None, name: str = METRICS, settings: dict | None = None) -> Path:
    directory.mkdir(exist_ok=True)
    selection().save(directory / SELECTION)
    settings = {
        "model_name_or_path": "org/model",
        "learning_rate": 0.1,
        "output_dir": str(directory),
        **(settings or {}),
    }
    if metrics is not None:
        (directory / name).write_text(json.dumps(metrics))
        (directory / RUN).write_text(yaml.safe_dump(settings))
        (directory / "adapter_config.json").write_text(json.dumps({"task_type": "CAUSAL_LM"}))
    return directory


def page(directory: Path) -> Page:
    return Page(write_report(directory).read_text(encoding="utf-8"))


@pytest.fixture
def run(tmp_path) -> Path:
    return make(tmp_path / "run", numbers())


def test_the_parts_of_a_finished_run(run):
    text = write_report(run).read_text()
    assert re.findall(r"<h2>(.*?)</h2>", text) == [
        "Result", "Training", "Effective update", "Blocks", "Memory, planned and measured", "Verification", "Next",
        "How it was made",
    ]  # fmt: skip
    found = Page(text)
    assert found.all("html") == [{"lang": "en"}] and len(found.all("h1")) == 1
    assert list(run.glob("*.part")) == []


def test_figures_are_those_of_the_files(run):
    words = page(run).words
    assert "before SMT LoRA, rank 2" in words
    assert "evaluation loss 2.0000 1.2500 1.5000" in words
    assert "exact match 10.0% 50.0% –" in words
    assert "learning rate – 0.1 0.01" in words
    assert "50.0% of the 56 trained entries hold another value than the base, once stored in bfloat16" in words
    # By kind: q of both layers together.
    assert "q 40 85.0% 50.0%" in words and "up 16 50.0% 50.0%" in words
    assert "Tokens per second 50" in words
    assert "blocks 1.0 KiB 2.0 KiB +100.0%" in words and "frozen weights 4.0 KiB 4.0 KiB +0.0%" in words
    assert "peak of the training 8.0 KiB – –" in words and "largest resident set of the process was 1.0 GiB" in words
    assert "layer q up all 0 12.0% 8.00% 10.0% 1 8.00% 0% 4.00% all 10.0% 4.00% 7.00%" in words
    assert "rounding in float32 allows 2e-05" in words


def test_made_again_it_is_the_same(run):
    once = write_report(run).read_bytes()
    (run / HTML).unlink()
    assert cli.main(["report", str(run)]) == 0
    assert (run / HTML).read_bytes() == once


def test_it_needs_nothing_from_anywhere(run):
    text = write_report(run).read_text()
    found = Page(text)
    tags = Counter(tag for tag, _ in found.elements)
    assert not tags.keys() & {"script", "iframe", "object", "embed", "base", "form"}
    for tag, attributes in found.elements:
        for name in ("src", "href", "srcset", "data", "xlink:href"):
            assert attributes.get(name, "data:").startswith("data:"), f"{tag} {attributes}"
        assert not [name for name in attributes if name.startswith("on")]
    assert not re.search(r"url\(|@import|https?://", text)


def test_nothing_in_a_file_acts_on_the_page(tmp_path):
    """Wherever a text comes from, it is shown as it is."""
    evil = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>"

    def spoilt(value):
        if isinstance(value, str):
            return evil + value
        if isinstance(value, dict):
            named = {"versions": evil, "backends": [evil], "passed": True}
            return {key: {evil: named[key], **each} if key in named else spoilt(each) for key, each in value.items()}
        return [spoilt(each) for each in value] if isinstance(value, list) else value

    directory = make(tmp_path / "run", spoilt(numbers()), settings={"model_name_or_path": evil, evil: evil})
    chosen = selection()
    renamed = BlockSelection(
        {evil + name: blocks for name, blocks in chosen.blocks.items()},
        {evil + name: grid for name, grid in chosen.grids.items()},
        {evil + name: score for name, score in chosen.scores.items()},
        {"score": evil, evil: evil},
    )
    renamed.save(directory / SELECTION)
    found = page(directory)
    assert found.text.count(evil) > 20
    assert not {"script", "img"} & {tag for tag, _ in found.elements}
    assert not [name for _, attributes in found.elements for name in attributes if name.startswith("on")]


def test_pictures_are_told_in_words(run):
    found = page(run)
    pictures = [attributes for attributes in found.all("svg") if "aria-hidden" not in attributes]
    assert len(pictures) >= 6
    assert all(attributes["role"] == "img" and len(attributes["aria-label"]) > 10 for attributes in pictures)


def test_the_grid_outlines_the_chosen_blocks_over_their_scores(run):
    found = page(run)
    outlines = [attributes["d"] for attributes in found.all("path") if "chosen" in (attributes.get("class") or "")]
    # Of layer 0: q, which has most blocks, and up; a cell is named column first.
    assert outlines == ["M0 0h1v1h-1zM4 2h1v1h-1z", "M1 1h1v1h-1z"]
    assert len(found.all("image")) == 2


def test_no_block_vanishes_from_a_large_grid(tmp_path):
    grid = BlockGrid(4096, 4096, 4, 4)
    lonely = torch.tensor([[511, 700]], dtype=torch.int32)
    BlockSelection({"layers.0.q": lonely}, {"layers.0.q": grid}).save(tmp_path / SELECTION)
    found = page(tmp_path)
    (outline,) = [each for each in found.all("path") if "chosen" in (each.get("class") or "")]
    cells = {tuple(map(int, cell)) for cell in re.findall(r"M(\d+) (\d+)h1", outline["d"])}
    assert 1 <= len(cells) <= 4
    assert all(abs(col - 700 * MAX_CELLS / 1024) <= 1 and abs(row - 511 * MAX_CELLS / 1024) <= 1 for col, row in cells)
    assert "filled" in outline["class"] and "No scores were kept" in found.words


def test_a_selection_alone_has_its_pictures(tmp_path):
    found = page(make(tmp_path / "run", None))
    assert "blocks chosen, nothing trained yet" in found.words
    assert "of the gradient, by absolute value" in found.words and len(found.all("image")) == 2
    assert "smt train RUN.yaml smt.selection=" in found.words
    assert "verified" not in found.words and "nan" not in found.words.lower()


def test_a_run_that_was_stopped_shows_what_it_has(tmp_path):
    directory = make(tmp_path / "run", {}, UNFINISHED)
    (directory / UNFINISHED).unlink()
    for step, loss in ((9, 0.25), (10, 0.125)):
        (directory / f"checkpoint-{step}").mkdir()
        state = {"log_history": [{"step": 1, "loss": 1.0}, {"step": step, "loss": loss}]}
        (directory / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(state))
    found = page(directory)
    assert "stopped half way" in found.words and "resume_from_checkpoint=true" in found.words
    assert "training from 1 to 0.125" in found.text
    (directory / UNFINISHED).write_text(
        json.dumps({key: value for key, value in numbers().items() if key != "verified"})
    )
    assert "trained and saved, not yet verified" in page(directory).words


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"plan": {"error": "ConfigError: no such model"}}, "The plan could not be made: ConfigError: no such model."),
        ({"plan": None}, "No plan was made with this run"),
        ({"effective_update": {"error": "q: the weight is elsewhere"}}, "Not counted: q: the weight is elsewhere."),
        ({"verified": {"passed": {"reload": False}}}, "✗ verification failed"),
    ],
)
def test_what_is_missing_is_told(tmp_path, change, told):
    assert told in page(make(tmp_path / "run", {**numbers(), **change})).words


@pytest.mark.parametrize(
    "missing",
    [
        "effective_update",
        "memory",
        "plan",
        "tokens_per_second",
        "verified",
        "lora",
        "seconds",
        "command",
        "log_history",
        "before",
        "versions",
    ],
)
def test_a_run_of_an_earlier_version_lacks_figures_and_is_shown(tmp_path, missing):
    metrics = numbers()
    del metrics[missing]
    assert "Made by smt_peft" in page(make(tmp_path / "run", metrics)).words


def test_secrets_stay_where_they_are(tmp_path):
    directory = make(tmp_path / "run", numbers(), settings={"hub_token": "hf_secret"})
    assert "hf_secret" not in write_report(directory).read_text()


def test_next_commands_are_commands(run, tmp_path, monkeypatch):
    """Every `smt` line is one that the command line takes, and its paths are the run's own."""
    monkeypatch.chdir(tmp_path)
    make(run, numbers(), settings={"output_dir": "run"})
    text = write_report(run).read_text()
    lines = [line for line in re.findall(r"<dd><pre><code>(.*?)</code>", text) if line.startswith("smt ")]
    assert [shlex.split(line)[:3] for line in lines] == [
        ["smt", "merge", "run"],
        ["smt", "verify", "run"],
        ["smt", "export", "run"],
        ["smt", "train", "run/run.yaml"],
        ["smt", "report", "run"],
    ]
    for line in lines:
        parser = cli._parser()
        args, rest = parser.parse_known_args(shlex.split(line)[1:])
        cli._take_settings(parser, args, rest)


def test_a_directory_that_is_no_run_is_refused(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path)]) == 2
    assert f"smt report: {tmp_path} holds no {SELECTION}" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


def test_a_damaged_file_is_named(run, capsys):
    (run / METRICS).write_text('{"after": ')
    assert cli.main(["report", str(run)]) == 2
    assert f"{run / METRICS} is damaged" in capsys.readouterr().err


def luminance(colour: str) -> float:
    """Relative luminance, WCAG 2.2."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_what_is_behind_it(run, scheme):
    text = write_report(run).read_text()
    light, dark = re.findall(r":root \{(.*?)\}", text, re.DOTALL)
    colours = dict(re.findall(r"--(\w+): (#\w{6})", {"light": light, "dark": dark}[scheme]))
    for behind in ("page", "card", "sunk"):
        for ink in ("ink", "soft", "orange", "good", "bad"):
            assert contrast(colours[ink], colours[behind]) >= 4.5, (ink, behind)
        for line in ("blue", "grey"):
            assert contrast(colours[line], colours[behind]) >= 3, (line, behind)
