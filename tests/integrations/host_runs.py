"""What the tests of host trainers share: a run of theirs in a process of its own, and what it must leave behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from helpers import assert_no_worse_than_torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from smt_peft import BlockSelection

WORDS = [(f"upper: word{i % 7}\n", f"WORD{i % 7}") for i in range(48)]
IDS = torch.tensor([list(b"upper: word3\nWORD3")])
# Plain PEFT: nothing of the host, and of this package its import alone.
RELOAD = """
import sys, torch
import smt_peft
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, ids, out = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
torch.save(model(input_ids=torch.load(ids)).logits.detach(), out)
"""


def host(*arguments: str | Path) -> subprocess.CompletedProcess:
    """Run a host's own command line, on the CPU and offline."""
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "AXOLOTL_DO_NOT_TRACK": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)


def succeeded(done: subprocess.CompletedProcess) -> subprocess.CompletedProcess:
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done


def losses(checkpoint: Path) -> list[float]:
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def assert_blocks_alone_trained(checkpoint: Path, selection: BlockSelection) -> None:
    """The file holds the chosen blocks, each has moved, and the optimizer knew of nothing else."""
    tensors = load_file(checkpoint / "adapter_model.safetensors")
    config = json.loads((checkpoint / "adapter_config.json").read_text())
    assert config["peft_type"] == "SMT" and config["task_type"] == "CAUSAL_LM"
    shapes = []
    for module, blocks in selection.blocks.items():
        index = tensors.pop(f"base_model.model.{module}.smt_blocks.index")
        delta = tensors.pop(f"base_model.model.{module}.smt_blocks.weight")
        assert torch.equal(index, blocks) and delta.dtype == torch.float32
        assert delta.flatten(1).any(1).any(), module
        shapes.append(tuple(delta.shape))
    assert not tensors
    state = torch.load(checkpoint / "optimizer.pt")["state"].values()
    assert sorted(tuple(moments["exp_avg"].shape) for moments in state) == sorted(shapes)


def merged_by_hand(base: Path, adapter: Path) -> dict[str, Tensor]:
    """The base's tensors with the deltas of an adapter's file added, in plain PyTorch."""
    weights = load_file(base / "model.safetensors")
    tensors = load_file(adapter / "adapter_model.safetensors")
    pattern = json.loads((adapter / "adapter_config.json").read_text())["block_pattern"]
    for module, (_, rows, cols) in pattern.items():
        deltas = tensors[f"base_model.model.{module}.smt_blocks.weight"]
        for (row, col), delta in zip(tensors[f"base_model.model.{module}.smt_blocks.index"], deltas, strict=True):
            weights[f"{module}.weight"][row * rows : (row + 1) * rows, col * cols : (col + 1) * cols] += delta
    return weights


def assert_reloads(base: Path, adapter: Path, scratch: Path) -> None:
    """In a fresh process, by plain PEFT, the adapter computes what the weights merged by hand compute."""
    torch.save(IDS, scratch / "ids.pt")
    command = [sys.executable, "-c", RELOAD, base, adapter, scratch / "ids.pt", scratch / "logits.pt"]
    succeeded(subprocess.run(list(map(str, command)), capture_output=True, text=True))
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    untrained = model(input_ids=IDS).logits.detach()
    model.load_state_dict(merged_by_hand(base, adapter))
    same_dtype = model(input_ids=IDS).logits.detach()
    truth = model.double()(input_ids=IDS).logits.detach()
    logits = torch.load(scratch / "logits.pt")
    assert_no_worse_than_torch(logits, same_dtype, truth)
    assert (logits - untrained).abs().max() > 1e-2


def assert_merged(base: Path, adapter: Path, merged: Path) -> None:
    """A host's own merge wrote, bit for bit, what merging by hand gives."""
    expected, written = merged_by_hand(base, adapter), load_file(merged / "model.safetensors")
    assert expected.keys() == written.keys()
    for name, tensor in expected.items():
        assert torch.equal(written[name], tensor), name


def assert_same_adapter(one: Path, other: Path) -> None:
    ours, theirs = (load_file(path / "adapter_model.safetensors") for path in (one, other))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
