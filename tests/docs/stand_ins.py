"""What a page takes for granted: names and files that its reader has, small ones here."""

from __future__ import annotations

from collections.abc import Callable

from desk import Desk
from helpers import batch, save_tiny_model, tiny_llama
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from smt_peft import SMTConfig, select_blocks

RUN = """\
model_name_or_path: model
dataset_path: quickstart/data/test.jsonl
max_length: 64
per_device_train_batch_size: 4
gradient_checkpointing: false
learning_rate: 1e-2
output_dir: out/run
smt: {block_size: 8, density: 0.1}
"""


def batches(desk: Desk) -> None:
    """What a DataLoader yields."""
    desk.names["batches"] = [batch(seed=seed) for seed in range(2)]


def run_yaml(desk: Desk) -> None:
    """A run of a tiny model over a few rows."""
    save_tiny_model(desk.directory / "model")
    (desk.directory / "run.yaml").write_text(RUN)


def selection_file(desk: Desk) -> None:
    """What `smt select` writes."""
    config = SMTConfig(density=0.1, block_size=8, score="random")
    select_blocks(tiny_llama(), config).save(desk.directory / "selection.safetensors")


def adapter(desk: Desk) -> None:
    """A trained adapter, and the base that it names."""
    save_tiny_model(desk.directory / "BASE")
    model = AutoModelForCausalLM.from_pretrained("BASE")
    config = SMTConfig(block_size=8, density=0.1, score="random", init_weights=False, task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(desk.directory / "out" / "adapter")


STAND_INS: dict[str, tuple[Callable[[Desk], None], ...]] = {
    "README.md": (batches,),
    "docs/choosing.md": (selection_file,),
    "docs/coming_from.md": (batches,),
    "docs/plan.md": (run_yaml,),
    "docs/serving.md": (adapter,),
    "docs/troubleshooting.md": (run_yaml, selection_file),
}
