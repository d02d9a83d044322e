"""A tiny random Llama with a byte-level tokenizer, data for it, and the command line in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

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
    config = LlamaConfig(
        vocab_size=264,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attention_dropout=0.1,
        eos_token_id=256,
        pad_token_id=257,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def smt(*arguments: str) -> subprocess.CompletedProcess:
    """The real command line, in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "smt_peft.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )


@dataclass
class Finished:
    """A whole run: the process that made it, and where it lies."""

    process: subprocess.CompletedProcess
    directory: Path
    yaml: Path
