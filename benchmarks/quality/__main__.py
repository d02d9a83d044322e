"""Run the quality grid, piece by piece.

python -m benchmarks.quality run core encoder         # these studies; what is there already is not run again
python -m benchmarks.quality run --task sort --only smt lora core
python -m benchmarks.quality collect                  # one file per task under benchmarks/results/quality
python -m benchmarks.quality restore                  # the other way: what is committed need not be run again
python -m benchmarks.quality list
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import defaultdict
from pathlib import Path

from .grid import Store, collect, collected, run_cells
from .studies import SEEDS, STUDIES, cells
from .trial import Trial

ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["run", "list", "collect", "restore"])
    parser.add_argument("studies", nargs="*", metavar="STUDY", help=", ".join(STUDIES))
    parser.add_argument("--task", nargs="+", help="only cells of these tasks")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only cells of these names")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="%(default)s")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="processes of one thread each (%(default)s)"
    )
    parser.add_argument("--runs", type=Path, default=ROOT / "out" / "quality", help="one JSON file per run")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "results" / "quality", help="of collect and restore"
    )
    args = parser.parse_args()
    unknown = sorted(set(args.studies) - set(STUDIES))
    if unknown:
        parser.error(f"no study named {', '.join(unknown)}; there are {', '.join(STUDIES)}")
    if args.verb == "collect":
        by_task = defaultdict(list)
        for result in Store(args.runs).all():
            by_task[result["task"]].append(result)
        for task, results in by_task.items():
            collect(results, args.out / f"{task}.json")
            print(f"{len(results)} runs: {args.out / task}.json")
        return 0
    if args.verb == "restore":
        store = Store(args.runs)
        for file in sorted(args.out.glob("*.json")):
            results = collected(file)
            for result in results:
                store.put(Trial(**{key: result[key] for key in Trial.__dataclass_fields__}), result)
            print(f"{len(results)} runs of {file}")
        return 0
    chosen = [
        cell
        for cell in cells(args.studies or list(STUDIES))
        if (not args.task or cell.task in args.task) and (not args.only or cell.name in args.only)
    ]
    if args.verb == "list":
        for cell in chosen:
            print(f"{cell.task:10s} r{cell.budget:<5g} {cell.name}")
        print(f"{len(chosen)} cells")
        return 0
    failures = run_cells(chosen, args.runs, args.workers, args.seeds)
    print("\n".join(failures), file=sys.stderr)
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
