"""The guide to serving; its commands are run with those of every page, in tests/docs."""

from __future__ import annotations

from pathlib import Path

from smt_peft import cli

GUIDE = Path(__file__).parents[2] / "docs" / "serving.md"


def test_the_command_for_gguf_is_the_one_that_help_names(capsys):
    wanted = cli.GGUF.replace("MERGED", "out/merged").replace("MODEL.gguf", "model.gguf")
    assert wanted in GUIDE.read_text()
    for verb in ("merge", "export"):
        cli._parser()._subparsers._group_actions[0].choices[verb].print_help()
        assert "convert_hf_to_gguf.py MERGED" in " ".join(capsys.readouterr().out.split())
