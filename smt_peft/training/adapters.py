"""A run that trains an adapter of any PEFT method in the place of blocks."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import PeftConfig
from transformers import TrainerCallback

from . import outputs
from .errors import ConfigError
from .run import fit, make_trainer, prepare
from .yaml.schema import Run


def check_mergeable(config: Any) -> None:
    """Whether an adapter of this config can become part of a checkpoint.

    Raises:
        ConfigError: it is no config of PEFT's, or of a method that changes no weight.
    """
    if not isinstance(config, PeftConfig):
        raise ConfigError(f"peft_config must be a config of PEFT, got {type(config).__name__}")
    if config.is_prompt_learning:
        raise ConfigError(
            f"peft_config: {type(config).__name__} adds a prompt and changes no weight, so it cannot be merged into a "
            "checkpoint; take a method that changes weights, as SMTConfig or LoraConfig"
        )


def train_adapter(run: Run, config: PeftConfig, callbacks: Sequence[TrainerCallback] = ()) -> None:
    """Train what `config` names on the rows of a run, and save adapter and tokenizer in its `output_dir`.

    `config` stays as it is. Of the run, the `smt:` block, `verify` and `compare_lora` are not read.

    Raises:
        ConfigError: the output directory, the model, the data or the adapter's config cannot be used.
    """
    outputs.check_output_dir(run)
    directory = Path(run.trainer.output_dir)
    if (directory / outputs.RUN).exists():
        raise ConfigError(f"output_dir: {directory} holds a run; choose another output_dir")
    prepared = prepare(run)
    config = copy.deepcopy(config)
    config.base_model_name_or_path = run.config.model_name_or_path
    try:
        trainer = make_trainer(run, prepared, config, callbacks)
    except ConfigError as error:
        raise ConfigError(f"peft_config: {str(error).removeprefix('smt: ')}") from error
    main = trainer.is_world_process_zero()
    if main:
        outputs.write_run(run)
    fit(run, trainer)
    outputs.save_adapter(trainer.model, prepared.tokenizer, trainer.state, directory, main)
