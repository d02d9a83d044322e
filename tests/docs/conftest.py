"""The pages are read by markdown-it-py, which a machine with the package alone may lack."""

from __future__ import annotations

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("markdown_it") else ["test_*.py"]
