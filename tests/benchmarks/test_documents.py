"""Every measurement that README and docs show in a table is made from JSON that is committed."""

from __future__ import annotations

import re

import pytest

from benchmarks import markdown, tables
from benchmarks.quality import figures

# A cell that is a measurement: a figure with a unit of time, memory or share, or a ratio.
MEASURED = re.compile(r"\d\s*(ms|us|s|%|MiB|GiB)\b|\d%|^\d+\.\d+$")


@pytest.mark.parametrize("path", tables.documents(), ids=lambda path: path.name)
def test_a_document_has_the_tables_that_the_committed_results_make(path):
    """After new results: python -m benchmarks.tables."""
    text = path.read_text(encoding="utf-8")
    assert tables.filled(text) == text


@pytest.mark.parametrize("path", tables.documents(), ids=lambda path: path.name)
def test_no_measurement_stands_in_a_table_written_by_hand(path):
    by_hand = tables.PLACE.sub("", path.read_text(encoding="utf-8"))
    for line in by_hand.splitlines():
        if line.startswith("|"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            assert not [cell for cell in cells if MEASURED.search(cell)], line


def test_every_table_is_shown_somewhere():
    text = "".join(path.read_text(encoding="utf-8") for path in tables.documents())
    assert {place["name"] for place in tables.PLACE.finditer(text)} == set(tables.TABLES)


@pytest.mark.parametrize("name", figures.FIGURES)
def test_a_figure_shows_the_points_that_the_committed_runs_give(name):
    """After new results: make tables."""
    collect, _, _ = figures.FIGURES[name]
    drawn = (figures.FOLDER / f"{name}.svg").read_text(encoding="utf-8")
    assert f"points {figures.checksum(collect())}" in drawn
    assert f"figures/{name}.svg" in (tables.ROOT / "docs" / "results.md").read_text(encoding="utf-8")


def test_a_table_that_nothing_makes_is_an_error():
    with pytest.raises(KeyError, match="no-such"):
        tables.filled("<!-- table no-such -->\n<!-- end -->")


def test_a_stale_table_is_replaced_and_the_text_around_it_is_left(monkeypatch):
    monkeypatch.setitem(tables.TABLES, "fresh", lambda: markdown.table(["a", "b"], [["x", "1"]]))
    text = "before\n<!-- table fresh -->\n| old |\n<!-- end -->\nafter\n"
    expected = "before\n<!-- table fresh -->\n| a | b |\n| --- | --: |\n| x | 1 |\n<!-- end -->\nafter\n"
    assert tables.filled(text) == expected
    assert tables.filled(expected) == expected


def test_a_row_of_another_width_is_an_error():
    with pytest.raises(ValueError, match="1 cells under 2 heads"):
        markdown.table(["a", "b"], [["x"]])
