"""docs/coming_from.md says of every other trainer's name what becomes of it, and nothing else."""

from __future__ import annotations

import re
from dataclasses import fields

import pytest

pytest.importorskip("trl", reason="the keys of a run are TRL's")

from pages import ROOT, rows
from peft import LoraConfig

from smt_peft.config import SMTConfig
from smt_peft.training.yaml.aliases import ALIASES, REFUSED

ROWS = [(cells[0], cells[1]) for cells in rows(ROOT / "docs" / "coming_from.md")]
SAID = [(code.partition(":")[0], instead) for names, instead in ROWS for code in names]


def test_every_name_is_there():
    assert {name for name, _ in SAID} >= ALIASES.keys() | REFUSED.keys()


@pytest.mark.parametrize("name", ALIASES)
def test_a_name_that_is_read_as_a_key_stands_beside_that_key(name):
    for said, instead in SAID:
        if said == name:
            key = ALIASES[name].key.removeprefix("smt.")
            assert any(key in code.replace("{", " ").replace(":", " ").split() for code in instead), instead


@pytest.mark.parametrize("name", REFUSED)
def test_a_name_that_is_refused_stands_beside_what_its_message_says_to_write(name):
    beside = [instead for said, instead in SAID if said == name and instead]
    for code in [code for codes in beside for code in codes]:
        assert re.sub(r": N\b", ": <value>", code) in REFUSED[name]


def test_a_name_of_lora_is_one_and_what_stands_beside_it_is_a_field_here():
    lora, ours = ({field.name for field in fields(owner)} for owner in (LoraConfig, SMTConfig))
    for name, instead in SAID:
        if name not in ALIASES | REFUSED:
            assert name in lora
            assert set(instead) <= ours
