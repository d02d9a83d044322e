"""The settings of a run as a YAML that says where each value comes from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

import yaml

from .keys import BLOCKS, known_keys
from .schema import Run

# Of the trainer's keys, those whose defaults decide what a run learns and what it costs.
_TELLING = (
    "max_length",
    "packing",
    "beta",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "max_steps",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "optim",
    "weight_decay",
    "max_grad_norm",
    "bf16",
    "gradient_checkpointing",
    "seed",
)


def render_settings(run: Run) -> str:
    """A YAML of what was given and of the defaults that matter, `smt train` reads it; comments tell the origins."""
    block = _block(run)
    flat = {key: value for key, value in run.resolved.items() if key not in BLOCKS}
    known = known_keys(run.config.task)
    defaults = {key: _plain(getattr(run.trainer, key)) for key in _TELLING if key in known and key not in flat}
    lines = [*_lines(flat | defaults, run), ("smt:", ""), *_lines(block, run, "smt.")]
    for schedule in run.schedules:
        lines += [(f"{schedule.name}:", ""), *_lines(run.resolved[schedule.name], run, f"{schedule.name}.")]
    width = min(60, max(len(text) for text, _ in lines))
    rest = sum("." not in key for key in known) - len(flat | defaults)
    return "\n".join(f"{text:<{width}}  # {note}" if note else text for text, note in lines) + (
        f"\n# {rest} further keys of the trainer are at their defaults; `smt schema` lists them"
    )


def _block(run: Run) -> dict[str, Any]:
    given = run.resolved["smt"]
    known = known_keys()
    names = [field.name for field in fields(run.smt) if f"smt.{field.name}" in known and field.name != "selection"]
    # Of the two sizes of a budget, the one that holds.
    left_out = "density" if given.get("num_blocks") is not None else "num_blocks"
    defaults = {name: getattr(run.smt, name) for name in names if name not in given and name != left_out}
    return given | {name: sorted(value) if isinstance(value, set) else value for name, value in defaults.items()}


def _lines(values: Mapping[str, Any], run: Run, prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        text = yaml.safe_dump([value], default_flow_style=True, allow_unicode=True, width=10**6).strip()[1:-1]
        yield f"{'  ' if prefix else ''}{key}: {text}", run.source.origin(prefix + key)


def _plain(value: Any) -> Any:
    """Enumerations by their value."""
    return getattr(value, "value", value)
