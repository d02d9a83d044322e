"""`report.html`: a run on one page, made of the files in its directory alone, and needing nothing else to be read."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from ..blocks import BlockSelection
from .chart import HEIGHT, WIDTH, Chart, line_chart, mass_chart, panels
from .files import FINISHED, SELECTED, STOPPED, TRAINED, RunFiles, read_run
from .mass import mass
from .places import Place, places
from .series import curves
from .words import duration, percent, size

HTML = "report.html"
_STAGES = {
    FINISHED: "finished",
    TRAINED: "trained and saved, not yet verified and compared",
    STOPPED: "stopped half way",
    SELECTED: "blocks chosen, nothing trained yet",
}
# By the names in `metrics.json`; a check of another name is shown under that name.
_CHECKS = {
    "reload": ("Read back in a fresh process", "largest difference of a logit: {reload_difference:g}, in {rows} rows"),
    "blocks": ("The adapter's blocks are those of the selection", "{blocks:,} blocks"),
    "weights": (
        "Merged weights are base + delta, rounded once, in those blocks, and the base elsewhere, bit for bit",
        "{untouched_weights:,} weights untouched",
    ),
    "merged": (
        "Merged, the model says the same",
        "largest difference of a logit: {merged_difference:.2g}; rounding in {dtype} allows {merged_tolerance:.2g}",
    ),
}
_MODEL_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoModel",
}


_MEASURES: dict[str, tuple[str, Callable[[Any], str]]] = {
    "exact_match": ("exact match", "{:.1%}".format),
    "eval_loss": ("evaluation loss", "{:.4f}".format),
    "trainable_parameters": ("trained weights", "{:,}".format),
    "learning_rate": ("learning rate", lambda rate: f"{float(rate):g}"),
    "seconds": ("training", duration),
}


@dataclass(frozen=True)
class Tile:
    """A figure at the head of the page."""

    name: str
    value: str
    note: str = ""


def write_report(directory: str | Path) -> Path:
    """Write `report.html` into the directory of a run, from its files; returns its path.

    Raises:
        FileNotFoundError, ValueError: as `read_run`.
    """
    text = render(read_run(directory))
    file = Path(directory) / HTML
    # Written aside and renamed, so that one who looks finds the old page or the new one.
    aside = file.with_name(file.name + ".part")
    aside.write_text(text, encoding="utf-8")
    aside.replace(file)
    return file


def render(run: RunFiles) -> str:
    """The page of a run."""
    environment = Environment(
        loader=PackageLoader("smt_peft.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "size": size, "duration": duration}
    return environment.get_template("report.html.j2").render(_context(run))


def _context(run: RunFiles) -> dict[str, Any]:
    metrics, selection = run.metrics, run.selection
    model = run.settings.get("model_name_or_path") or selection.provenance.get("model_name_or_path") or "a model"
    found = mass(selection)
    verified = metrics.get("verified")
    return {
        "chart_size": (WIDTH, HEIGHT),
        "model": str(model),
        "directory": run.directory,
        "stage": _STAGES[run.stage],
        "trained": run.stage in (FINISHED, TRAINED),
        "passed": None if verified is None else all(verified["passed"].values()),
        "finished": metrics.get("finished", ""),
        "tiles": _tiles(run),
        "results": _results(metrics, run.settings),
        "charts": _charts(metrics),
        "summary": selection.summary(),
        "shares": _shares(selection),
        "mass": found,
        "mass_chart": None if found is None else mass_chart(found),
        "panels": panels(selection),
        "why_no_mass": "" if found else _why_no_mass(selection),
        "effective": _effective(metrics.get("effective_update"), selection),
        "plan": metrics.get("plan"),
        "memory": _memory(metrics),
        "measured_memory": metrics.get("memory") or {},
        "checks": [] if verified is None else _checks(verified),
        "seconds": metrics.get("seconds", {}),
        "circumstances": _circumstances(metrics),
        "provenance": _provenance(selection),
        "settings": _settings(run.settings),
        "made_by": metrics.get("command", ""),
        "commands": _commands(run, str(model)),
        "python": _python(run, str(model)) if run.adapter else "",
    }


def _tiles(run: RunFiles) -> list[Tile]:
    metrics, selection = run.metrics, run.selection
    before, after = metrics.get("before", {}), metrics.get("after", {})
    tiles = []
    if "exact_match" in after:
        was = f"before: {before['exact_match']:.1%}" if "exact_match" in before else ""
        tiles.append(Tile("Exact match", f"{after['exact_match']:.1%}", was))
    if "eval_loss" in after:
        was = f"before: {before['eval_loss']:.4f}" if "eval_loss" in before else ""
        tiles.append(Tile("Evaluation loss", f"{after['eval_loss']:.4f}", was))
    weights = metrics.get("trainable_parameters", selection.effective_numel)
    tiles.append(
        Tile(
            "Trained weights" if metrics.get("after") else "Chosen weights",
            f"{weights:,}",
            f"{percent(selection.density)} of those targeted",
        )
    )
    reached = f"in {len(selection.blocks)} of {len(selection.grids)} matrices"
    tiles.append(Tile("Blocks", f"{selection.num_blocks:,}", reached))
    update = metrics.get("effective_update") or {}
    if "share" in update:
        tiles.append(Tile("Effective update", percent(update["share"]), f"of the entries, in {update['dtype']}"))
    if metrics.get("tokens_per_second"):
        tiles.append(Tile("Tokens per second", f"{metrics['tokens_per_second']:,.0f}", "in training"))
    if "peak" in metrics.get("memory", {}):
        tiles.append(Tile("Peak memory", size(metrics["memory"]["peak"]), "of the training, on the GPU"))
    return tiles


def _results(metrics: Mapping[str, Any], settings: Mapping[str, Any]) -> list[list[str]]:
    """A table, its head first: a column for each model, a row for each measure that one of them has."""
    if "after" not in metrics:
        return []
    own = {"trainable_parameters": metrics.get("trainable_parameters"), "learning_rate": settings.get("learning_rate")}
    models = {"before": metrics.get("before", {}), "SMT": {**own, **metrics["after"]}}
    if "lora" in metrics:
        models[f"LoRA, rank {metrics['lora']['rank']}"] = metrics["lora"]
    rows = [["", *models]]
    for key, (name, shown) in _MEASURES.items():
        values = [model.get(key) for model in models.values()]
        if any(value is not None for value in values):
            rows.append([name, *("–" if value is None else shown(value) for value in values)])
    return rows


def _charts(metrics: Mapping[str, Any]) -> list[Chart]:
    rival = metrics.get("lora", {}).get("log_history", ())
    return [line_chart(curve) for curve in curves(metrics.get("log_history", ()), rival)]


@dataclass(frozen=True)
class Shares:
    """Shares of the weights that are chosen, by layer and kind of module.

    Args:
        kinds: of modules, the columns.
        rows: `(layer, cells, of the layer)`; a cell is `(share, how strong its colour is, 0 to 1)` or None.
        totals: by kind.
        total: of everything.
    """

    kinds: list[str]
    rows: list[tuple[str, list[tuple[float, float] | None], float]]
    totals: list[float]
    total: float


def _shares(selection: BlockSelection) -> Shares:
    found = places(selection)
    kinds = list(dict.fromkeys(place.kind for place in found))
    layers = sorted({-1 if place.layer is None else place.layer for place in found})
    top = max(place.share for place in found)

    def of(group: list[Place]) -> float:
        weights = {place.name: selection.grids[place.name].numel for place in group}
        return sum(place.share * weights[place.name] for place in group) / sum(weights.values())

    rows = []
    for layer in layers:
        group = [place for place in found if (-1 if place.layer is None else place.layer) == layer]
        shares = {kind: of(same) for kind in kinds if (same := [place for place in group if place.kind == kind])}
        cells = [(shares[kind], shares[kind] / top) if kind in shares else None for kind in kinds]
        rows.append(("–" if layer < 0 else str(layer), cells, of(group)))
    totals = [of([place for place in found if place.kind == kind]) for kind in kinds]
    return Shares(kinds, rows, totals, selection.density)


def _why_no_mass(selection: BlockSelection) -> str:
    score = selection.provenance.get("score")
    if not selection.scores:
        return "No scores were kept with the selection, so what share of them the blocks hold is not known."
    return f"Blocks were chosen by {score!r}, of which shares say nothing."


@dataclass(frozen=True)
class Update:
    """The effective update: `share` of all `entries` in `dtype`, and `(kind, entries, moved, changed)` as shares."""

    share: float
    moved: float
    entries: int
    changed: int
    dtype: str
    kinds: list[tuple[str, int, float, float]]


def _effective(found: Mapping[str, Any] | None, selection: BlockSelection) -> Update | str | None:
    """A text where it could not be counted; None where it was not."""
    if not found:
        return None
    if "error" in found:
        return str(found["error"])
    kind_of = {place.name: place.kind for place in places(selection)}
    sums: dict[str, list[int]] = {}
    for name, counts in found["modules"].items():
        total = sums.setdefault(kind_of.get(name, name), [0, 0, 0])
        for position, count in enumerate(counts):
            total[position] += count
    entries = max(1, found["entries"])
    return Update(
        found["share"],
        found["moved"] / entries,
        found["entries"],
        found["changed"],
        found["dtype"],
        [(kind, all_, moved / max(1, all_), changed / max(1, all_)) for kind, (all_, moved, changed) in sums.items()],
    )


def _memory(metrics: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """`(what, planned, measured, measured against planned)`; a dash where one of them is not known."""
    planned, measured = metrics.get("plan") or {}, metrics.get("memory") or {}
    if "error" in planned:
        planned = {}
    names = {
        "weights": "frozen weights",
        "trained": "blocks",
        "moments": "optimizer state",
        "peak": "peak of the training",
    }
    rows = []
    for key, name in names.items():
        if key not in planned and key not in measured:
            continue
        both = planned.get(key) and key in measured
        rows.append(
            (
                name,
                size(planned[key]) if key in planned else "–",
                size(measured[key]) if key in measured else "–",
                f"{measured[key] / planned[key] - 1:+.1%}" if both else "–",
            )
        )
    return rows


def _checks(verified: Mapping[str, Any]) -> list[tuple[bool, str, str]]:
    """`(passed, what, in figures)`."""
    found = []
    for name, passed in verified["passed"].items():
        what, figures = _CHECKS.get(name, (name, ""))
        try:
            figures = figures.format(**verified)
        except (KeyError, ValueError):
            figures = ""
        found.append((passed, what, figures))
    return found


def _circumstances(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = [("device", metrics.get("device")), ("finished", metrics.get("finished"))]
    if metrics.get("processes", 1) > 1:
        rows.append(("processes", f"{metrics['processes']}, {metrics.get('engine')}"))
    rows.append(("threads", metrics.get("threads")))
    rows.append(("python", metrics.get("python")))
    rows += list(metrics.get("versions", {}).items())
    rows += [(f"backend of {name}", ", ".join(served)) for name, served in metrics.get("backends", {}).items()]
    return [(name, str(value)) for name, value in rows if value is not None]


def _provenance(selection: BlockSelection) -> list[tuple[str, str]]:
    # The fingerprint of the base is there for comparing, not for reading.
    hidden = {"base_fingerprint", "model_name_or_path"}
    return [
        (name, value[:16] if name.endswith("fingerprint") else value if isinstance(value, str) else json.dumps(value))
        for name, value in selection.provenance.items()
        if value is not None and name not in hidden
    ]


def _settings(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    flat = {}
    for key, value in settings.items():
        inside = {f"{key}.{name}": each for name, each in value.items()} if isinstance(value, Mapping) else None
        flat |= {key: value} if inside is None else inside
    return [
        (key, "***" if key.endswith("token") else value if isinstance(value, str) else json.dumps(value))
        for key, value in flat.items()
        if value is not None
    ]


def _commands(run: RunFiles, model: str) -> list[tuple[str, str]]:
    """`(what for, command)`."""
    directory, selection = shlex.quote(run.directory), shlex.quote(f"{run.directory}/selection.safetensors")
    settings = shlex.quote(f"{run.directory}/run.yaml")
    merged, patch = (shlex.quote(run.directory.rstrip("/") + end) for end in ("-merged", ".patch.safetensors"))
    commands = []
    if run.stage in (STOPPED, TRAINED) and run.settings:
        commands.append(("Bring the run to its end", f"smt train {settings} resume_from_checkpoint=true"))
    if run.adapter:
        commands += [
            ("Write a plain checkpoint, which every engine loads", f"smt merge {directory} {merged}"),
            ("check it, and the adapter", f"smt verify {directory} --merged {merged}"),
            ("and serve it", f"vllm serve {merged}"),
            ("Or hand on the changed values alone", f"smt export {directory} {patch} --format patch"),
        ]
    if run.settings:
        again = shlex.quote(f"output_dir={run.directory.rstrip('/')}-2")
        commands.append(
            ("Train the same blocks otherwise", f"smt train {settings} smt.selection={selection} {again} seed=1")
        )
    else:
        commands.append(("Train these blocks", f"smt train RUN.yaml smt.selection={selection}"))
    commands.append(("Make this page again", f"smt report {directory}"))
    return commands


def _python(run: RunFiles, model: str) -> str:
    name = _MODEL_CLASSES.get(str(run.adapter.get("task_type")), "AutoModelForCausalLM")
    return (
        "import smt_peft  # registers SMT with PEFT\n"
        "from peft import PeftModel\n"
        f"from transformers import {name}\n\n"
        f"base = {name}.from_pretrained({model!r})\n"
        f"model = PeftModel.from_pretrained(base, {run.directory!r})\n"
    )
