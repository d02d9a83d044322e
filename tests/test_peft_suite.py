"""The bookkeeping of `make peft-suite`: its tables explain every skip, and say nothing that is not so."""

from __future__ import annotations

import pytest
from peft_suite.table import Skip, matches, read_files, read_skips, stale, unexplained, untold

HEAD = "| test | what PEFT says | reason | PEFT |\n| --- | --- | --- | --- |\n"


@pytest.fixture
def skips(tmp_path) -> list[Skip]:
    table = HEAD + (
        "| `test_a.py::*merge[*` | | too large | |\n"
        "| `test_a.py::test_bias` | `*no 'bias' here*` | no biases | |\n"
        "| `test_b.py::*` | | gone since | <0.21 |\n"
    )
    (tmp_path / "skips.md").write_text(table)
    return read_skips("0.21.2", tmp_path / "skips.md")


def test_a_line_holds_for_the_versions_it_names(skips, tmp_path):
    assert [skip.reason for skip in skips] == ["too large", "no biases"]
    assert len(read_skips("0.20.0", tmp_path / "skips.md")) == 3


def test_brackets_in_a_name_are_brackets():
    assert matches("test_a.py::*[one-*", "test_a.py::T::test[one-two]")
    assert not matches("test_a.py::*[one-*", "test_a.py::T::testo")


def test_a_skip_without_a_line_is_found(skips):
    known = ("test_a.py::test_bias", "there is no 'bias' here, skipping")
    other_words = ("test_a.py::test_bias", "no GPU")
    other_test = ("test_a.py::test_other", "no 'bias' here")
    assert unexplained([known, other_words, other_test], skips) == [other_words, other_test]


def test_a_line_without_a_skip_is_found_once_its_file_has_run(skips):
    skipped = [("test_a.py::test_merge[1]", "too large")]
    assert [skip.reason for skip in stale(skipped, skips, {"test_a.py"})] == ["no biases"]
    assert not stale(skipped, skips, {"test_b.py"})


def test_a_line_with_a_missing_column_is_refused(tmp_path):
    (tmp_path / "skips.md").write_text(HEAD + "| `test_a.py` | reason |\n")
    with pytest.raises(ValueError, match="a line of 2 columns where 4 belong"):
        read_skips("0.21.2", tmp_path / "skips.md")


def test_the_committed_tables_are_whole():
    files, skips = read_files(), read_skips("0.21.2")
    assert files["test_custom_models.py"].is_taken and not files["test_*.py"].is_taken
    assert all(skip.reason for skip in skips)
    assert not untold(["test_custom_models.py", "test_lorafa.py"])
    for skip in skips:
        assert files[skip.test.split("::")[0]].is_taken, skip.test
