"""Two processes choose the blocks that one process chooses over all the data, whoever shards the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cases import told
from helpers import batch
from launch import run_worker
from lesson import base, chosen_equal, config

from smt_peft import BlockSelection, select_blocks

SCORES = ("grad_abs", "grad_sum_abs", "mean_abs", "activation")


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("selection")
    run_worker("select_worker.py", directory)
    return directory


def all_batches() -> list[dict]:
    return [batch(rows=2, seed=10 + i) for i in range(4)]


@pytest.mark.parametrize("engine", ["plain", "ddp", "fsdp2_base", "fsdp2_peft"])
def test_the_choice_is_that_of_one_process_over_all_the_data(out, engine):
    told(out, engine)
    for score in SCORES:
        alone = select_blocks(base(), config(score=score), all_batches(), num_batches=4, progress=False)
        first, second = (BlockSelection.load(out / engine / f"{score}_{rank}.safetensors") for rank in (0, 1))
        assert chosen_equal(first, second)
        if score == "activation":
            # Every block of a column scores the same, so that the last bit of a sum decides which row is taken.
            for name, scores in alone.scores.items():
                torch.testing.assert_close(first.scores[name], scores)
        else:
            assert chosen_equal(first, alone), score


def test_a_score_by_weights_gathers_them(out):
    told(out, "magnitude")
    alone = select_blocks(base(), config(score="magnitude"))
    for rank in (0, 1):
        assert chosen_equal(BlockSelection.load(out / "magnitude" / f"magnitude_{rank}.safetensors"), alone)


@pytest.mark.parametrize("model", ["plain", "fsdp2"])
def test_an_error_in_one_process_is_raised_in_all(out, model):
    messages = told(out, f"{model}_raises")["messages"]
    assert messages[1] == "a broken row"
    assert "another process" in messages[0]


def test_a_sharded_model_is_called_as_often_as_every_process_has_a_batch(out):
    assert told(out, "uneven")["batches"] == 4


def test_a_selection_amid_a_training_changes_none_of_its_losses(out):
    undisturbed, disturbed = told(out, "trains_after")["losses"]
    assert disturbed == undisturbed


def test_what_cannot_be_scored_on_shards_says_what_to_do(out):
    message = told(out, "taylor")["message"]
    assert "model.layers.0.self_attn.q_proj" in message and "grad_abs" in message
    assert "fully_shard" in told(out, "fsdp1")["message"]
