"""docs/api.md is what the docstrings say."""

from __future__ import annotations

import importlib
import runpy

import pytest

pytest.importorskip("griffe", reason="reads the docstrings")
pytest.importorskip("trl", reason="the names of training are checked too")

from pages import ROOT

MAKER = runpy.run_path(str(ROOT / "docs" / "make_api.py"))


def test_the_page_is_up_to_date():
    """After a change of a docstring: make docs."""
    assert (ROOT / "docs" / "api.md").read_text(encoding="utf-8") == MAKER["page"]()


@pytest.mark.parametrize("place", MAKER["NAMES"])
def test_every_name_can_be_imported_from_where_the_page_says(place):
    room = importlib.import_module(place)
    for name in MAKER["NAMES"][place]:
        assert getattr(room, name).__doc__


def test_the_public_names_are_there():
    import smt_peft

    assert {*smt_peft.__all__} - {"__version__"} == {*MAKER["NAMES"]["smt_peft"]}
