"""`smt` as a process of `torchrun`: the command line, but for what DeepSpeed would compile for minutes."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec

if __name__ == "__main__":
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" and find_spec("deepspeed"):
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    from smt_peft.cli import main

    sys.exit(main(sys.argv[1:]))
