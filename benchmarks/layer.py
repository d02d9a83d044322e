"""Forward and backward of one linear layer under SMT, LoRA, DoRA and full training, as a ratio to the frozen layer.

The frozen layer is its forward and the gradient of its input: two GEMMs that no method can leave out. All methods wrap
copies of one layer through PEFT's `get_peft_model` and take turns in a shuffled order; ratios are taken within a round.
LoRA is measured with adapters in bf16, and with PEFT's default of fp32 adapters under autocast, as the Trainer of
Transformers runs them. SMT's output is first compared with the frozen layer's: with blocks at zero, bit for bit.

    python benchmarks/layer.py                                       # 11008 x 4096, 8192 tokens, bf16, on a GPU
    python benchmarks/layer.py --device cpu --shape 512 512 --tokens 256 --dtype float32
"""

from __future__ import annotations

import argparse
import contextlib
import json
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from smt_peft import SMTConfig
from smt_peft.bench.environment import record
from smt_peft.bench.measure import Budget, Route, ratios, rotation, spread, time_routes
from smt_peft.bench.table import duration


class Layer(nn.Module):
    def __init__(self, shape: tuple[int, int], device: torch.device, dtype: torch.dtype):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(shape[1], shape[0], bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def configs(shape: tuple[int, int]) -> dict[str, object]:
    """Per method its PEFT config; None for the frozen layer, `"full"` for training the whole weight."""
    smt = {"target_modules": ["linear"], "score": "random"}
    clustered = {"block_size": min(256, min(shape) // 4), "spread": "free"}
    lora = partial(LoraConfig, target_modules=["linear"])
    return {
        "frozen": None,
        "smt clustered, 0.84 %": SMTConfig(**smt, **clustered, density=0.0084),
        "smt matched, 0.84 %": SMTConfig(**smt, density=0.0084),
        "smt clustered, 4.9 %": SMTConfig(**smt, **clustered, density=0.049),
        "smt matched, 4.9 %": SMTConfig(**smt, density=0.049),
        "lora r16": lora(r=16, lora_alpha=32),
        "lora r64": lora(r=64, lora_alpha=128),
        "lora r16, fp32 adapters": lora(r=16, lora_alpha=32),
        "lora r64, fp32 adapters": lora(r=64, lora_alpha=128),
        "dora r16": lora(r=16, lora_alpha=32, use_dora=True),
        "full": "full",
    }


def build(name: str, config: object, args: argparse.Namespace) -> nn.Module:
    layer = Layer(args.shape, args.device, args.dtype).requires_grad_(config == "full")
    if config is None or config == "full":
        return layer
    return get_peft_model(layer, config, autocast_adapter_dtype=name.endswith("fp32 adapters")).train()


def step(x: Tensor, dy: Tensor, model: nn.Module, autocast: bool) -> None:
    x = x.detach().requires_grad_()
    for parameter in model.parameters():
        parameter.grad = None
    with torch.autocast(x.device.type, torch.bfloat16) if autocast else contextlib.nullcontext():
        y = model(x)
    y.backward(dy)


def measure(args: argparse.Namespace) -> dict[str, dict]:
    x = torch.randn(args.tokens, args.shape[1], device=args.device).to(args.dtype)
    dy = torch.randn(args.tokens, args.shape[0], device=args.device).to(args.dtype)
    models, rows = {}, {}
    for name, config in configs(args.shape).items():
        if name.endswith("fp32 adapters") and args.dtype == torch.float32:
            rows[name] = {"reason": "the layer is in fp32 itself"}
            continue
        models[name] = build(name, config, args)
        if name.startswith("smt") and not torch.equal(models[name](x), models["frozen"](x)):
            rows[name] = {"reason": "WRONG, not timed: with blocks at zero the output is not the frozen layer's"}
            del models[name]
    routes = {n: Route(partial(step, model=m, autocast=n.endswith("fp32 adapters"))) for n, m in models.items()}
    facts = record(args.device)["device"]
    budget = Budget(args.rounds, 4 << 30 if args.device.type == "cuda" else 1 << 28, facts["cache_bytes"])
    seconds, host = time_routes(routes, rotation((x, dy), x.nbytes + dy.nbytes, budget), args.rounds)
    for name, model in models.items():
        median, percentiles = spread(seconds[name])
        ratio, ratio_percentiles = spread(ratios(seconds[name], seconds["frozen"]))
        rows[name] = {
            "seconds": median,
            "seconds_p20_p80": percentiles,
            "host_seconds": host[name],
            "ratio": ratio,
            "ratio_p20_p80": ratio_percentiles,
            "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        }
    return rows


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=2, default=(11008, 4096), metavar=("OUT", "IN"))
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    args = parser.parse_args()
    args.shape, args.dtype, args.device = tuple(args.shape), getattr(torch, args.dtype), torch.device(args.device)
    return args


def main() -> None:
    args = arguments()
    rows = measure(args)
    rows_out, columns = f"{args.shape[0]} x {args.shape[1]}, {args.tokens} tokens", "seconds   x frozen"
    print(f"{rows_out:28s} {columns:>21s}  {'p20 - p80':>13s} {'trainable':>12s}")
    for name, row in rows.items():
        if "reason" in row:
            print(f"{name:28s} {row['reason']}")
            continue
        low, high = row["ratio_p20_p80"]
        figures = f"{duration(row['seconds']):>10s} {row['ratio']:10.3f}  {low:5.3f} - {high:5.3f}"
        print(f"{name:28s} {figures} {row['trainable']:12,d}")
    if args.out:
        settings = {key: value if isinstance(value, (int, tuple)) else str(value) for key, value in vars(args).items()}
        settings.pop("out")
        args.out.write_text(json.dumps({**record(args.device), "settings": settings, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
