"""Every `smt` command in the guide to serving is one that the command line takes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from smt_peft import cli

GUIDE = Path(__file__).parents[2] / "docs" / "serving.md"


def test_every_command_of_the_guide_is_taken():
    text = GUIDE.read_text()
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    commands = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    ours = [words[1:] for words in commands if words[:1] == ["smt"]]
    assert {words[0] for words in ours} == {"merge", "verify", "export", "patch"}
    for words in ours:
        cli._parser().parse_args(words)


def test_the_command_for_gguf_is_the_one_that_help_names(capsys):
    wanted = cli.GGUF.replace("MERGED", "out/merged").replace("MODEL.gguf", "model.gguf")
    assert wanted in GUIDE.read_text()
    for verb in ("merge", "export"):
        cli._parser()._subparsers._group_actions[0].choices[verb].print_help()
        assert "convert_hf_to_gguf.py MERGED" in " ".join(capsys.readouterr().out.split())
