"""What the other tests take a page to hold is what it holds."""

from __future__ import annotations

import pytest
from pages import anchors, fences, links, quotations, rows

PAGE = """\
# A page, *really*

> It says … that.

| name | is |
| --- | --- |
| `a`, `b: 1` | `c` [link](other.md#x) |

<!-- not run: needs a GPU -->
```bash
one
```

```python
# file.py
two
```

- in a list

  ```yaml
  three: 3
  ```

## Twice

## Twice
"""


@pytest.fixture
def page(tmp_path):
    path = tmp_path / "page.md"
    path.write_text(PAGE)
    return path


def test_blocks_are_found_wherever_they_stand_and_a_mark_is_for_the_next_one_alone(page):
    found = [(fence.language, fence.text, fence.reason, fence.file) for fence in fences(page)]
    assert found == [
        ("bash", "one\n", "needs a GPU", None),
        ("python", "# file.py\ntwo\n", None, "file.py"),
        ("yaml", "three: 3\n", None, None),
    ]
    assert fences(page)[0].line == PAGE.splitlines().index("```bash") + 1


def test_rows_are_the_code_in_their_cells(page):
    assert rows(page) == [[["a", "b: 1"], ["c"]]]


def test_links_quotations_and_anchors(page):
    assert list(links(page)) == ["other.md#x"]
    assert quotations(page) == [(3, "It says … that.")]
    assert anchors(page) == {"a-page-really", "twice", "twice-1"}
