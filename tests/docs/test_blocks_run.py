"""Every fenced block of README.md and docs/ is run, or says why not and is checked as far as it can be."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="the pages train by `smt train`")
pytest.importorskip("jsonschema", reason="parts of a YAML are checked by its schema")

import torch
from desk import Desk, check_command, commands
from pages import NAMES, PAGES, ROOT, Fence, fences
from stand_ins import STAND_INS

# What can keep a block from being run. `read by`: the file of another program.
REASONS = re.compile(r"(needs|takes|read by) \w+")
# Pages whose blocks a test of their own runs, with what these need.
ELSEWHERE = {"docs/dspy.md": "tests/integrations/test_dspy.py"}


@pytest.fixture
def desk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Desk(tmp_path)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_block_of_a_page_runs(page, desk):
    name = page.relative_to(ROOT).as_posix()
    for stand_in in STAND_INS.get(name, ()):
        stand_in(desk)
    for fence in fences(page):
        if name in ELSEWHERE:
            fence = replace(fence, reason=f"run by {ELSEWHERE[name]}")
        try:
            desk.take(fence)
        except Exception as error:
            raise AssertionError(f"{page.name}, line {fence.line}: {type(error).__name__}: {error}") from error


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_a_block_has_a_language_and_a_mark_a_reason(page):
    for fence in fences(page):
        place = f"{page.name}, line {fence.line}"
        assert hasattr(Desk, f"_{fence.language}"), f"{place}: {fence.language!r} is no language that is run here"
        assert fence.reason is None or REASONS.match(fence.reason), f"{place}: {fence.reason!r} is no reason"


@pytest.mark.parametrize("name", sorted({*ELSEWHERE} & {*NAMES}))
def test_a_page_that_is_run_elsewhere_is_named_there(name):
    assert Path(name).name in (ROOT / ELSEWHERE[name]).read_text(encoding="utf-8")


def test_most_blocks_are_run():
    found = [fence for page in PAGES for fence in fences(page) if fence.language != "text"]
    left_out = [fence for fence in found if fence.reason]
    assert len(left_out) <= len(found) / 3, f"{len(left_out)} of {len(found)} are not run"


@pytest.mark.parametrize(
    ("language", "text", "reason"),
    [
        ("python", "1 / 0", None),
        ("python", "def :", "needs a GPU"),
        ("json", "{", None),
        ("bash", "false", None),
        ("bash", "smt train nothing.yaml", None),
        ("bash", "smt trian run.yaml", "needs a GPU"),
        ("yaml", "learnin_rate: 1e-3", None),
        ("yaml", "smt: {densty: 0.1}", "needs a GPU"),
        ("yaml", "{base_model: nowhere/here, dataset_path: none.jsonl, output_dir: out}", None),
    ],
)
def test_a_block_that_does_not_hold_is_noticed(desk, capsys, language, text, reason):
    with pytest.raises((AssertionError, ArithmeticError, SyntaxError, ValueError)):
        desk.take(Fence(language, text, 1, reason))


def test_what_is_another_programs_is_not_measured_by_our_keys(desk):
    desk.take(Fence("yaml", "plugins: [theirs]", 1, "read by axolotl"))


def test_a_command_goes_over_several_lines_and_has_comments():
    assert commands("# first\nsmt train run.yaml \\\n    lr=1  # fast\n\nsmt env\n") == [
        "smt train run.yaml lr=1  # fast",
        "smt env",
    ]


@pytest.mark.parametrize(
    "line", ["smt trian run.yaml", "smt merge --upon a b", "make nothing", "accelerate launch -m smt_peft.cli plam x"]
)
def test_a_command_that_does_not_exist_is_noticed(line, capsys):
    with pytest.raises(AssertionError):
        check_command(line.split())


def test_a_command_that_exists_is_not_run(capsys):
    launched = ["accelerate", "launch", "--num_processes", "8", "-m", "smt_peft.cli", "train", "run.yaml", "lr=1"]
    check_command(["CUDA_VISIBLE_DEVICES=0", *launched])
    check_command(["make", "demo"])
    check_command(["vllm", "serve", "out"])
