"""Tables of docs/results.md about quality, each made from the committed runs."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from functools import cache, partial

from ..markdown import table
from .agreement import FILE as AGREEMENT
from .methods import RIVALS
from .results import Outcome, Runs
from .studies import FREEZING_TASKS, FROZEN_SHARES, LONG, NEIGHBOURS, SKILLS, STUDIES, Cell, cell, frozen

TITLES = {
    "smt": "**SMT** (defaults)",
    "random": "random blocks, a matching",
    "diagonal": "diagonal blocks (DiaBlo)",
    "magnitude": "magnitude, a matching",
    "lift": "low-rank magnitude (LIFT), a matching",
    "columns": "whole columns, random (PaCA)",
    "rows": "whole rows, random",
    "activation": "whole columns, by activation",
    "released": "as the released SMT code chooses",
    "full": "full fine-tuning",
    "lora": "LoRA",
    "dora": "DoRA",
    "rslora": "rsLoRA",
    "pissa": "PiSSA",
    "shira": "SHiRA",
    "miss": "MiSS",
    "loha": "LoHa",
    "hra": "HRA",
    "oft": "OFT",
    "gralora": "GraLoRA",
    "delora": "DeLoRA",
    "hira": "HiRA",
    "fourierft": "FourierFT",
    "waveft": "WaveFT",
    "ia3": "IA3",
    "lisa": "two layers at a time (LISA)",
    "badam": "one layer at a time (BAdam)",
    "slimfit": "freezing by dynamics (SlimFit)",
    "spiel": "drop and regrow (SpIEL)",
    "paca": "whole columns, random (PaCA)",
    "s2ft": "channels, columns alone (S2FT)",
    "s2ft both": "channels, both sides",
    "rosa": "blocks and a low-rank pair (RoSA)",
    "mezo": "forward passes alone (MeZO)",
    "sparse mezo": "the same over small weights (Sparse MeZO)",
    "serve_as_lora": "rank 8 at most",
    "avoid": "blocks that another skill left",
}
CORE = ("full", "smt", "random", "diagonal", "lora", "dora", "shira")
FAMILY = ("lift", "magnitude", "columns", "rows", "activation", "released", "oft", "waveft", "hira", "hra")
Row = tuple[str, list[Outcome | None]]


@cache
def runs() -> Runs:
    return Runs.read()


def outcomes(name: str, tasks: Sequence[str], rank: float, **changes) -> list[Outcome | None]:
    return [runs().outcome(cell(task, name, rank, **changes)) for task in tasks]


def mean(found: Sequence[Outcome | None], of: Callable[[Outcome], float | None]) -> float | None:
    """None where an outcome, or its figure, is missing."""
    values = [None if each is None else of(each) for each in found]
    return None if None in values or not values else statistics.mean(values)


def score(outcome: Outcome | None) -> str:
    return "-" if outcome is None else f"{outcome.accuracy:.1f} ± {outcome.deviation:.1f}"


def shown(value: float | None, form: str = ".1f") -> str:
    return "-" if value is None else format(value, form)


def rate(found: Sequence[Outcome | None]) -> str:
    rates = sorted({each.rate for each in found if each})
    return "-" if not rates else "-".join(f"{value:.1e}" for value in {rates[0]: 0, rates[-1]: 0})


def core(tasks: Sequence[str], budget: float, names: Sequence[str] = CORE, best_first: bool = True) -> str:
    """Accuracy in percent, mean and standard deviation over seeds; what is remembered; trained weights; rate."""
    rows = [(name, outcomes(name, tasks, budget)) for name in names]
    rows = [(name, found) for name, found in rows if any(found)]
    if best_first:
        rows.sort(key=lambda row: -(mean(row[1], lambda each: each.accuracy) or 0))
    forgetting = any(each and each.remembered is not None for _, found in rows for each in found)
    heads = ["", *tasks, *(["mean"] if len(tasks) > 1 else []), *(["text"] if forgetting else []), "trained", "rate"]
    lines = []
    for name, found in rows:
        line = [TITLES[name], *map(score, found)]
        line += [shown(mean(found, lambda each: each.accuracy))] if len(tasks) > 1 else []
        line += [shown(mean(found, lambda each: each.remembered), ".2f")] if forgetting else []
        lines.append([*line, shown(mean(found, lambda each: each.trainable), ",.0f"), rate(found)])
    return table(heads, lines)


def variants(study: str, base: Sequence[Cell]) -> str:
    """SMT's defaults, then a study's changes to them, with the rows and columns that are reached."""
    rows: dict[str, list[Outcome | None]] = {}
    for each in (*base, *STUDIES[study]()):
        rows.setdefault(each.name, []).append(runs().outcome(each))
    rows = {name: found for name, found in rows.items() if any(found)}
    tasks = [each.task for each in base]
    forgetting = any(each and each.remembered is not None for found in rows.values() for each in found)
    heads = ["", *tasks, *(["mean"] if len(tasks) > 1 else []), "rows", "columns", *(["text"] if forgetting else [])]
    lines = []
    for name, found in rows.items():
        line = [TITLES.get(name) or name.removeprefix("smt, "), *map(score, found)]
        line += [shown(mean(found, lambda each: each.accuracy))] if len(tasks) > 1 else []
        line += [shown(mean(found, lambda each, key=key: each.shape(key)), ".0%") for key in ("rows", "cols")]
        line += [shown(mean(found, lambda each: each.remembered), ".2f")] if forgetting else []
        lines.append([*line, shown(mean(found, lambda each: each.trainable), ",.0f"), rate(found)])
    return table([*heads, "trained", "rate"], lines)


def spread() -> str:
    """Mean accuracy over the skills, by score and spread."""
    spreads = ("free", "capped", "assignment")
    lines = []
    for kind in (
        "grad_abs",
        "mean_abs",
        "grad_sum_abs",
        "taylor",
        "magnitude",
        "low_rank_magnitude",
        "random",
    ):
        line = [f"`{kind}`"]
        for lie in spreads:
            found = outcomes("smt", SKILLS, 2, score=kind, spread=lie)
            line.append(shown(mean(found, lambda each: each.accuracy)))
        lines.append(line)
    return table(["score", *(f"`{lie}`" for lie in spreads)], [line for line in lines if set(line[1:]) != {"-"}])


def concentration() -> str:
    """How crowded the blocks lie that ways to choose them by one score give, and what is learned with them."""
    ways = [
        {"budget": scope, "spread": lie}
        for lie in ("assignment", "free")
        for scope in ("per_module", "per_layer", "global")
    ]
    ways += [{"block_size": size} for size in (8, 16, 32)]
    lines = []
    for way in ways:
        found = outcomes("smt", SKILLS, 2, **way)
        shares = [
            shown(mean(found, lambda each, key=key: each.shape(key)), ".0%")
            for key in ("modules", "top_module", "mass", "rows", "cols")
        ]
        lowest = shown(mean(found, lambda each: each.shape("lowest")))
        named = ", ".join(f"`{key}={value}`" for key, value in way.items())
        lines.append([named, *shares, lowest, shown(mean(found, lambda each: each.accuracy))])
    heads = ["", "modules", "fullest module", "score mass", "rows", "columns", "lowest layer", "accuracy"]
    return table(heads, [line for line in lines if line[-1] != "-"])


def budgets() -> str:
    """Mean accuracy over the skills, by method and budget."""
    sizes = {0.32: "0.2 %", 2: "1.26 %", 6: "3.8 %", 16: "10 %"}
    lines = []
    for name in ("smt", "random", "diagonal", "lora"):
        line = [TITLES[name]]
        for size in sizes:
            part = {"modules": "qvo"} if name == "lora" and size < 1 else {}
            line.append(shown(mean(outcomes(name, SKILLS, size, **part), lambda each: each.accuracy)))
        lines.append(line)
    return table(["", *sizes.values()], lines)


def parts() -> str:
    """Mean accuracy over the skills, by the layers that may train."""
    lines = []
    for name in ("smt", "lora"):
        line = [TITLES[name]]
        for part in ("all", "attention", "mlp"):
            changes = {} if part == "all" else {"modules": part}
            line.append(shown(mean(outcomes(name, SKILLS, 2, **changes), lambda each: each.accuracy)))
        lines.append(line)
    return table(["", "all linear layers", "attention only", "MLP only"], lines)


def freezing() -> str:
    """Accuracy by the share of the modules that is frozen at a time."""
    lines = []
    for share in (0, *FROZEN_SHARES):
        name, changes = ("slimfit", frozen(share)) if share else ("smt", {})
        found = [runs().outcome(cell(task, name, rank, **changes)) for task, rank in FREEZING_TASKS.items()]
        lines.append([f"{share:.0%}", *map(score, found)])
    return table(["frozen", *FREEZING_TASKS], lines)


def warmup() -> str:
    lines = []
    for count in (1, 4, 16, 64, 200):
        found = outcomes("smt", SKILLS, 2, **({} if count == 16 else {"warmup_batches": count}))
        lines.append([
            str(count),
            *map(score, found),
            shown(mean(found, lambda each: each.accuracy)),
            shown(mean(found, lambda each: each.warmup_share), ".0%"),
        ])  # fmt: skip
    return table(["batches", *SKILLS, "mean", "share of the time"], lines)


def transfer() -> str:
    """Accuracy on the task of a line with blocks that the task of a column chose."""
    lines = []
    for task in SKILLS:
        line = [task]
        for other in SKILLS:
            changes = {} if other == task else {"warmup_task": other}
            line.append(score(runs().outcome(cell(task, "smt", 2, **changes))))
        lines.append([*line, score(runs().outcome(cell(task, "random", 2)))])
    return table(["trained on", *(f"chosen on {other}" for other in SKILLS), "random blocks"], lines)


def agreement() -> str:
    found = json.loads(AGREEMENT.read_text())
    at = {(row["between"], row["score"], row["spread"], row["batches"]): row["overlap"] for row in found["rows"]}
    lengths = sorted({row["batches"] for row in found["rows"]})
    lines = []
    for kind in dict.fromkeys(row["score"] for row in found["rows"]):
        for lie in ("free", "assignment"):
            for between, title in (("seeds", "two seeds"), ("longest", "and the longest"), ("tasks", "two skills")):
                values = [f"{at[between, kind, lie, count]:.0%}" for count in lengths]
                lines.append([f"`{kind}`, `{lie}`", title, *values])
    return table(["", "between", *(f"{count} batches" for count in lengths)], lines)


ON_SKILLS = [cell(task, "smt", 2) for task in SKILLS]
ON_ENCODER = [cell("docstrings", "smt", 8)]
TABLES: dict[str, Callable[[], str]] = {
    "quality-core-2": partial(core, SKILLS, 2),
    "quality-core-6": partial(core, SKILLS, 6),
    "quality-encoder-2": partial(core, ("docstrings",), 2),
    "quality-encoder-8": partial(core, ("docstrings",), 8),
    "quality-longer": partial(core, LONG, 2, ("smt", "lora")),
    "quality-family": partial(core, SKILLS, 2, (*CORE, *FAMILY)),
    "quality-rivals": partial(core, ("sort",), 2, (*CORE, *(name for name in RIVALS if name not in CORE))),
    "quality-neighbours": partial(core, SKILLS, 2, ("full", "smt", "lora", *NEIGHBOURS)),
    "quality-freezing": freezing,
    "quality-budgets": budgets,
    "quality-spread": spread,
    "quality-blocks": partial(variants, "blocks", ON_SKILLS),
    "quality-encoder-blocks": partial(variants, "encoder-blocks", ON_ENCODER),
    "quality-encoder-choice": partial(variants, "encoder-choice", ON_ENCODER),
    "quality-concentration": concentration,
    "quality-scope": partial(variants, "scope", ON_SKILLS),
    "quality-modules": parts,
    "quality-warmup": warmup,
    "quality-transfer": transfer,
    "quality-agreement": agreement,
}
