"""Step time and peak memory of SMT, LoRA, DoRA and full training as a ratio to the frozen pass, in one run.

The frozen pass is forward plus the gradient of the inputs through the same frozen model: what any adapter must pay.
A step of a method is forward, backward, AdamW step and zero_grad. Two ways to measure:

`--model small`: all models live side by side and take turns in a shuffled order, so that a slow spell of the machine
falls on every method; the figure is the median of the per-round ratios.
`--model llama-3-8b`: random weights of that shape, made where they are measured. One model; every method is put on it,
measured and taken off, with the frozen pass measured right before and after; the figure is the ratio of the medians.
Full training comes last, as it spends the model: parameters, gradients and moments all in bf16.

    python benchmarks/step_time.py                                   # 4 layers, hidden 1024, 512 tokens, 0.84 %
    python benchmarks/step_time.py --density 0.049 --out result.json
    python benchmarks/step_time.py --model llama-3-8b --batches 16x512 1x2048 --out result.json
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from smt_peft import SMTConfig
from smt_peft.bench.environment import record
from smt_peft.bench.measure import ratios, spread
from smt_peft.bench.table import duration
from smt_peft.optim import SMTAdamW

LLAMA_3_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
Batch = tuple[int, int]


@dataclass(frozen=True)
class Method:
    """A PEFT config (None: train every weight), the optimizer, and whether the pass runs under bf16 autocast."""

    config: PeftConfig | None
    optimizer: Callable = torch.optim.AdamW
    autocast: bool = False

    def start(self, base: LlamaForCausalLM) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        if self.config is None:
            model = base.requires_grad_(True)
        else:
            # Adapters in the dtype of the model, unless autocast is there to cast for them.
            model = get_peft_model(base, self.config, autocast_adapter_dtype=self.autocast)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        fused = {"fused": True} if self.optimizer is torch.optim.AdamW and trained[0].is_cuda else {}
        return model.train(), self.optimizer(trained, lr=1e-4, **fused)


def smt(density: float, **settings) -> SMTConfig:
    return SMTConfig(target_modules="all-linear", score="random", density=density, **settings)


def lora(rank: int, **settings) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", **settings)


def small_methods(density: float) -> dict[str, Method]:
    return {
        "smt matched (block_size=auto)": Method(smt(density)),
        "smt matched, SMTAdamW": Method(smt(density), SMTAdamW),
        "smt blocks of 32": Method(smt(density, block_size=32)),
        "smt clustered (blocks of 128)": Method(smt(density, block_size=128, spread="free")),
        "smt matched, additive": Method(smt(density, forward="additive")),
        "lora r16": Method(lora(16)),
    }


def large_methods() -> dict[str, Method]:
    clustered = {"block_size": 256, "spread": "free"}
    return {
        "smt matched, 0.84 %": Method(smt(0.0084), SMTAdamW),
        "smt matched, torch AdamW": Method(smt(0.0084)),
        "smt clustered 256, 0.84 %": Method(smt(0.0084, **clustered), SMTAdamW),
        "smt clustered 256, 4.9 %": Method(smt(0.049, **clustered), SMTAdamW),
        "lora r16": Method(lora(16)),
        "lora r64": Method(lora(64)),
        "lora r16, fp32 adapters": Method(lora(16), autocast=True),
        "dora r16": Method(lora(16, use_dora=True)),
        "full": Method(None),
    }


def build(args: argparse.Namespace) -> LlamaForCausalLM:
    torch.manual_seed(0)
    if args.model == "llama-3-8b":
        shape = {**LLAMA_3_8B, "num_hidden_layers": args.layers or LLAMA_3_8B["num_hidden_layers"]}
        for width in ("vocab_size", "hidden_size", "intermediate_size"):
            shape[width] //= args.shrink
        for heads in ("num_attention_heads", "num_key_value_heads"):
            shape[heads] = max(1, shape[heads] // args.shrink)
    else:
        shape = {
            "vocab_size": 2048,
            "hidden_size": args.hidden,
            "intermediate_size": args.hidden * 11 // 4,
            "num_hidden_layers": args.layers or 4,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "max_position_embeddings": args.tokens,
        }
    default = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, args.dtype))
    try:
        with torch.device(args.device):
            model = LlamaForCausalLM(LlamaConfig(**shape))
    finally:
        torch.set_default_dtype(default)
    return model.requires_grad_(False).train()


def step(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer | None, batch: Batch, autocast: bool = False
) -> float:
    """Seconds of one step, or of one frozen pass where there is no optimizer."""
    some = next(model.parameters())
    embeds = torch.randn(*batch, model.config.hidden_size, dtype=some.dtype, device=some.device)
    embeds.requires_grad_(optimizer is None)
    labels = torch.randint(0, model.config.vocab_size, batch, device=some.device)
    wait = torch.cuda.synchronize if some.is_cuda else lambda: None
    context = torch.autocast(some.device.type, torch.bfloat16) if autocast else contextlib.nullcontext()
    wait()
    start = time.perf_counter()
    with context:
        loss = model(inputs_embeds=embeds, labels=labels, use_cache=False).loss
    loss.backward()
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()
    wait()
    return time.perf_counter() - start


def trainable(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def side_by_side(args: argparse.Namespace) -> Iterator[dict]:
    """Every method on a model of its own, interleaved."""
    built = {"frozen": (build(args), None)}
    built |= {name: method.start(build(args)) for name, method in small_methods(args.density).items()}
    rng, batch = random.Random(0), (1, args.tokens)
    seconds: dict[str, list[float]] = {name: [] for name in built}
    for index in range(args.warmup + args.rounds):
        order = list(built)
        rng.shuffle(order)
        for name in order:
            taken = step(*built[name], batch)
            if index >= args.warmup:
                seconds[name].append(taken)
    for name, (model, _) in built.items():
        ratio, percentiles = spread(ratios(seconds[name], seconds["frozen"]))
        yield row(name, batch, seconds[name], ratio, percentiles, trainable(model))


def one_by_one(args: argparse.Namespace) -> Iterator[dict]:
    """One model; the frozen pass around every method."""
    base = build(args)
    batches = [tuple(map(int, batch.split("x"))) for batch in args.batches or default_batches(args.device)]
    before = {batch: timed(base, None, batch, args) for batch in batches}
    for batch, taken in before.items():
        yield row("frozen", batch, taken["seconds"], 1.0, [1.0, 1.0], 0, taken["memory"], taken["reason"])
    fitting = [batch for batch in batches if before[batch]["reason"] is None]
    for name, method in large_methods().items():
        model, optimizer = method.start(base)
        count = trainable(model)
        mine = {batch: timed(model, optimizer, batch, args, method.autocast) for batch in fitting}
        del optimizer
        base = stripped(model)
        after = {batch: timed(base, None, batch, args) for batch in fitting}
        for batch in fitting:
            taken, frozen = mine[batch], before[batch]["seconds"] + after[batch]["seconds"]
            ratio, percentiles = None, None
            if taken["seconds"] and frozen:
                ratio, percentiles = spread([seconds / statistics.median(frozen) for seconds in taken["seconds"]])
            yield row(name, batch, taken["seconds"], ratio, percentiles, count, taken["memory"], taken["reason"])
        before = after


def default_batches(device: str) -> list[str]:
    """Where 16 sequences are likely not to fit beside an adapter, 8 as well."""
    small = device == "cuda" and torch.cuda.get_device_properties(0).total_memory < 100 << 30
    return ["16x512", "8x512", "1x2048"] if small else ["16x512", "1x2048"]


def timed(model, optimizer, batch: Batch, args: argparse.Namespace, autocast: bool = False) -> dict:
    """Seconds of each round, the peak of the GPU's memory in bytes, and the reason where it does not fit."""
    on_gpu, reason, seconds = args.device == "cuda", None, []
    release()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    try:
        for index in range(args.warmup + args.rounds):
            taken = step(model, optimizer, batch, autocast)
            if index >= args.warmup:
                seconds.append(taken)
    except torch.OutOfMemoryError:
        reason = (
            f"does not fit in the memory of this GPU ({torch.cuda.get_device_properties(0).total_memory >> 30} GiB)"
        )
        seconds = []
        model.zero_grad(set_to_none=True)
    memory = torch.cuda.max_memory_allocated() if on_gpu and reason is None else None
    release()
    return {"seconds": seconds, "memory": memory, "reason": reason}


def stripped(model: torch.nn.Module) -> LlamaForCausalLM:
    """The base model, frozen, with everything of the method gone."""
    base = model.unload() if hasattr(model, "peft_config") else model
    if hasattr(base, "peft_config"):
        del base.peft_config
    base.zero_grad(set_to_none=True)
    return base.requires_grad_(False).train()


def release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def row(name, batch, seconds, ratio, percentiles, count, memory=None, reason=None) -> dict:
    return {
        "method": name,
        "batch": f"{batch[0]}x{batch[1]}",
        "median_seconds": statistics.median(seconds) if seconds else None,
        "ratio": ratio if seconds else None,
        "ratio_p20_p80": percentiles if seconds else None,
        "trainable": count,
        "peak_memory_bytes": memory,
        "reason": reason,
    }


def line(row: dict) -> str:
    head = f"{row['method']:30s} {row['batch']:>7s}"
    if row["reason"]:
        return f"{head} {row['reason']}"
    low, high = row["ratio_p20_p80"]
    memory = f"{row['peak_memory_bytes'] / 2**30:7.2f} GiB" if row["peak_memory_bytes"] else f"{'-':>11s}"
    times = f"{duration(row['median_seconds']):>9s} {row['ratio']:9.3f}  {low:5.3f} - {high:5.3f}"
    return f"{head} {times} {row['trainable']:13,d} {memory}"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="small", choices=["small", "llama-3-8b"])
    parser.add_argument("--device", choices=["cpu", "cuda"], help="small: cpu; llama-3-8b: the GPU where there is one")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="small: float32; llama-3-8b: bfloat16")
    parser.add_argument("--layers", type=int, help="small: 4; llama-3-8b: 32")
    parser.add_argument("--hidden", type=int, default=1024, help="small")
    parser.add_argument("--tokens", type=int, default=512, help="small")
    parser.add_argument("--density", type=float, default=0.0084, help="small")
    parser.add_argument("--shrink", type=int, default=1, help="llama-3-8b: divide every width, for a dry run")
    parser.add_argument("--batches", nargs="+", help="llama-3-8b: 16x512 1x2048")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write the result as JSON, row by row")
    args = parser.parse_args()
    large = args.model == "llama-3-8b"
    args.device = args.device or ("cuda" if large and torch.cuda.is_available() else "cpu")
    args.dtype = args.dtype or ("bfloat16" if large else "float32")
    return args


def main() -> None:
    args = arguments()
    settings = {key: value for key, value in vars(args).items() if key != "out"}
    result = {**record(args.device), "settings": settings, "rows": []}
    print(
        f"{'method':30s} {'batch':>7s} {'time':>9s} {'x frozen':>9s}  {'p20 - p80':>13s} {'trainable':>13s} "
        f"{'peak memory':>11s}"
    )
    for measured in (one_by_one if args.model == "llama-3-8b" else side_by_side)(args):
        result["rows"].append(measured)
        print(line(measured), flush=True)
        if args.out:
            args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
