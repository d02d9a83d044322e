"""The tests of exactly the PEFT that is installed, taken out of its source distribution."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

# What the source distribution leaves out: the option and the markers that PEFT's tests name (`skipf` is in its tests).
CONFTEST = """
def pytest_addoption(parser):
    parser.addoption("--regression", action="store_true", default=False)
"""
PYTEST_INI = """
[pytest]
markers =
    regression
    single_gpu_tests
    multi_gpu_tests
    bitsandbytes
    skipf
"""


def fetch_tests(work: Path) -> Path:
    """The folder of PEFT's tests, unpacked below `work`; downloaded once for each version."""
    version = importlib.metadata.version("peft")
    # PEFT's tests import each other as `tests.…`, so the folder keeps that name.
    tests = work / f"peft-{version}" / "tests"
    if tests.exists():
        return tests
    downloads = work / "sdist"
    command = ["-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", "--no-build-isolation"]
    subprocess.run([sys.executable, *command, "-d", str(downloads), f"peft=={version}"], check=True)
    with tarfile.open(downloads / f"peft-{version}.tar.gz") as archive:
        archive.extractall(downloads, filter="data")
    unfinished = tests.with_name("unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(downloads / f"peft-{version}" / "tests", unfinished)
    (unfinished / "__init__.py").touch()
    (unfinished / "conftest.py").write_text(CONFTEST)
    (unfinished.parent / "pytest.ini").write_text(PYTEST_INI)
    unfinished.rename(tests)
    return tests
