"""What a run says of the model, the batch and the loss that are to be counted."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig

from ..training.errors import ConfigError
from ..training.model import Head
from .activations import Loss, model_loss
from .device import Device
from .methods import empty
from .packed import Packing, pack
from .setting import Setting, from_environment

if TYPE_CHECKING:
    from ..training.yaml.schema import Run

_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def setting_of(
    run: Run, device: str | None = None, processes: int | None = None, sharded: bool | None = None
) -> tuple[Setting, list[str]]:
    """The setting of a run, and what it assumes; arguments as in `plan`."""
    if processes is not None and processes < 1:
        raise ConfigError(f"--processes must be at least 1, got {processes}")
    trainer, assumed = run.trainer, []
    here = "cuda" if torch.cuda.is_available() and not run.resolved.get("use_cpu") else "cpu"
    device = device or here
    half = next((dtype for key, dtype in _HALF.items() if getattr(trainer, key)), None)
    if device == "cuda" and here == "cpu" and run.resolved.get("bf16") is None and half is None:
        # What the trainer does where there is a GPU.
        half = torch.bfloat16
    started, shared, partitioned = from_environment()
    tokens = trainer.max_length
    if tokens is None:
        tokens = getattr(model_config(run), "max_position_embeddings", 2048)
        assumed.append(f"max_length is null: rows of the {tokens} tokens that the model can take")
    if device == "cuda":
        assumed.append("CUDA context and cuBLAS workspace: what they usually are; they cannot be counted beforehand")
    setting = Setting(
        Device(device, half),
        trainer.per_device_train_batch_size,
        tokens,
        run.resolved.get("optim") or getattr(trainer.optim, "value", trainer.optim),
        bool(trainer.gradient_checkpointing),
        trainer.gradient_accumulation_steps,
        _packing(run),
        processes or started,
        shared if sharded is None else sharded,
        partitioned,
        run.config.task,
    )
    if setting.task == "dpo":
        assumed.append("preferences: both answers of every row, each of as many tokens")
    if setting.shares:
        assumed.append("sharded: everything in equal parts, one layer at work, the next gathered ahead")
    assumed.append("full batches without padding; Python, libraries and the data loader are not counted")
    return setting, assumed


def model_config(run: Run) -> PretrainedConfig:
    name = run.config.model_name_or_path
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"model_name_or_path: the config of {name} cannot be read: {error}") from error


def base(run: Run, setting: Setting) -> nn.Module:
    """The base model of a run on the meta device, packed as the setting says."""
    config = model_config(run)
    dtype = run.config.dtype or ("float32" if setting.device.type == "cpu" else "auto")
    dtype = (config.dtype or torch.float32) if dtype == "auto" else getattr(torch, dtype)
    try:
        model = empty(lambda: Head(run.smt.task_type).auto_class.from_config(config, dtype=dtype))
    except ValueError as error:
        raise ConfigError(f"model_name_or_path: {error}") from error
    return model if setting.packing is None else pack(model, setting.packing)


def _packing(run: Run) -> Packing | None:
    config = run.config
    if config.load_in_8bit:
        return Packing("int8", 8)
    return Packing(config.bnb_4bit_quant_type, 4, config.bnb_4bit_use_double_quant) if config.load_in_4bit else None


def trainer_loss(model: nn.Module) -> Loss:
    """The loss as TRL's trainer computes it: where it has one, by its head that never holds all logits at once."""
    head = getattr(import_module("trl.trainer.utils"), "add_fused_lm_head", None)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if head is None or base.get_output_embeddings() is None:
        return model_loss
    head(
        base,
        outputs=("log_probs", "entropy", "is_top1"),
    )

    def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        output = model(**batch, use_cache=False, fused_lm_head=True)
        return -output.log_probs.sum() / output.label_mask.sum().clamp(min=1)

    return loss
