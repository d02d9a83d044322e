"""What docs/troubleshooting.md quotes is what the package says."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest
from pages import ROOT, quotations

QUOTED = quotations(ROOT / "docs" / "troubleshooting.md")
HOLE = "…"


def literals(node: ast.AST) -> Iterator[str]:
    """Every text in a source, with a hole for each value that is filled in."""
    for child in ast.walk(node):
        if isinstance(child, ast.Constant) and isinstance(child.value, str):
            yield child.value
        elif isinstance(child, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else HOLE for part in child.values)


@pytest.fixture(scope="module")
def said() -> str:
    sources = (ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "smt_peft").rglob("*.py"))
    texts = (text.replace("`", "") for source in sources for text in literals(source))
    return "\n".join(" ".join(text.split()) for text in texts)


@pytest.mark.parametrize(("line", "quoted"), QUOTED, ids=[f"line {line}" for line, _ in QUOTED])
def test_a_quoted_message_is_one_of_the_package(line, quoted, said):
    parts = [part.strip(" ();:.,") for part in quoted.replace("`", "").split(HOLE)]
    assert any(len(part) > 8 for part in parts)
    for part in parts:
        assert part in said, f"line {line}: nothing says {part!r}"
