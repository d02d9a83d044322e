"""What the tests of runs share: a model and data, and one whole run through the command line."""

from __future__ import annotations

import pytest
import torch
from helpers import save_tiny_model
from runs import Finished, Workshop, smt, write_jsonl


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small are slower on two threads, by far on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def workshop(tmp_path_factory) -> Workshop:
    directory = tmp_path_factory.mktemp("workshop")
    save_tiny_model(directory / "model")
    rows = [{"prompt": f"upper: word{i % 7}\n", "completion": f"WORD{i % 7}"} for i in range(48)]
    settings = {
        "model_name_or_path": str(directory / "model"),
        "dataset_path": str(write_jsonl(directory / "train.jsonl", rows)),
        "eval_dataset_path": str(write_jsonl(directory / "test.jsonl", rows[:6])),
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "verify": False,
        "smt": {"block_size": 8, "density": 0.1, "warmup_batches": 2},
    }
    return Workshop(directory, settings)


@pytest.fixture(scope="session")
def finished(workshop) -> Finished:
    path = workshop.write(
        "finished",
        verify=True,
        compare_lora=True,
        eval_exact_match=True,
        generation_max_new_tokens=4,
        smt={"block_size": 8, "density": 0.1, "warmup_batches": 2},
    )
    process = smt("train", path, "max_steps=6")
    assert process.returncode == 0, process.stderr
    return Finished(process, workshop.directory / "finished", path)
