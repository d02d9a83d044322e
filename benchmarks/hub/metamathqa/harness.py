"""PEFT's MetaMathQA harness, imported from a checkout of PEFT and checked for what a run of SMT takes from it.

The contract is that of `method_comparison/MetaMathQA` in huggingface/peft at commit 5d602fd of 2026-08-21. Its modules
are scripts beside each other with plain names (`run`, `utils`, `data`), so a process holds one harness.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import peft

FOLDER = Path("method_comparison", "MetaMathQA")
FILES = ("run.py", "utils.py", "data.py", "default_training_params.json")
# Functions by module with the keywords they are called with, or that they must call others with.
FUNCTIONS = {
    "run": {"main": ("path_experiment", "experiment_name", "clean", "bucket_name")},
    "utils": {
        "validate_experiment_path": ("path",),
        "get_train_config": ("path",),
        "get_tokenizer": ("model_id", "max_seq_length"),
        "get_model": ("model_id", "dtype", "peft_config", "autocast_adapter_dtype"),
        "get_peft_model": ("model", "peft_config"),
        "BucketIterator": ("ds", "batch_size", "bucket_factor", "delete_cols"),
        "log_to_file": ("log_data", "save_dir", "experiment_name"),
    },
    "data": {"get_train_valid_test_datasets": ("tokenizer", "query_template", "print_fn")},
}
VALUES = {"run": ("BUCKET_FACTOR",), "utils": ("RESULT_PATH", "RESULT_PATH_TEST", "RESULT_PATH_CANCELLED")}


class HarnessError(RuntimeError):
    """The checkout, or this machine, cannot run the comparison; the message says what is missing."""


@dataclass(frozen=True)
class Harness:
    """The three modules of the harness."""

    run: ModuleType
    utils: ModuleType
    data: ModuleType


def load_harness(checkout: Path) -> Harness:
    """Import the harness.

    Args:
        checkout: the root of a clone of huggingface/peft, of which the `peft` in use must be an editable installation.

    Raises:
        HarnessError: a file or a function is missing, `peft` is another one, or an import fails, as on a machine
            without an accelerator.
    """
    folder = checkout.resolve() / FOLDER
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise HarnessError(
            f"{folder} lacks {', '.join(missing)}; --peft must name a clone of https://github.com/huggingface/peft"
        )
    _check_peft(checkout.resolve())
    sys.path.insert(0, str(folder))
    harness = Harness(*(_import(name, folder) for name in ("run", "utils", "data")))
    for name in ("run", "utils", "data"):
        _check_module(getattr(harness, name))
    return harness


def _check_peft(checkout: Path) -> None:
    """The harness records branch and commit of the PEFT in use by asking git where it is installed."""
    package = Path(peft.__file__).resolve().parent
    if not package.is_relative_to(checkout):
        raise HarnessError(
            f"peft is imported from {package}, not from the checkout, so the results could not say which PEFT they are "
            f"of; run: python -m pip install -e {checkout}"
        )


def _import(name: str, folder: Path) -> ModuleType:
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise HarnessError(
            f"{folder / name}.py cannot be imported ({error}); run: python -m pip install -r "
            f"{folder / 'requirements.txt'}"
        ) from error
    except RuntimeError as error:
        raise HarnessError(f"{folder / name}.py cannot be imported: {error}") from error
    if Path(module.__file__).resolve().parent != folder:
        raise HarnessError(f"the module {name} comes from {module.__file__}; nothing of that name may be on PYTHONPATH")
    return module


def _check_module(module: ModuleType) -> None:
    name = module.__name__
    absent = [value for value in VALUES.get(name, ()) if not hasattr(module, value)]
    for function, keywords in FUNCTIONS[name].items():
        known = inspect.signature(getattr(module, function)).parameters if hasattr(module, function) else None
        absent += [function] if known is None else [f"{function}({key}=)" for key in keywords if key not in known]
    if absent:
        raise HarnessError(
            f"{module.__file__} has no {', '.join(absent)}: the harness has changed since PEFT 5d602fd; take that "
            "commit, or adapt benchmarks/hub/metamathqa"
        )
