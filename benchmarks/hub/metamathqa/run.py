"""Run experiments of SMT in PEFT's MetaMathQA comparison, with blocks chosen on the harness' own training data.

PEFT's harness puts an adapter on the model and trains. Blocks that are chosen by gradients need a warm-up pass in
between, so this driver has the harness do all it does, and only where it wraps the model chooses the blocks first, on
the batches that the training will start with. The time and the memory of that pass are within the harness' own
`total_time` and `accelerator_memory_max`, and stand apart under `smt_info` of the result.

    python -m benchmarks.hub.metamathqa.run --peft ../peft                                  # all that are not done yet
    python -m benchmarks.hub.metamathqa.run --peft ../peft llama-3.2-3B-default-lr_0.0003   # one

Each experiment is a process of its own, as the harness wants an empty GPU. Results are the harness' JSONs, in
`benchmarks/results/metamathqa`; `python -m benchmarks.hub.metamathqa.compare` puts them beside the published ones.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smt_peft import SMTConfig, select_blocks
from smt_peft.bench.environment import record

from ...commit import commit
from .grid import METHOD, write
from .harness import Harness, HarnessError, load_harness

ROOT = Path(__file__).resolve().parents[3]
EXPERIMENTS = ROOT / "out" / "metamathqa"
RESULTS = ROOT / "benchmarks" / "results" / "metamathqa"
WARMUP_BATCHES = 64
# With an older one the harness trains, but fails to save, and goes on with a made-up file size.
OLDEST_PYTHON = (3, 12)


def run_experiment(harness: Harness, name: str, out: Path, warmup_batches: int, verbose: bool = False) -> Path:
    """Select, train and evaluate one experiment of the current directory's `experiments/smt`.

    Args:
        harness: from `load_harness`; its modules are changed, so a process runs one experiment.
        name: of the folder.
        out: where the JSON goes; that of a cancelled run goes into `cancelled` below it.
        warmup_batches: how many batches the selection looks at.
        verbose: whether the harness tells on stderr what it does.

    Returns:
        The file of the result.

    Raises:
        HarnessError: the experiment is not there, or its training was cancelled.
    """
    utils = harness.utils
    try:
        path = str(Path("experiments", METHOD, name))
        experiment_name = utils.validate_experiment_path(path)
        train_config = utils.get_train_config(str(Path(path, "training_params.json")))
    except (FileNotFoundError, TypeError, ValueError) as error:
        raise HarnessError(f"{name}: {error}") from error
    out.joinpath("cancelled").mkdir(parents=True, exist_ok=True)
    utils.RESULT_PATH = utils.RESULT_PATH_TEST = str(out)
    utils.RESULT_PATH_CANCELLED = str(out / "cancelled")
    info: dict[str, Any] = {}
    utils.get_peft_model = _selecting(
        utils.get_peft_model, lambda: training_batches(harness, train_config), warmup_batches, info
    )
    utils.log_to_file = _logging(utils.log_to_file, info)
    harness.run.print_verbose = _to_stderr if verbose else _silent
    harness.run.main(path_experiment=path, experiment_name=experiment_name, clean=True, bucket_name=None)
    if info["status"] != "success":
        raise HarnessError(f"{name}: the training was {info['status']}: {info['error'] or 'no reason given'}")
    return out / f"{METHOD}--{name}.json"


def training_batches(harness: Harness, train_config: Any) -> Iterator[dict[str, Tensor]]:
    """The batches of the training, in its order, with the labels that it gives them.

    As in the harness' own loop the padding is no label but for its first token, which stands for the end of the text.
    """
    tokenizer = harness.utils.get_tokenizer(model_id=train_config.model_id, max_seq_length=train_config.max_seq_length)
    train_set, _, _ = harness.data.get_train_valid_test_datasets(
        tokenizer=tokenizer, query_template=train_config.query_template, print_fn=_silent
    )
    batches = harness.utils.BucketIterator(
        train_set,
        batch_size=train_config.batch_size,
        bucket_factor=harness.run.BUCKET_FACTOR,
        delete_cols=["response"],
    )
    for rows in batches:
        batch = tokenizer.pad(rows, return_tensors="pt")
        labels = batch["input_ids"].clone()
        for row, ids in enumerate(rows["input_ids"]):
            labels[row, len(ids) + 1 :] = -100
        yield {**batch, "labels": labels}


def _selecting(
    get_peft_model: Callable, batches: Callable[[], Iterator], warmup_batches: int, info: dict[str, Any]
) -> Callable:
    """`get_peft_model` that first chooses the blocks, and writes into `info` what that took."""

    def select_and_wrap(model: nn.Module, peft_config: SMTConfig, **settings: Any) -> nn.Module:
        start = time.perf_counter()
        data = batches() if peft_config.needs_data else None
        selection = select_blocks(model, peft_config, data, warmup_batches, keep_scores=False)
        info["selection_seconds"] = time.perf_counter() - start
        info["selection"] = selection.provenance | {"summary": selection.summary()}
        # A few weights of the base, which the adapter's own config has too.
        info["selection"].pop("base_fingerprint")
        if torch.cuda.is_available():
            info["selection_memory_max"] = torch.cuda.max_memory_reserved()
            # What the pass has left behind is not the training's, whose reserved memory is measured next.
            torch.cuda.empty_cache()
        peft_config.selection = selection
        return get_peft_model(model, peft_config, **settings)

    return select_and_wrap


def _logging(log_to_file: Callable, info: dict[str, Any]) -> Callable:
    """`log_to_file` that adds `smt_info` to the log, and tells `info` how the run ended."""

    def log_with_info(*, log_data: dict[str, Any], **settings: Any) -> None:
        circumstances = record("cuda" if torch.cuda.is_available() else "cpu")
        log_to_file(log_data=log_data | {"smt_info": {**info, **circumstances, "commit": commit()}}, **settings)
        info["status"] = log_data["train_info"]["status"]
        info["error"] = log_data["run_info"]["error_msg"]

    return log_with_info


def _silent(*words: Any, **settings: Any) -> None:
    pass


def _to_stderr(*words: Any, **settings: Any) -> None:
    print(*words, **settings | {"file": sys.stderr})


def _run_each(names: Sequence[str], arguments: argparse.Namespace) -> int:
    """A process for each; what follows one that fails is run all the same. Returns how many failed."""
    failed = []
    for number, name in enumerate(names, start=1):
        if (arguments.out / f"{METHOD}--{name}.json").is_file():
            print(f"{number} of {len(names)}: {name} is done", flush=True)
            continue
        print(f"{number} of {len(names)}: {name}", flush=True)
        command = [sys.executable, "-m", "benchmarks.hub.metamathqa.run", "--only", name]
        for option in ("peft", "out", "folder", "warmup_batches"):
            command += [f"--{option.replace('_', '-')}", str(getattr(arguments, option))]
        command += ["--verbose"] if arguments.verbose else []
        if subprocess.run(command, cwd=ROOT).returncode != 0:
            failed.append(name)
    if failed:
        print(f"{len(failed)} of {len(names)} failed: {', '.join(failed)}", file=sys.stderr)
    return len(failed)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="folders of experiments/smt; all, if none is named")
    parser.add_argument("--peft", type=Path, required=True, help="a clone of huggingface/peft, installed with -e")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where results go")
    parser.add_argument("--folder", type=Path, default=EXPERIMENTS, help="the directory that holds experiments/smt")
    parser.add_argument("--warmup-batches", type=int, default=WARMUP_BATCHES, help="batches the selection looks at")
    parser.add_argument("-v", "--verbose", action="store_true", help="the harness tells what it does")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # the experiment that this process is for
    arguments = parser.parse_args(argv)
    for option in ("peft", "out", "folder"):
        setattr(arguments, option, getattr(arguments, option).resolve())
    try:
        if arguments.only is None:
            if arguments.folder == EXPERIMENTS:
                write(EXPERIMENTS)
            known = sorted(folder.name for folder in (arguments.folder / "experiments" / METHOD).glob("*/"))
            if sys.version_info < OLDEST_PYTHON:
                raise HarnessError(
                    f"PEFT's harness needs Python {'.'.join(map(str, OLDEST_PYTHON))} or later, this is "
                    f"{'.'.join(map(str, sys.version_info[:2]))}"
                )
            if unknown := [name for name in arguments.names if name not in known]:
                raise HarnessError(f"there is no experiment {unknown[0]}; known are {', '.join(known)}")
            sys.exit(_run_each(arguments.names or known, arguments) > 0)
        harness = load_harness(arguments.peft)
        # The harness takes experiments/<method>/<name> below the current directory.
        os.chdir(arguments.folder)
        file = run_experiment(harness, arguments.only, arguments.out, arguments.warmup_batches, arguments.verbose)
        print(f"wrote {file}")
    except HarnessError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
