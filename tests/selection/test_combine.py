"""Selections as sets: what comes out, what is told of their overlap, and what cannot be combined."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from helpers import Mlp

from smt_peft import BlockSelection, SMTConfig, select_blocks
from smt_peft.cli import main
from smt_peft.selection.combine import COMBINATIONS, combine, load_selection

SETTINGS = {"target_modules": ["up", "down"], "density": 0.3, "score": "random"}


def selection(model, seed=0, **settings):
    return select_blocks(model, SMTConfig(**SETTINGS | {"block_size": 4} | settings, seed=seed))


def members(made):
    return {(name, *block) for name, blocks in made.blocks.items() for block in blocks.tolist()}


@pytest.fixture
def files(tmp_path):
    model = Mlp()
    made = [selection(model, seed) for seed in range(3)]
    paths = [str(tmp_path / f"{name}.safetensors") for name in "abc"]
    for each, path in zip(made, paths, strict=True):
        each.save(path)
    return made, paths


@pytest.mark.parametrize("how", COMBINATIONS)
def test_a_fresh_process_writes_the_set_that_was_asked_for(how, files, tmp_path):
    made, paths = files
    made, paths = (made[:2], paths[:2]) if how == "intersection" else (made, paths)
    out = tmp_path / "deep" / "out.safetensors"
    command = [sys.executable, "-m", "smt_peft.cli", "select", f"--{how}", *paths, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = members(made[0])
    for other in made[1:]:
        expected = getattr(expected, how)(members(other))
    found = BlockSelection.load(out)
    assert members(found) == expected and found.grids == made[0].grids
    assert found.provenance == {"combined": True, "base_fingerprint": made[0].provenance["base_fingerprint"]}
    assert f"{how}: {found.summary()}" in done.stdout and f"train with it: smt.selection={out}" in done.stdout
    common = len(members(made[0]) & members(made[1]))
    assert common and f"share {common} blocks, " in done.stdout


def test_without_a_file_to_write_it_is_told_alone(files, tmp_path, capsys):
    _, paths = files
    before = sorted(tmp_path.rglob("*"))
    assert main(["select", "--difference", *paths[:2]]) == 0
    assert "difference: " in capsys.readouterr().out and sorted(tmp_path.rglob("*")) == before


def test_that_they_share_no_block_is_told(tmp_path, capsys):
    model = Mlp()
    one = selection(model)
    one.save(tmp_path / "a.safetensors")
    selection(model, 1, avoid=one).save(tmp_path / "b.safetensors")
    paths = [str(tmp_path / f"{name}.safetensors") for name in "ab"]
    assert main(["select", "--union", *paths]) == 0
    assert f"{paths[0]} and {paths[1]} share no block: their adapters add exactly" in capsys.readouterr().out
    assert main(["select", "--intersection", *paths]) == 2
    assert "no block is left" in capsys.readouterr().err


def test_a_list_of_files_is_their_union(files):
    made, paths = files
    assert load_selection(paths) == made[0] | made[1] | made[2]
    assert load_selection(paths[1]) == made[1]


def test_other_bases_and_tilings_are_refused_by_module():
    model, other = Mlp(), Mlp()
    with pytest.raises(ValueError, match="up: the selections were made on different base models"):
        combine("union", [selection(model), selection(other)])
    with pytest.raises(ValueError, match="up: the selections tile this module differently"):
        combine("union", [selection(model), selection(model, block_size=8)])
    half = Mlp()
    half.load_state_dict(model.state_dict())
    with torch.no_grad():
        half.bfloat16()
    # Of the same base in another dtype.
    assert members(combine("union", [selection(model), selection(half)])) == members(selection(model))
