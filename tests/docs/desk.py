"""A place to work through a page: its Python, its commands and its files, one after the other, as a reader would."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator
from omegaconf import OmegaConf
from pages import ROOT, Fence

from smt_peft import cli

# What a run of a page is cut down to. It stands behind the page's own overrides, so it wins. `smt verify` is a verb.
SHORT = (
    "max_steps=2",
    "save_steps=2",
    "disable_tqdm=true",
    "generation_max_new_tokens=2",
    "generation_batch_size=200",
    "per_device_eval_batch_size=100",
    "smt.warmup_batches=1",
    "verify=false",
)
# The mark of a block may say that it is another program's, whose keys are not known here.
FOREIGN = "read by "


class Desk:
    """A directory, the names that a page's Python has made, and the environment of its commands.

    Args:
        directory: an empty one. `smt` and `python` are found as a reader with an installation finds them.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.names: dict[str, Any] = {"__name__": "__main__"}
        for shared in ("quickstart", "configs"):
            (directory / shared).symlink_to(ROOT / shared)
        commands = directory / ".bin"
        commands.mkdir()
        for name, words in (("python", ""), ("smt", " -m smt_peft.cli")):
            (commands / name).write_text(f'#!/bin/sh\nexec "{sys.executable}"{words} "$@"\n')
            (commands / name).chmod(0o755)
        paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self.environment = {**os.environ, "PATH": f"{commands}:{os.environ['PATH']}", "PYTHONPATH": paths}

    def take(self, fence: Fence) -> None:
        """Run a block, or check what can be checked of one that is marked."""
        if fence.file:
            file = self.directory / fence.file
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(fence.text)
        getattr(self, f"_{fence.language}")(fence)

    def _text(self, fence: Fence) -> None:
        """Output, or a drawing in letters: nothing to run."""

    def _python(self, fence: Fence) -> None:
        code = compile(fence.text, f"line {fence.line}", "exec")
        if fence.reason is None:
            with contextlib.redirect_stdout(io.StringIO()):
                exec(code, self.names)

    def _json(self, fence: Fence) -> None:
        json.loads(fence.text)

    def _jsonl(self, fence: Fence) -> None:
        for row in fence.text.splitlines():
            if not row.startswith("//"):
                json.loads(row)

    def _html(self, fence: Fence) -> None:
        assert fence.reason, "HTML is not run; say so in a mark"

    _jinja = _html

    def _yaml(self, fence: Fence) -> None:
        # Not PyYAML, to which 2e-2 is text.
        settings = OmegaConf.to_container(OmegaConf.create(fence.text))
        if fence.reason is not None and fence.reason.startswith(FOREIGN):
            return
        wrong = [error.message for error in _parts_of_a_run().iter_errors(settings)]
        assert not wrong, wrong
        if fence.reason is None and not list(_whole_runs().iter_errors(settings)):
            from smt_peft.training.yaml.schema import load_run

            path = self.directory / (fence.file or "page.yaml")
            path.write_text(fence.text)
            load_run(path)

    def _bash(self, fence: Fence) -> None:
        for line in commands(fence.text):
            words = shlex.split(line, comments=True)
            if fence.reason is not None:
                check_command(words)
            elif words[0] == "smt" and not set(words) & {"|", ">", "&&", "2>"}:
                self._smt(words[1:])
            else:
                self._shell(line)

    def _console(self, fence: Fence) -> None:
        """Commands behind `$ `, and what they print."""
        typed = "".join(line[2:] + "\n" for line in fence.text.splitlines() if line.startswith("$ "))
        self._bash(Fence("bash", typed, fence.line, fence.reason))

    def _smt(self, words: list[str]) -> None:
        """The command in this process: what a new one takes to start would be most of the time."""
        if words[0] in ("train", "select") and "--dry-run" not in words:
            words = [*words, *SHORT]
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            try:
                status = cli.main(words)
            except SystemExit as stop:
                status = stop.code or 0
        assert status == 0, f"smt {' '.join(words)} ends with {status}:\n{said.getvalue()[-2000:]}"

    def _shell(self, line: str) -> None:
        done = subprocess.run(
            ["bash", "-c", line], cwd=self.directory, env=self.environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{line}\nends with {done.returncode}:\n{done.stdout[-1000:]}{done.stderr[-2000:]}"


def commands(text: str) -> list[str]:
    """The command lines of a block, those continued by a backslash in one; comments and blank lines are left out."""
    joined = re.sub(r"\\\n\s*", "", text)
    return [line.strip() for line in joined.splitlines() if line.strip() and not line.strip().startswith("#")]


def check_command(words: list[str]) -> None:
    """That a command which is not run would be understood, as far as it is ours: `smt`, `make` and what launches `smt`.

    Raises:
        AssertionError: the verb, an option or the target of `make` does not exist.
    """
    while words and re.match(r"\w+=", words[0]):
        words = words[1:]
    if "smt_peft.cli" in words:
        words = ["smt", *words[words.index("smt_peft.cli") + 1 :]]
    if words[0] == "smt":
        parser = cli._parser()
        try:
            cli._take_settings(parser, *parser.parse_known_args(words[1:]))
        except SystemExit as stop:
            assert not stop.code, f"not understood: {shlex.join(words)}"
    if words[0] == "make":
        targets = [word for word in words[1:] if "=" not in word]
        for target in targets:
            assert re.search(rf"^{target}: ", (ROOT / "Makefile").read_text(), re.M), f"no target: make {target}"


@cache
def _whole_runs() -> Draft202012Validator:
    from smt_peft.training.yaml.json_schema import json_schema

    return Draft202012Validator(json_schema())


@cache
def _parts_of_a_run() -> Draft202012Validator:
    return Draft202012Validator({key: value for key, value in _whole_runs().schema.items() if key != "allOf"})
