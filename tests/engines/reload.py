"""Loads adapters onto the plain base, and writes their logits; started as a fresh process."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from lesson import base, logits
from peft import PeftModel
from safetensors.torch import save_file

if __name__ == "__main__":
    torch.set_num_threads(1)
    for directory in map(Path, sys.argv[1:]):
        save_file({"logits": logits(PeftModel.from_pretrained(base(), directory))}, directory / "logits.safetensors")
