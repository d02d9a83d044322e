"""`preset: paca` and `preset: s2ft` as runs: resumed alike, and what does not go with channels refused by its line."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from runs import Workshop, assert_resumed_alike

from smt_peft.training.errors import ConfigError
from smt_peft.training.yaml.schema import load_run


@pytest.fixture(scope="module")
def workshop(workshop, tmp_path_factory) -> Workshop:
    """The same model and data in a place of its own, as a run refuses a directory that holds another's."""
    return replace(workshop, directory=tmp_path_factory.mktemp("structured_run"))


@pytest.mark.parametrize("preset", ["paca", "s2ft"])
def test_a_run_of_whole_columns_is_resumed_alike(workshop, preset):
    directory = assert_resumed_alike(workshop, preset=preset, smt=None, learning_rate=None)
    config = json.loads((directory / "adapter_config.json").read_text())
    shapes = {(rows, cols) for _, rows, cols in config["block_pattern"].values()}
    # Columns of the hidden size 32, and of the heads that read one of two key/value heads; PaCA has them everywhere.
    assert shapes == ({(32, 1), (32, 16)} if preset == "s2ft" else {(32, 1), (48, 1), (16, 1)})


def test_rows_and_columns_of_a_channel_train_together(workshop):
    assert_resumed_alike(workshop, smt={"coupled": "both", "density": 0.5, "warmup_batches": 2})


@pytest.mark.parametrize(
    ("key", "value"), [("block_size", 8), ("num_blocks", 4), ("spread", "capped"), ("max_column_share", 0.5)]
)
def test_what_contradicts_channels_is_laid_to_its_line(workshop, key, value):
    path = workshop.write("wrong", smt={"coupled": "both", key: value})
    line = next(n for n, text in enumerate(path.read_text().splitlines(), 1) if text.strip().startswith("coupled"))
    with pytest.raises(ConfigError, match=rf"line {line}: smt.coupled: {key}=.* contradicts coupled='both'"):
        load_run(path)
