"""What DSPy hands to a provider, rows and `train_kwargs`, as a run of this package."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from dspy.clients.utils_finetune import TrainDataFormat, get_finetune_directory
from transformers import TrainerCallback

from ...config import SMTConfig
from ...training.errors import ConfigError

# What TRL would choose otherwise: rows cut at 1,024 tokens, of which DSPy's prompts alone can be longer, 3 epochs.
DEFAULTS = {"max_length": None, "num_train_epochs": 5, "save_strategy": "no"}
# A usual rate of LoRA, and 8 times that for blocks (docs/choosing.md); TRL's 2e-5 is one for full fine-tuning.
LEARNING_RATE, SMT_LEARNING_RATE = 1e-4, 1e-3
# The job says these.
_OF_THE_JOB = {
    "model_name_or_path": "the language model names it",
    "dataset_path": "the traces are the data",
    "dataset_name": "the traces are the data",
    "dataset_mixture": "the traces are the data",
}


def rows_of(train_data: list[dict[str, Any]], form: TrainDataFormat | str | None) -> list[dict[str, Any]]:
    """The rows as a run reads them: prompts and completions, so that only what the model is to say is learned."""
    if form not in (TrainDataFormat.CHAT, TrainDataFormat.COMPLETION):
        raise ConfigError(f"train_data_format: {form!r} cannot be trained on; CHAT and COMPLETION can")
    if not train_data:
        raise ConfigError(
            "train_data: there is not one row: no trace passed the metric, or none has a call of this predictor; look "
            "at what the teacher says, take an easier metric or more examples"
        )
    if form == TrainDataFormat.COMPLETION:
        return train_data
    for number, row in enumerate(train_data):
        turns = row.get("messages")
        if not isinstance(turns, list) or len(turns) < 2 or turns[-1].get("role") != "assistant":
            raise ConfigError(
                f"train_data: row {number} is no conversation that ends with the assistant: "
                f'{{"messages": [..., {{"role": "assistant", "content": ...}}]}}'
            )
    return [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in train_data]


def _check_keys(settings: dict[str, Any], config: Any) -> None:
    # It loads TRL, with the first fine-tuning.
    from ...training.adapters import check_mergeable

    for key in settings.keys() & _OF_THE_JOB.keys():
        raise ConfigError(f"train_kwargs: {key} has no place here: {_OF_THE_JOB[key]}")
    if config is None:
        return
    check_mergeable(config)
    ours = {"smt"} if isinstance(config, SMTConfig) else {"smt", "verify", "compare_lora"}
    for key in ours & {key for key, value in settings.items() if value}:
        raise ConfigError(f"train_kwargs: {key} beside peft_config={type(config).__name__}: leave one of them out")


def _new_directory(parent: str | Path | None, base: str) -> Path:
    """A directory that no other job has; jobs of several predictors start at once."""
    parent = Path(parent or get_finetune_directory()).absolute()
    parent.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^\w.-]+", "-", Path(base).name)
    return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=parent))


def prepare_run(
    base: str, rows: list[dict[str, Any]], train_kwargs: dict[str, Any] | None
) -> tuple[Path, Callable[[TrainerCallback], Any]]:
    """A directory with the rows and the YAML that was made of the settings, every key checked, and what trains there.

    The adapter will lie in `run` in that directory.

    Raises:
        ConfigError: lists every key that is wrong.
    """
    settings = dict(train_kwargs or {})
    config = settings.pop("peft_config", None)
    _check_keys(settings, config)
    directory = _new_directory(settings.pop("output_dir", None), base)
    from ...training.adapters import train_adapter
    from ...training.run import train
    from ...training.yaml.schema import load_run

    data, run_yaml = directory / "train.jsonl", directory / "train.yaml"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    is_smt = config is None or isinstance(config, SMTConfig)
    block = {"smt": _as_block(config, directory)} if isinstance(config, SMTConfig) else {}
    whole = {
        "model_name_or_path": base,
        "dataset_path": str(data),
        "output_dir": str(directory / "run"),
        "learning_rate": SMT_LEARNING_RATE if is_smt else LEARNING_RATE,
        **DEFAULTS,
        **settings,
        **block,
    }
    try:
        run_yaml.write_text(yaml.safe_dump(whole, sort_keys=False, allow_unicode=True), encoding="utf-8")
    except yaml.representer.RepresenterError as error:
        raise ConfigError(f"train_kwargs: {error.args[-1]!r} is nothing that a YAML can hold") from error
    run = load_run(run_yaml)
    if is_smt:
        return directory, lambda watch: train(run, [watch])
    return directory, lambda watch: train_adapter(run, config, [watch])


def _as_block(config: SMTConfig, directory: Path) -> dict[str, Any]:
    """The settings of a config as the `smt:` block of a run."""
    from ...training.yaml.keys import known_keys

    if callable(config.score) and config.selection is None:
        raise ConfigError(
            "train_kwargs: peft_config has a score that is a function, which a run cannot record; choose blocks by it "
            "with select_blocks, and give the config the selection"
        )
    given, untouched = vars(config), vars(SMTConfig())
    names = [key.removeprefix("smt.") for key in known_keys() if key.startswith("smt.")]
    block = {name: given[name] for name in names if name in given and given[name] != untouched[name]}
    if "num_blocks" in block:
        block.pop("density", None)
    if callable(config.score):
        del block["score"]
    if config.selection is not None and not isinstance(config.selection, (str, Path)):
        block["selection"] = directory / "selection.safetensors"
        config.selection.save(block["selection"])
    return {name: _plain(value) for name, value in block.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return sorted(value) if isinstance(value, set) else list(value) if isinstance(value, tuple) else value
