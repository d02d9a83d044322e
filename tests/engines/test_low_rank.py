"""Low-rank pairs in two processes learn what they learn in one, and are saved whole."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from cases import told
from launch import run_worker
from lesson import adamw, base, student, train, trainable
from low_rank_worker import PAIR
from peft import PeftModel
from safetensors.torch import load_file

from smt_peft.tuner.effective import effective_update


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("low_rank")
    run_worker("low_rank_worker.py", directory)
    return directory


@pytest.fixture(scope="module")
def single():
    """One process: its losses, and its model."""
    model = student(**PAIR)
    return train(model, adamw(trainable(model))), model


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "fsdp1", "fsdp1_flat"])
def test_two_processes_learn_and_save_what_one_does(out, single, engine):
    found, (losses, model) = told(out, engine), single
    # Sums over rows in another order; eps of the lesson keeps the steps that close.
    assert found["losses"] == pytest.approx(losses, rel=1e-5)
    saved = load_file(out / engine / "adapter" / "adapter_model.safetensors")
    held = {name.replace(".default", ""): p for name, p in model.named_parameters() if "smt_" in name}
    assert {key for key in saved if not key.endswith("index")} == held.keys()
    for key, parameter in held.items():
        assert parameter.any() and torch.allclose(saved[key], parameter.detach(), rtol=1e-3, atol=1e-5), key
    # The blocks' places and all else is right when the whole model computes the same.
    again = PeftModel.from_pretrained(base(), out / engine / "adapter")
    ids = {"input_ids": torch.arange(8)[None]}
    torch.testing.assert_close(again(**ids).logits, model.eval()(**ids).logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_the_effective_update_is_counted_of_whole_matrices(out, engine):
    adapter = PeftModel.from_pretrained(base(), out / engine / "adapter")
    assert told(out, engine)["effective"] == {name: asdict(each) for name, each in effective_update(adapter).items()}
