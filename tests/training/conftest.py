"""A tiny random Llama with a byte-level tokenizer, data for it, and one whole run through the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).parents[2]


@dataclass
class Workshop:
    """A directory with a model, data, and the settings of a run over them."""

    directory: Path
    settings: dict

    def write(self, name: str = "run", **changed) -> Path:
        """A YAML over the settings; None drops a key."""
        settings = {**self.settings, "output_dir": str(self.directory / name), **changed}
        settings = {key: value for key, value in settings.items() if value is not None}
        path = self.directory / f"{name}.yaml"
        path.write_text(yaml.safe_dump(settings, sort_keys=False))
        return path


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def save_tiny_model(directory: Path) -> None:
    torch.manual_seed(0)
    # Dropout, so that a generator that is not restored shows in the losses.
    config = LlamaConfig(vocab_size=264, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, max_position_embeddings=64, attention_dropout=0.1, eos_token_id=256,
                         pad_token_id=257)
    LlamaForCausalLM(config).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


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
        "max_steps": 8, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "gradient_checkpointing": False,
        "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "verify": False,
        "smt": {"block_size": 8, "density": 0.1, "warmup_batches": 2},
    }
    return Workshop(directory, settings)


def smt(*arguments: str) -> subprocess.CompletedProcess:
    """The real command line, in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-m", "smt_peft.cli", *map(str, arguments)], capture_output=True, text=True,
                          env=environment, check=False)


@dataclass
class Finished:
    """A whole run: the process that made it, and where it lies."""

    process: subprocess.CompletedProcess
    directory: Path
    yaml: Path


@pytest.fixture(scope="session")
def finished(workshop) -> Finished:
    path = workshop.write("finished", verify=True, compare_lora=True, eval_exact_match=True,
                          generation_max_new_tokens=4, smt={"block_size": 8, "density": 0.1, "warmup_batches": 2})
    process = smt("train", path, "max_steps=6")
    assert process.returncode == 0, process.stderr
    return Finished(process, workshop.directory / "finished", path)
