"""README.md and docs/*.md as a reader's program sees them: fenced blocks, links, tables and quotations."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
# Stands on the line before a fence, where a reader of the page does not see it.
MARK = re.compile(r"<!-- not run: (.+?) -->\s*$")
# A block whose first line is a file's name is that file.
FILE = re.compile(r"(?:#|//) ([\w./-]+\.(?:py|sh|ya?ml|jsonl?))\n")


@dataclass(frozen=True)
class Fence:
    """A fenced block.

    Args:
        language: what stands behind the three backticks.
        text: what stands inside.
        line: of the page, from 1.
        reason: why it is not run, if its mark says so.
    """

    language: str
    text: str
    line: int
    reason: str | None

    @property
    def file(self) -> str | None:
        """Name of the file that the block shows."""
        found = FILE.match(self.text)
        return found[1] if found else None


def tokens(path: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(path.read_text(encoding="utf-8"))


def fences(path: Path) -> list[Fence]:
    found, before = [], None
    for token in tokens(path):
        if token.type == "fence":
            mark = MARK.search(before.content) if before is not None and before.type == "html_block" else None
            found.append(Fence(token.info.strip(), token.content, token.map[0] + 1, mark[1] if mark else None))
        before = token
    return found


def links(path: Path) -> Iterator[str]:
    """Where links and pictures lead, as written."""
    for token in tokens(path):
        for child in token.children or ():
            yield from (str(child.attrs[name]) for name in ("href", "src") if name in child.attrs)


def anchors(path: Path) -> set[str]:
    """The headings of a page as the fragments by which GitHub links to them."""
    page, found = tokens(path), []
    for place, token in enumerate(page):
        if token.type == "heading_open":
            text = "".join(part.content for part in page[place + 1].children or ())
            found.append(re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-"))
    repeats = (found[:place].count(name) for place, name in enumerate(found))
    return {f"{name}-{count}" if count else name for name, count in zip(found, repeats, strict=True)}


def rows(path: Path) -> list[list[list[str]]]:
    """Every row of the tables of a page, heads left out: the code spans of each of its cells."""
    found: list[list[list[str]]] = []
    head = False
    for token in tokens(path):
        if token.type in ("thead_open", "thead_close"):
            head = token.type == "thead_open"
        elif token.type == "tr_open" and not head:
            found.append([])
        elif token.type == "inline" and found and not head and token.level >= 4:
            found[-1].append([child.content for child in token.children or () if child.type == "code_inline"])
    return found


def quotations(path: Path) -> list[tuple[int, str]]:
    """The block quotations of a page, each with its line."""
    depth, found = 0, []
    for token in tokens(path):
        depth += (token.type == "blockquote_open") - (token.type == "blockquote_close")
        if depth and token.type == "inline":
            found.append((token.map[0] + 1, " ".join(token.content.split())))
    return found
