"""PEFT's own tests, with SMT put in: `python tests/peft_suite/run.py [files of PEFT's tests] [options of pytest]`.

Without files, every file that `files.md` names is run. README.md beside this file says how it works.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from peft_suite.sdist import fetch_tests  # noqa: E402
from peft_suite.table import read_files, untold  # noqa: E402
from peft_suite.tiny_models import make_models  # noqa: E402

WORK = HERE.parents[1] / "build" / "peft_suite"


def main(arguments: list[str]) -> int:
    WORK.mkdir(parents=True, exist_ok=True)
    tests = fetch_tests(WORK)
    if missing := untold({path.name for path in tests.glob("test_*.py")}):
        print(f"files.md says nothing of these files of PEFT's tests: {', '.join(missing)}", file=sys.stderr)
        return 1
    models = WORK / "models"
    make_models(models)
    files = [argument for argument in arguments if argument.endswith(".py")]
    options = [argument for argument in arguments if argument not in files]
    taken = [name for name, entry in read_files().items() if entry.is_taken and (tests / name).exists()]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--no-header",
        "--tb=short",
        "-W",
        "ignore",
        "--timeout=600",
        "-n",
        "2",
    ]
    command += ["-p", "peft_suite.plugin", "-p", "no:cacheprovider", "-c", str(tests.parent / "pytest.ini"), *options]
    command += [str(tests / name) for name in files or taken]
    return subprocess.run(command, cwd=models, env=environment()).returncode


def environment() -> dict[str, str]:
    paths = [str(HERE.parent), str(HERE.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "PEFT_SUITE_RESULT": os.environ.get("PEFT_SUITE_RESULT", str(WORK / "result.json")),
        "PEFT_DEBUG_WITH_TORCH_COMPILE": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
