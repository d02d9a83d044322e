"""Links between the pages lead somewhere, every page is in the index, and none names a place of one machine."""

from __future__ import annotations

import re

import pytest
from pages import NAMES, PAGES, ROOT, anchors, links

INDEX = ROOT / "docs" / "README.md"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page):
    for link in links(page):
        if re.match(r"[a-z]+:", link):
            assert link.startswith("https://"), link
            continue
        place, _, fragment = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        assert target.exists(), f"{page.name}: {link}"
        assert ROOT in target.parents, f"{page.name}: {link} leaves the repository"
        if fragment and target.suffix == ".md":
            assert fragment in anchors(target), f"{page.name}: {link}"


def test_every_page_is_in_the_index():
    listed = {(INDEX.parent / link.partition("#")[0]).resolve() for link in links(INDEX)}
    assert {page for page in PAGES if page.parent == INDEX.parent} - {INDEX} <= listed
    assert "docs/README.md" in set(links(ROOT / "README.md"))


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_a_page_names_no_place_of_one_machine(page):
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        place = f"{page.name}, line {number}"
        assert not re.search(r"(?<![\w.])/(work|home|root|tmp|Users|mnt)/", line), place
        assert not re.search(r"https?://(?!127\.0\.0\.1|localhost)[\d.]+|\b\w+\.(local|internal)\b", line), place
