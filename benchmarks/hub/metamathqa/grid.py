"""The experiments of SMT in the MetaMathQA comparison: which there are, and their folders.

A folder is what PEFT's harness reads: `experiments/<method>/<name>/` with `adapter_config.json`, and in
`training_params.json` what differs from the harness's own settings, here the learning rate. Every setting that decides
about blocks is spelt out in it, so that a result tells what `default` was when it was made.

    python -m benchmarks.hub.metamathqa.grid out/metamathqa      # writes them; `run` does so by itself
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smt_peft import SMTConfig

METHOD = "smt"
# Weights that LoRA r32 and SHiRA train on q_proj and v_proj of Llama-3.2-3B:
# 32 x 28 x ((3072 + 3072) + (3072 + 1024)).
TRAINABLE = 9_175_040
BLOCK = 256
QV = ["q_proj", "v_proj"]
# Weights of q_proj and v_proj, and of all linear layers but the head.
QV_WEIGHTS = 28 * 3072 * (3072 + 1024)
LINEAR_WEIGHTS = 28 * 3072 * (2 * (3072 + 1024) + 3 * 8192)
# The harness's own, which LoRA r32 has; that of SHiRA; and one above, as blocks want more than LoRA does.
LEARNING_RATES = (1e-4, 3e-4, 1e-3)
# The fields of SMTConfig that an experiment spells out.
DECISIVE = ("target_modules", "block_size", "density", "num_blocks", "score", "budget", "spread", "seed")


@dataclass(frozen=True)
class Experiment:
    """A folder: its name, `adapter_config.json` and `training_params.json`."""

    name: str
    adapter: dict[str, Any]
    training: dict[str, Any]

    def files(self) -> dict[str, str]:
        """Text of each file by its name."""
        return {
            "adapter_config.json": json.dumps(self.adapter, indent=2, sort_keys=True) + "\n",
            "training_params.json": json.dumps(self.training, indent=2) + "\n",
        }

    def write(self, directory: Path) -> None:
        """Write the folder, below the directory that holds `experiments`."""
        folder = directory / "experiments" / METHOD / self.name
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in self.files().items():
            (folder / name).write_text(text, "utf-8")


def variants() -> dict[str, SMTConfig]:
    """What is compared, at 9,175,040 trained weights throughout, by the part of the name that tells it."""
    paper = {"target_modules": QV, "block_size": BLOCK, "num_blocks": TRAINABLE // BLOCK**2}
    everywhere = {"density": TRAINABLE / LINEAR_WEIGHTS}
    return {
        # The released code of SMT (arXiv 2405.15525): the best blocks of all layers, by |mean of signed gradients|.
        "140x256": SMTConfig(**paper, score="mean_abs", budget="global", spread="free"),
        # Controls of the same shape: is it the choice that helps?
        "140x256-random": SMTConfig(**paper, score="random", budget="global", spread="free"),
        "140x256-diagonal": SMTConfig(**paper, score="diagonal", budget="global", spread="free"),
        "default": SMTConfig(**everywhere),
        "default-random": SMTConfig(**everywhere, score="random"),
        "default-diagonal": SMTConfig(**everywhere, score="diagonal"),
        # The default on the two projections that LoRA r32 and SHiRA train there.
        "default-qv": SMTConfig(target_modules=QV, density=TRAINABLE / QV_WEIGHTS),
    }


def grid() -> list[Experiment]:
    """Every variant at every learning rate."""
    return [
        Experiment(
            f"llama-3.2-3B-{variant}-lr_{rate:g}",
            _adapter(config),
            # PEFT's harness replaces `optimizer_kwargs` as a whole; 0.1 is its own weight decay.
            {"optimizer_kwargs": {"lr": rate, "weight_decay": 0.1}},
        )
        for variant, config in variants().items()
        for rate in LEARNING_RATES
    ]


def write(directory: Path) -> None:
    """Write every folder, below `directory/experiments`."""
    for experiment in grid():
        experiment.write(directory)


def _adapter(config: SMTConfig) -> dict[str, Any]:
    """The entries of `adapter_config.json`; a set becomes a sorted list."""
    fields = {name: getattr(config, name) for name in DECISIVE}
    fields = {name: sorted(value) if isinstance(value, set) else value for name, value in fields.items()}
    return {"peft_type": "SMT", "task_type": "CAUSAL_LM", "base_model_name_or_path": None, **fields}


if __name__ == "__main__":
    write(Path(sys.argv[1]))
