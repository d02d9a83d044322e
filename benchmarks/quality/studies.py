"""Which cells are run to answer which question. A cell is a task, a method and a budget; its learning rate is tuned."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from smt_peft.presets import preset

from .docstrings import Docstrings
from .methods import RIVALS, SMT, START
from .skills import Skill
from .task import Task
from .trial import NEXT

#: Steps and rows of a batch, such that full fine-tuning just learns it: what a small budget costs can then be seen.
TASKS: dict[str, Callable[[], Task]] = {
    "reverse": lambda: Skill("reverse", 80),
    "sort": lambda: Skill("sort", 50),
    "shift": lambda: Skill("shift", 80),
    "docstrings": lambda: Docstrings(100),
    "reverse-long": lambda: Skill("reverse-long", 320, skill="reverse"),
    "shift-long": lambda: Skill("shift-long", 320, skill="shift"),
}
LONG = ("reverse-long", "shift-long")
SKILLS = ("reverse", "sort", "shift")
SEEDS = 3
#: Where the searches of a task start, as a multiple of where they start elsewhere.
RATE_SCALE = {"docstrings": 0.25}

#: The settings of `SMTConfig` that the evidence is about; `CHOSEN` are its defaults.
CHOSEN: dict[str, Any] = {
    "score": "grad_abs",
    "spread": "assignment",
    "budget": "per_module",
    "block_size": "auto",
}
#: What SMT's own scores and shapes express of other methods.
FAMILY: dict[str, dict[str, Any]] = {
    "smt": CHOSEN,
    "random": CHOSEN | {"score": "random"},
    "diagonal": CHOSEN | {"score": "diagonal"},
    "magnitude": CHOSEN | {"score": "magnitude"},
    "lift": CHOSEN | {"score": "low_rank_magnitude"},
    "columns": CHOSEN | {"score": "random", "block_size": [-1, 1], "spread": "free"},
    "rows": CHOSEN | {"score": "random", "block_size": [1, -1], "spread": "free"},
    "activation": CHOSEN | {"score": "activation", "block_size": [-1, 1], "spread": "free"},
    "released": CHOSEN | {"score": "mean_abs", "budget": "global", "spread": "free"},
}


def _in_turn(name: str) -> dict[str, Any]:
    """A preset of layers in turn, which the papers set for thousands of steps: here others train after 5 updates.

    So the four layers of a task take four turns each with 80 steps, one at a time; with K = 100 one layer alone would
    train, with K = 20 some never would.
    """
    return {"layer_sampling": preset(name)["layer_sampling"] | {"every": 5}}


#: What related methods add to SMT: a row each of docs/neighbours.md.
NEIGHBOURS: dict[str, dict[str, Any]] = {
    "lisa": CHOSEN | {"schedules": _in_turn("lisa")},
    "badam": CHOSEN | {"schedules": _in_turn("badam")},
    # The paper's r16 beside 0.6 % are as many weights each, on LLaMA2-7B.
    "rosa": CHOSEN | {"score": "grad_sq", "low_rank_share": 0.5},
    "mezo": CHOSEN | {"score": "random", "optimizer": "mezo"},
    "sparse mezo": CHOSEN | {"score": "small_magnitude", "spread": "free", "optimizer": "mezo"},
    "paca": FAMILY["columns"],
    "s2ft": {"coupled": "consumers", "score": "random", "budget": "global", "modules": "consumers"},
    "s2ft both": {"coupled": "both", "score": "random", "budget": "global", "modules": "channels"},
    # The preset's rank of 64 is for matrices 16 times as wide.
    "serve_as_lora": CHOSEN | {"spread": "free", "max_lora_rank": 8, "block_size": 2},
    "avoid": CHOSEN | {"avoid_task": NEXT},
    "slimfit": CHOSEN | preset("slimfit")["smt"] | {"schedules": {"freezing": preset("slimfit")["freezing"]}},
    "spiel": CHOSEN | {"schedules": {"regrowth": preset("spiel")["regrowth"]}},
}
#: Where the searches of those start whose rates are not AdamW's.
NEIGHBOUR_START = {"mezo": 0.128, "sparse mezo": 0.128}
#: Of the modules, as the paper chooses per task; 0.9 most often.
FROZEN_SHARES = (0.5, 0.75, 0.9)
#: With the budget of each.
FREEZING_TASKS = {**dict.fromkeys((*SKILLS, *LONG), 2), "docstrings": 8}
FAMILY |= NEIGHBOURS


@dataclass(frozen=True)
class Cell:
    """A method on a task at a budget.

    Args:
        task: of `TASKS`.
        name: what a table calls it.
        method: as `methods.prepare` takes it.
        budget: rank of the LoRA with as many trainable weights.
        settings: as `methods.prepare` takes them.
        start: learning rate from where the search begins.
    """

    task: str
    name: str
    method: str
    budget: float
    settings: dict[str, Any] = field(default_factory=dict)
    start: float = 0.0


def cell(task: str, name: str, rank: float, **changes: Any) -> Cell:
    """By the name of a method, or of the SMT family with some settings changed."""
    scale = RATE_SCALE.get(task, 1.0)
    label = ", ".join([name, *(f"{key}={value}" for key, value in changes.items())])
    if name in FAMILY:
        return Cell(task, label, SMT, rank, FAMILY[name] | changes, scale * NEIGHBOUR_START.get(name, START[SMT]))
    return Cell(task, label, name, 0 if name == "full" else rank, changes, scale * START[name])


def core(tasks: tuple[str, ...], budgets: tuple[float, ...]) -> Iterator[Cell]:
    """SMT's defaults beside full fine-tuning, the rivals that are named most, and what needs no selection."""
    for budget in budgets:
        for name in ("smt", "lora", "dora", "random", "diagonal", "full", "shira"):
            yield from (cell(task, name, budget) for task in tasks)


def rivals() -> Iterator[Cell]:
    """The rest of PEFT on the skill where LoRA does best; its best four, and what SMT expresses of others, on all."""
    for name in ("lift", "magnitude", "columns", "rows", "activation", "released", "oft", "waveft", "hira", "hra"):
        yield from (cell(task, name, 2) for task in SKILLS)
    yield from (cell("sort", name, 2) for name in RIVALS)


def longer() -> Iterator[Cell]:
    """Four times the steps: who is only slow?"""
    for name in ("smt", "lora"):
        yield from (cell(task, name, 2) for task in LONG)


def budgets() -> Iterator[Cell]:
    for budget in (0.32, 16):
        for name in ("smt", "lora", "random", "diagonal"):
            # The least LoRA of all layers is rank 1; on these three of a layer, rank 1 has as many weights as 0.32.
            part = {"modules": "qvo"} if name == "lora" and budget < 1 else {}
            yield from (cell(task, name, budget, **part) for task in SKILLS)


def spread() -> Iterator[Cell]:
    """Score by how the blocks may lie; a score that is close to another is left out of what lies between."""
    for score in ("grad_abs", "mean_abs", "low_rank_magnitude", "random", "taylor", "magnitude"):
        for lie in ("free", "assignment"):
            yield from (cell(task, "smt", 2, score=score, spread=lie) for task in SKILLS)
    for score in ("grad_abs", "mean_abs", "low_rank_magnitude", "random", "magnitude"):
        yield from (cell(task, "smt", 2, score=score, spread="capped") for task in SKILLS)
    yield from (cell(task, "smt", 2, score="grad_sum_abs") for task in SKILLS)


def blocks() -> Iterator[Cell]:
    """Sizes beside the automatic one, which is 4 here; no module is large enough for one block of 64 of its own."""
    for size in (2, 8, 16, 32, [2, 8], [8, 2], [-1, 1], [1, -1]):
        yield from (cell(task, "smt", 2, block_size=size) for task in SKILLS)
    yield from (cell(task, "smt", 2, block_size=64, budget="global") for task in SKILLS)


def encoder_blocks() -> Iterator[Cell]:
    """The automatic size is 8 here."""
    for size in (4, 16):
        yield cell("docstrings", "smt", 8, block_size=size)
    for size in (64, 256):
        yield cell("docstrings", "smt", 8, block_size=size, budget="global")


def encoder_choice() -> Iterator[Cell]:
    for changes in (
        {"spread": "free"},
        {"budget": "global", "spread": "free"},
        {"budget": "global"},
        {"score": "mean_abs"},
        {"score": "taylor"},
    ):
        yield cell("docstrings", "smt", 8, **changes)
    yield cell("docstrings", "lift", 8)


def scope() -> Iterator[Cell]:
    for budget in ("per_layer", "global"):
        for lie in ("assignment", "free"):
            yield from (cell(task, "smt", 2, budget=budget, spread=lie) for task in SKILLS)


def modules() -> Iterator[Cell]:
    for part in ("attention", "mlp"):
        for name in ("smt", "lora"):
            yield from (cell(task, name, 2, modules=part) for task in SKILLS)


def warmup() -> Iterator[Cell]:
    """16 batches are the rule here."""
    for count in (1, 4, 64, 200):
        yield from (cell(task, "smt", 2, warmup_batches=count) for task in SKILLS)


def transfer() -> Iterator[Cell]:
    for task in SKILLS:
        yield from (cell(task, "smt", 2, warmup_task=other) for other in SKILLS if other != task)


def neighbours() -> Iterator[Cell]:
    for name in ("smt", *NEIGHBOURS):
        yield from (cell(task, name, 2) for task in SKILLS)


def frozen(share: float) -> dict[str, Any]:
    """What changes the freezing of `slimfit`."""
    return {"schedules": {"freezing": preset("slimfit")["freezing"] | {"share": share}}}


def freezing() -> Iterator[Cell]:
    """What a share of frozen modules costs: in few updates, in four times as many, and of an encoder."""
    for share in FROZEN_SHARES:
        yield from (cell(task, "slimfit", rank, **frozen(share)) for task, rank in FREEZING_TASKS.items())


STUDIES: dict[str, Callable[[], Iterator[Cell]]] = {
    "core": lambda: core(SKILLS, (2, 6)),
    "encoder": lambda: core(("docstrings",), (8, 2)),
    "scope": scope,
    "blocks": blocks,
    "encoder-choice": encoder_choice,
    "spread": spread,
    "warmup": warmup,
    "budgets": budgets,
    "modules": modules,
    "transfer": transfer,
    "rivals": rivals,
    "encoder-blocks": encoder_blocks,
    "longer": longer,
    "neighbours": neighbours,
    "freezing": freezing,
}


def cells(names: list[str]) -> list[Cell]:
    """Of these studies, in their order, each once."""
    found: dict[str, Cell] = {}
    for name in names:
        for each in STUDIES[name]():
            found.setdefault(repr((each.task, each.method, each.budget, sorted(each.settings.items()))), each)
    return list(found.values())
