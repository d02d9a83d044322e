"""The architecture, held: imports go one way, and importing the package costs nothing it need not."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "smt_peft"

# Each room, with the rooms it may import from. A room not listed may be imported by nobody.
ALLOWED = {
    "blocks": set(),
    "say": set(),
    "_register": {"config", "tuner"},
    "config": {"blocks"},
    "presets": set(),
    "bases": {"blocks", "config", "say"},
    "ops": {"blocks", "say"},
    "optim": {"bases", "ops", "say"},
    "bench": {"blocks", "ops", "say"},
    "selection": {"bases", "blocks", "config", "ops", "say"},
    "tuner": {"bases", "blocks", "config", "ops", "say", "selection"},
    "schedules": {"optim", "selection", "tuner"},
    "export": {"bases", "blocks", "config", "ops", "say", "tuner"},
    "report": {"blocks", "config", "export", "ops", "say"},
    "training": {
        "__init__",
        "bases",
        "blocks",
        "config",
        "export",
        "ops",
        "optim",
        "presets",
        "report",
        "say",
        "schedules",
        "selection",
        "tuner",
    },
    "plan": {"bases", "blocks", "config", "ops", "schedules", "selection", "training", "tuner"},
    "integrations": {"config", "export", "say", "selection", "training"},
    "cli": {"bench", "blocks", "export", "plan", "report", "say", "selection", "training"},
    "__init__": {"_register", "blocks", "config", "selection"},
}
# The hosts, and the rooms that may know them.
HOSTS = {
    "peft": {"_register", "bases", "config", "tuner", "export", "integrations", "plan", "training"},
    "bitsandbytes": {"bases"},
    "torchao": {"bases"},
    "hqq": {"bases"},
    "trl": {"training"},
    "accelerate": {"training"},
    "deepspeed": {"bases", "training"},
    "datasets": {"training"},
    "triton": {"ops", "bench"},
    "matplotlib": {"report"},
    "jinja2": {"integrations", "report", "training"},
    "omegaconf": {"training"},
    "pydantic": {"integrations", "training"},
    "dspy": {"integrations"},
    "axolotl": {"integrations"},
    "swift": {"integrations"},
}


def imports():
    """`(file, room, imported room or None, imported top-level package or None)` for every import in the package."""
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        room = parts[0]
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield file, room, *_resolve(alias.name.split("."))
            elif isinstance(node, ast.ImportFrom):
                module = (node.module or "").split(".") if node.module else []
                if node.level == 0:
                    yield file, room, *_resolve(module)
                    continue
                package = list(parts[:-1])[: len(parts) - node.level]
                full = [*package, *module]
                for name in [full[0]] if full else [alias.name for alias in node.names]:
                    yield file, room, name, None


def _resolve(parts):
    return (parts[1] if len(parts) > 1 else "__init__", None) if parts[0] == "smt_peft" else (None, parts[0])


def test_imports_go_one_way():
    seen = set()
    for file, room, ours, host in imports():
        seen.add(room)
        where = f"{file.relative_to(PACKAGE)} (room {room})"
        if ours is not None and ours != room:
            assert ours in ALLOWED[room], f"{where} imports smt_peft.{ours}"
        if host in HOSTS:
            assert room in HOSTS[host], f"{where} imports {host}"
    assert seen == set(ALLOWED)


def test_no_cycle_in_what_is_allowed():
    left = {room: set(uses) for room, uses in ALLOWED.items()}
    while left:
        free = {room for room, uses in left.items() if not uses}
        assert free, f"these rooms import each other: {sorted(left)}"
        left = {room: uses - free for room, uses in left.items() if room not in free}


def test_importing_the_package_loads_no_triton_trl_or_cuda():
    # PEFT may import Triton for itself; here it is not to be had, and no kernel of ours is asked for.
    code = """
import sys, torch
sys.modules["triton"] = None
import smt_peft
heavy = {"trl", "datasets", "matplotlib", "smt_peft.ops.native", "smt_peft.ops.triton"} & set(sys.modules)
assert not heavy, heavy
assert not torch.cuda.is_initialized()
print("light")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "light", done.stderr


def test_public_names():
    import smt_peft

    assert smt_peft.__all__ == ["BlockSelection", "SMTConfig", "__version__", "select_blocks"]
    for name in smt_peft.__all__:
        assert getattr(smt_peft, name) is not None
