"""Every operation, checked and then timed beside every other route to the same result: `smt bench` as a script.

python benchmarks/ops.py --device cuda --out benchmarks/results/ops.json
python benchmarks/ops.py --operation block_grad --quick
"""

from __future__ import annotations

import sys

from smt_peft.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
