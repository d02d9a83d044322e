"""Writes docs/api.md from the docstrings, without importing anything: `make docs`, or

python docs/make_api.py            # writes it
python docs/make_api.py --check    # exits with 1 when it is not what the docstrings say
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import griffe

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "api.md"
# What a user may build on, by the place it is imported from. Other names may change.
NAMES = {
    "smt_peft": ("SMTConfig", "select_blocks", "BlockSelection"),
    "smt_peft.blocks": ("BlockGrid",),
    "smt_peft.optim": ("SMTAdamW", "MeZO"),
    "smt_peft.tuner": ("hotswap_adapter", "make_room"),
    "smt_peft.tuner.padding": ("padding_masks",),
    "smt_peft.tuner.effective": ("effective_update",),
    "smt_peft.export.merge": ("merge_adapter",),
    "smt_peft.export.lora": ("export_lora", "convert_to_lora", "exact_ranks", "LoraForm"),
    "smt_peft.export.patch": ("export_patch",),
    "smt_peft.export.patching": ("apply_patch", "revert_patch"),
    "smt_peft.training.yaml.schema": ("load_run", "Run"),
    "smt_peft.training.run": ("train", "select"),
    "smt_peft.training.verify_adapter": ("verify_adapter",),
    "smt_peft.plan.plan": ("plan", "Plan"),
    "smt_peft.report.picture": ("draw_selection",),
    "smt_peft.report.html": ("write_report",),
    "smt_peft.ops": (
        "block_grad",
        "block_scores",
        "block_matmul_",
        "block_gather",
        "block_scatter_",
        "swap_linear",
        "swap_matmul",
        "block_adamw_",
        "block_linear",
        "block_add",
        "block_overlay",
        "use_backend",
        "served",
        "explain",
    ),
}
HEAD = """\
# The Python names

Made from the docstrings by `make docs`. What is here may be built upon; other names may change. The keys of a YAML are
in [yaml.md](yaml.md), the verbs of the command line in `smt --help`.
"""
OPERATORS = ("__or__", "__and__", "__sub__")
LISTS = {"parameters": "Takes", "attributes": "Holds", "returns": "Gives", "yields": "Gives", "raises": "Raises"}


def page() -> str:
    """The whole of docs/api.md."""
    package = griffe.load("smt_peft", search_paths=[ROOT], docstring_parser="google")
    parts = [HEAD, "\n".join(index())]
    for place, names in NAMES.items():
        room = package[place.partition(".")[2]] if "." in place else package
        parts.append(f"## {place}")
        for name in names:
            parts += entry(room[name], name, "###")
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def index() -> Iterator[str]:
    """Where to find what; of two headings that differ in their capitals alone, GitHub numbers the second."""
    seen: list[str] = []
    for place, names in NAMES.items():
        links = []
        for name in names:
            number = seen.count(name.lower())
            seen.append(name.lower())
            links.append(f"[{name}](#{name.lower()}{f'-{number}' if number else ''})")
        yield wrapped(f"- `{place}`: {', '.join(links)}")


def entry(thing: griffe.Object | griffe.Alias, name: str, level: str) -> Iterator[str]:
    """Heading, signature and docstring; of a class its public methods and properties too."""
    yield f"{level} `{name}`"
    if "property" not in thing.labels:
        yield code(f"{name}({', '.join(parameters(thing))}){result(thing)}")
    for section in thing.docstring.parsed if thing.docstring else ():
        kind = section.kind.value
        yield section.value if kind == "text" else f"{LISTS[kind]}:\n\n" + "\n".join(items(section, kind))
    if thing.is_class:
        for member, inner in thing.members.items():
            called = inner.is_function or "property" in inner.labels
            if called and inner.docstring and (member in OPERATORS or not member.startswith("_")):
                yield from entry(inner, f"{name}.{member}", "####")


def parameters(thing: griffe.Object | griffe.Alias) -> Iterator[str]:
    """As in the signature, without types; a constant's name is replaced by what it stands for."""
    keyword_only = False
    for parameter in thing.parameters:
        if parameter.name in ("self", "cls"):
            continue
        kind = parameter.kind.value
        if kind == "keyword-only" and not keyword_only:
            yield "*"
        keyword_only |= kind in ("keyword-only", "variadic positional")
        stars = {"variadic positional": "*", "variadic keyword": "**"}.get(kind, "")
        default = "" if parameter.default is None or stars else f"={value(thing, parameter.default)}"
        yield f"{stars}{parameter.name}{default}"


def value(thing: griffe.Object | griffe.Alias, default: griffe.Expr | str) -> str:
    text = str(default)
    constant = thing.module.members.get(text)
    if constant is not None and constant.is_alias:
        constant = constant.final_target
    text = str(constant.value) if constant is not None and constant.is_attribute else text
    return "None" if text.startswith("field(") else text


def result(thing: griffe.Object | griffe.Alias) -> str:
    return f" -> {thing.returns}" if thing.is_function and thing.returns not in (None, "None") else ""


def items(section: griffe.DocstringSection, kind: str) -> Iterator[str]:
    for item in section.value:
        what = " ".join(item.description.split())
        if kind == "raises":
            yield wrapped(f"- `{item.annotation}`: {what}")
        elif kind in ("returns", "yields"):
            yield wrapped(f"- {what}")
        else:
            kinds = f" (`{item.annotation}`)" if item.annotation else ""
            yield wrapped(f"- `{item.name}`{kinds}: {what}")


def code(text: str) -> str:
    return wrapped(f"`{text}`", "")


def wrapped(text: str, indent: str = "  ") -> str:
    return textwrap.fill(text, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def main() -> int:
    text = page()
    if "--check" in sys.argv[1:]:
        return int(PAGE.read_text(encoding="utf-8") != text)
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
