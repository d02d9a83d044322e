"""What training costs: step time and peak memory of SMT and its rivals, as ratios to the frozen pass.

    python -m benchmarks.cost                       # every suite for the CPU, about a quarter of an hour on two cores
    python -m benchmarks.cost step --density 0.049
    python -m benchmarks.cost growth --axes tokens density
    python -m benchmarks.cost --quick --out build/cost  # tiny shapes that say nothing of speed
    python -m benchmarks.cost large --device cuda   # Llama-3-8B's shape

A suite writes one JSON file, row by row; started again with the same settings, it goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import gc
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from . import fourbit, growth, large, step, turns, warmup
from .model import Case
from .result import ROOT, Result

SMALL = ("step", "warmup", "fourbit", "growth")
# Of options, run where they are asked for.
OPTIONS = ("turns",)
ROUNDS = {"step": 7}
QUICK = Case(hidden=128, layers=2, tokens=32, density=0.02)


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cost", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "suites", nargs="*", metavar="SUITE", help=f"{', '.join(SMALL)} (default: these), {', '.join(OPTIONS)}, large"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "cost", help="folder of the JSON")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, help="timed rounds; step: 7, others: 5")
    parser.add_argument("--warmup", type=int, default=1, help="rounds before them; 1")
    for field, about in (("hidden", "width"), ("layers", "decoder layers; large: 32"), ("tokens", "in a batch")):
        parser.add_argument(f"--{field}", type=int, help=about)
    parser.add_argument("--density", type=float, help="trained share of the weights")
    parser.add_argument("--axes", nargs="+", choices=growth.AXES, help="growth: these axes only")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="large: the GPU where there is one")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16", help="large")
    parser.add_argument("--shrink", type=int, default=1, help="large: divide every width, for a dry run")
    parser.add_argument("--batches", nargs="+", metavar="BxT", help="large: 16x512 1x2048")
    parser.add_argument("--seconds", type=float, help="large: begin no method after these; see Plan")
    args = parser.parse_args(given)
    if unknown := set(args.suites) - {*SMALL, *OPTIONS, "large"}:
        parser.error(f"no suite {', '.join(sorted(unknown))}; there are {', '.join((*SMALL, *OPTIONS))} and large")
    return args


def main(given: list[str] | None = None) -> None:
    args = arguments(given)
    with prepared():
        for name in args.suites or SMALL:
            print(f"\n{name}\n{'':59s} {'time':>9s} {'x frozen':>8s} {'p20 - p80':>16s} {'peak memory':>13s} {'x':>6s}")
            run_large(args) if name == "large" else run_small(name, args)


@contextmanager
def prepared() -> Iterator[None]:
    """Without lines that would hide the table, and without garbage of the imports."""
    logger = logging.getLogger("smt_peft")
    level = logger.level
    # It tells of every model that blocks are chosen in.
    logger.setLevel(logging.WARNING)
    # What is collected before every step whose memory is counted is not to look through all that imports have made.
    gc.collect()
    gc.freeze()
    try:
        with warnings.catch_warnings():
            # Of PEFT 0.21 in Transformers 5.23, and of SHiRA in PyTorch 2.13 (2026-11).
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            warnings.filterwarnings("ignore", "Sparse invariant checks are implicitly disabled", UserWarning)
            yield
    finally:
        gc.unfreeze()
        logger.setLevel(level)


def run_small(name: str, args: argparse.Namespace) -> None:
    own = {
        key: getattr(args, key) for key in ("hidden", "layers", "tokens", "density") if getattr(args, key) is not None
    }
    centre = replace(QUICK if args.quick else growth.CENTRE if name == "growth" else Case(), **own)
    rounds = {"rounds": args.rounds or (2 if args.quick else ROUNDS.get(name, 5)), "warmup": args.warmup}
    suffix = f"_{args.density:g}" if name == "step" and args.density else ""
    settings = {**vars(centre), **rounds}
    result = Result(args.out / f"{name}_cpu{suffix}.json", name, settings)
    if name == "growth":
        growth.suite(result, **rounds, axes=args.axes, centre=centre)
    else:
        {"step": step, "warmup": warmup, "fourbit": fourbit, "turns": turns}[name].suite(result, centre, **rounds)


def run_large(args: argparse.Namespace) -> None:
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    batches = [tuple(map(int, batch.split("x"))) for batch in args.batches or ()]
    settings: dict[str, Any] = {
        "layers": args.layers or large.LLAMA_3_8B["num_hidden_layers"],
        "shrink": args.shrink,
        "batches": batches or large.default_batches(device),
        "rounds": args.rounds or 5,
        "warmup": args.warmup,
        "seconds": args.seconds,
    }
    plan = large.Plan(device=device, dtype=getattr(torch, args.dtype), **settings)
    result = Result(args.out / f"large_{device}.json", "large", {**settings, "dtype": args.dtype}, device)
    large.suite(result, plan)


if __name__ == "__main__":
    main()
