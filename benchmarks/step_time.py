"""Step time of SMT and of PEFT's LoRA as a ratio to the frozen pass, measured in one process and one run.

The frozen pass is forward plus the gradient of the inputs through the same frozen model: what any adapter must pay.
A step of SMT or LoRA is forward, backward, AdamW step and zero_grad. Rounds are interleaved in a shuffled order, so
that a slow spell of the machine falls on every method; the figure is the median of the per-round ratios.

    python benchmarks/step_time.py                                   # 4 layers, hidden 1024, 512 tokens, 0.84 %
    python benchmarks/step_time.py --density 0.049 --out result.json
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import sys
import time
from pathlib import Path

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from smt_peft import SMTConfig


def build(args: argparse.Namespace) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=2048,
            hidden_size=args.hidden,
            intermediate_size=args.hidden * 11 // 4,
            num_hidden_layers=args.layers,
            num_attention_heads=16,
            num_key_value_heads=16,
            max_position_embeddings=args.tokens,
        )
    )
    return model.to(getattr(torch, args.dtype)).requires_grad_(False).train()


def methods(args: argparse.Namespace) -> dict:
    """Per method a model and, for the trained ones, its optimizer."""
    smt = {"target_modules": "all-linear", "density": args.density, "score": "random"}
    configs = {
        "frozen": None,
        "smt matched (block_size=auto)": SMTConfig(**smt),
        "smt blocks of 32": SMTConfig(**smt, block_size=32),
        "smt clustered (blocks of 128)": SMTConfig(**smt, block_size=128, spread="free"),
        "smt matched, additive": SMTConfig(**smt, forward="additive"),
        "lora r16": LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
    }
    built = {}
    for name, config in configs.items():
        model = build(args) if config is None else get_peft_model(build(args), config)
        trained = [p for p in model.parameters() if p.requires_grad]
        built[name] = model.train(), torch.optim.AdamW(trained, lr=1e-4) if trained else None
    return built


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer | None, args: argparse.Namespace) -> float:
    embeds = torch.randn(1, args.tokens, args.hidden, dtype=getattr(torch, args.dtype), requires_grad=optimizer is None)
    labels = torch.randint(0, 2048, (1, args.tokens))
    start = time.perf_counter()
    model(inputs_embeds=embeds, labels=labels, use_cache=False).loss.backward()
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - start


def measure(args: argparse.Namespace) -> dict:
    built = methods(args)
    rng = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in built}
    for index in range(args.warmup + args.rounds):
        order = list(built)
        rng.shuffle(order)
        for name in order:
            taken = step(*built[name], args)
            if index >= args.warmup:
                seconds[name].append(taken)
    frozen = seconds["frozen"]
    rows = {}
    for name, (model, _) in built.items():
        ratios = sorted(mine / base for mine, base in zip(seconds[name], frozen, strict=True))
        rows[name] = {
            "median_seconds": statistics.median(seconds[name]),
            "ratio": statistics.median(ratios),
            "ratio_p20_p80": [ratios[len(ratios) // 5], ratios[-1 - len(ratios) // 5]],
            "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--density", type=float, default=0.0084)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    args = parser.parse_args()
    rows = measure(args)
    print(f"{'method':32s} {'seconds':>8s} {'x frozen':>9s}  {'p20-p80':>13s} {'trainable':>11s}")
    for name, row in rows.items():
        low, high = row["ratio_p20_p80"]
        times = f"{row['median_seconds']:8.3f} {row['ratio']:9.3f}  {low:5.3f} - {high:5.3f}"
        print(f"{name:32s} {times} {row['trainable']:11,d}")
    if args.out:
        settings = {key: value for key, value in vars(args).items() if key != "out"}
        record = {
            "settings": settings,
            "device": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "rows": rows,
            "versions": {
                "python": sys.version.split()[0],
                "torch": torch.__version__,
                "peft": peft.__version__,
                "transformers": transformers.__version__,
            },
        }
        args.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
