"""What is compared: SMT and its rivals, each put on the same frozen model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from peft import LoraConfig, PeftConfig, ShiraConfig, get_peft_model
from torch import nn

from smt_peft import SMTConfig, select_blocks
from smt_peft.bases.targets import find_targets
from smt_peft.optim import SMTAdamW
from smt_peft.schedules import LayerSampling, Schedule

from . import released
from .model import Case
from .training import Note, Training

Targets = str | tuple[str, ...]


@dataclass(frozen=True)
class Method:
    """One way to train a frozen model.

    Args:
        put_on: takes the frozen model and returns it with something to train in it.
        optimizer: takes the trainable parameters; None: nothing is trained, and a step is the frozen pass.
        autocast: whether the pass runs under bf16 autocast.
        schedule: makes what decides which layers train; begun before the first step, and never asked again.
        build: makes the frozen model where it is not the one of all others.
    """

    put_on: Callable[[nn.Module], nn.Module]
    optimizer: Callable[..., torch.optim.Optimizer] | None = torch.optim.AdamW
    autocast: bool = False
    build: Callable[[], nn.Module] | None = None
    schedule: Callable[[], Schedule] | None = None

    def on(self, base: nn.Module) -> Training:
        model = self.put_on(base).train()
        if self.optimizer is None:
            return Training(model)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # Parameters of a GPU: one fused kernel instead of several.
        fused = {"fused": True} if self.optimizer is torch.optim.AdamW and trained[0].is_cuda else {}
        optimizer = self.optimizer(trained, lr=1e-4, **fused)
        if self.schedule is not None:
            self.schedule().begin(model, optimizer, 1)
        return Training(model, optimizer, self.autocast)

    def started(self, build: Callable[[], nn.Module], note: Note = lambda phase: None) -> Training:
        """On a model that is built for it; `note("method")` is called in between."""
        base = (self.build or build)()
        note("method")
        return self.on(base)


def frozen() -> Method:
    return Method(lambda base: base, optimizer=None)


def full() -> Method:
    return Method(lambda base: base.requires_grad_(True))


def adapter(config: PeftConfig, optimizer: Callable = torch.optim.AdamW, autocast: bool = False) -> Method:
    """Adapters in the dtype of the model, unless autocast is there to cast for them."""
    return Method(lambda base: get_peft_model(base, config, autocast_adapter_dtype=autocast), optimizer, autocast)


def smt_config(density: float, targets: Targets = "all-linear", **settings) -> SMTConfig:
    """Which blocks makes no difference to the cost, as long as they lie as chosen ones do; these need no data."""
    return SMTConfig(target_modules=_named(targets), score="random", density=density, **settings)


def smt(density: float, targets: Targets = "all-linear", optimizer: Callable = torch.optim.AdamW, **settings) -> Method:
    return adapter(smt_config(density, targets, **settings), optimizer)


def released_smt(density: float, targets: Targets = "all-linear", **settings) -> Method:
    """The released code's layer, on the blocks that `smt` has with the same arguments."""
    config = smt_config(density, targets, **settings)
    return Method(lambda base: released.put_on(base, select_blocks(base, config)))


def lora(rank: int, targets: Targets = "all-linear", autocast: bool = False, **settings) -> Method:
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=_named(targets), **settings)
    return adapter(config, autocast=autocast)


def shira(rank: int, targets: Targets = "all-linear") -> Method:
    """SHiRA (Bhardwaj et al., arXiv 2406.13175): as many single weights as LoRA of that rank has parameters."""
    return adapter(ShiraConfig(r=rank, target_modules=_named(targets), random_seed=0))


def equal_rank(base: nn.Module, density: float, targets: Targets = "all-linear") -> int:
    """The rank at which LoRA comes closest to training `density` of the targeted weights; at least 1."""
    per_rank = sum(sum(shape) for shape in _shapes(base, targets))
    return max(1, round(density * targeted(base, targets) / per_rank))


def targeted(base: nn.Module, targets: Targets = "all-linear") -> int:
    """How many weights an adapter on these targets chooses from or stands for."""
    return sum(rows * cols for rows, cols in _shapes(base, targets))


def _shapes(base: nn.Module, targets: Targets) -> list[tuple[int, int]]:
    return [target.shape for target in find_targets(base, smt_config(0.01, targets)).values()]


def small(case: Case) -> dict[str, Method]:
    """All methods."""
    put = partial(dict, density=case.density, targets=case.targets)
    clustered = large_blocks(case)
    rank = equal_rank(case.build(), case.density, case.targets)
    return {
        "frozen": frozen(),
        "smt matched": smt(**put()),
        "smt matched, SMTAdamW": smt(**put(), optimizer=SMTAdamW),
        "smt matched, additive": smt(**put(), forward="additive"),
        "smt matched, blocks of 32": smt(**put(), block_size=32),
        "smt clustered": smt(**put(), **clustered),
        "released, matched": released_smt(**put()),
        "released, clustered": released_smt(**put(), **clustered),
        f"lora r{rank}, equal parameters": lora(rank, case.targets),
        "lora r16": lora(16, case.targets),
        f"dora r{rank}, equal parameters": lora(rank, case.targets, use_dora=True),
        "dora r16": lora(16, case.targets, use_dora=True),
        f"shira r{rank}, equal parameters": shira(rank, case.targets),
        "full": full(),
    }


def in_turn(case: Case) -> dict[str, Method]:
    """One layer at a time: a step while the lowest of them trains, which takes most, and one while the highest does."""
    matched = smt(case.density, case.targets)

    def training(order: str) -> Method:
        return replace(matched, schedule=lambda: LayerSampling(layers=1, order=order))

    return {
        "frozen": frozen(),
        "smt matched": matched,
        "layers in turn, the lowest": training("ascending"),
        "layers in turn, the highest": training("descending"),
    }


def large_blocks(case: Case) -> dict[str, int | str]:
    """The pattern of the paper, its blocks smaller as the matrices are: 128 x 128, where they tile the weights.

    One budget for all matrices, as in the paper: one such block in each would come to more than a small density.
    """
    return {"block_size": min(128, case.hidden // 4), "spread": "free", "budget": "global"}


def large(side: int = 256) -> dict[str, Method]:
    """For Llama-3-8B's shape, the most telling first, as time may run out; `side` is that of clustered blocks."""
    clustered = {"block_size": side, "spread": "free", "budget": "global"}
    return {
        "smt matched, 0.84 %": smt(0.0084, optimizer=SMTAdamW),
        "lora r16": lora(16),
        f"smt clustered {side}, 0.84 %": smt(0.0084, optimizer=SMTAdamW, **clustered),
        "dora r16": lora(16, use_dora=True),
        "full": full(),
        f"released, clustered {side}, 0.84 %": released_smt(0.0084, **clustered),
        "lora r16, fp32 adapters": lora(16, autocast=True),
        f"smt clustered {side}, 4.9 %": smt(0.049, optimizer=SMTAdamW, **clustered),
        "lora r64": lora(64),
        "smt matched, torch AdamW": smt(0.0084),
        "shira r16": shira(16),
    }


def large_checkpointed(side: int = 256) -> dict[str, Method]:
    chosen = ("smt matched, 0.84 %", f"smt clustered {side}, 0.84 %", "lora r16")
    return {name: method for name, method in large(side).items() if name in chosen}


def _named(targets: Targets) -> str | list[str]:
    return targets if isinstance(targets, str) else list(targets)
