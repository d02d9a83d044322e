"""`adapter: smt` for axolotl: name `smt_peft.integrations.axolotl.SMTPlugin` under `plugins:`.

axolotl asks a plugin for an adapter when the model has been loaded and the trainer has not been made. A warm-up needs
batches by then, so a trainer of axolotl's own making, which never trains, is asked for its data loader.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from axolotl.common.datasets import load_datasets
from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from axolotl.loaders import load_processor, load_tokenizer
from axolotl.utils.train import determine_last_checkpoint
from peft import PeftConfig, PeftModel
from pydantic import BaseModel, Field, model_validator
from torch import nn
from transformers import Trainer

from ..training.model import passes_as_adapted
from .settings import Settings

NAME = "smt"
# axolotl's keys that mean the same for every adapter, with ours; the `smt:` block goes before them.
_SHARED = {
    "lora_target_modules": "target_modules",
    "lora_exclude_modules": "exclude_modules",
    "lora_target_parameters": "target_parameters",
    "lora_modules_to_save": "modules_to_save",
    "peft_layers_to_transform": "layers_to_transform",
    "peft_layers_pattern": "layers_pattern",
    "peft_trainable_token_indices": "trainable_token_indices",
}


class SMTArgs(BaseModel):
    """The keys that the plugin adds to axolotl's."""

    smt: dict[str, Any] | None = Field(
        default=None,
        description="Fields of SMTConfig, and `selection` (`auto` or a file) and `warmup_batches`, for `adapter: smt`.",
    )

    @model_validator(mode="before")
    @classmethod
    def check_smt(cls, data: dict[str, Any]) -> dict[str, Any]:
        if data.get("adapter") != NAME:
            if data.get("smt") is not None:
                raise ValueError(f"smt: has an effect with `adapter: smt` only, and adapter is {data.get('adapter')!r}")
            return data
        settings = _settings(data)
        for key in ("lora_r", "lora_alpha"):
            if data.get(key) is not None:
                raise ValueError(f"{key} belongs to LoRA; the size of an SMT adapter is `smt: {{density: 0.01}}`")
        for key in ("load_in_4bit", "load_in_8bit"):
            # axolotl quantises for the adapters it knows, and would load whole floats without a word.
            if data.get(key):
                raise ValueError(
                    f"{key} is followed for `adapter: lora` and `qlora` only; quantise the base by "
                    "`overrides_of_model_kwargs: {quantization_config: {quant_method: bitsandbytes, "
                    f"{key}: true}}}}`"
                )
        if data.get("rl") and settings.need_batches:
            raise ValueError(
                f"rl: {data['rl']} has no batches that blocks can be chosen by; name a file in `smt: {{selection: "
                "...}` (`smt select` makes one), or a score without data, as `smt: {score: magnitude}`"
            )
        # The other way looks for LoRA's tensors, finds none, and writes the base unchanged.
        data["merge_method"] = "legacy"
        return data


class SMTPlugin(BasePlugin):
    """Chooses blocks by axolotl's own batches and hands the trainer the model with them."""

    def get_input_args(self) -> str:
        return f"{__name__}.{SMTArgs.__name__}"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        return [AdapterCapabilities(name=NAME)]

    def load_adapter(
        self, model: nn.Module, cfg: Any, inference: bool = False, config_only: bool = False
    ) -> tuple[nn.Module | None, PeftConfig] | None:
        """The model with its blocks, new ones or those of `lora_model_dir` or of the checkpoint to resume from."""
        if cfg.adapter != NAME:
            return None
        settings = _settings(cfg)
        if config_only:
            return None, settings.unchosen(_task_type(cfg))
        options = {}
        if cfg.peft_autocast_adapter_dtype is not None:
            options["autocast_adapter_dtype"] = cfg.peft_autocast_adapter_dtype
        if directory := cfg.lora_model_dir or determine_last_checkpoint(cfg):
            # The trainer reads a checkpoint's weights, but into blocks that must be the checkpoint's already.
            model = PeftModel.from_pretrained(model, directory, is_trainable=not inference, **options)
        else:
            loader = _Loader(model, cfg)
            model = settings.adapt(
                model, loader.batches, cfg.output_dir, task_type=_task_type(cfg), loss_fn=loader.loss, **options
            )
        model.print_trainable_parameters()
        return model, model.peft_config[model.active_adapter]


class _Loader:
    """What axolotl trains on and by."""

    def __init__(self, model: nn.Module, cfg: Any):
        self.model, self.cfg = model, cfg
        self.trainer: Trainer | None = None

    def batches(self) -> Any:
        from axolotl.utils.trainer import setup_trainer

        data = load_datasets(cfg=self.cfg)
        tokenizer = load_tokenizer(self.cfg)
        with passes_as_adapted(self.model):
            self.trainer = setup_trainer(
                cfg=self.cfg,
                train_dataset=data.train_dataset,
                eval_dataset=data.eval_dataset,
                model=self.model,
                tokenizer=tokenizer,
                processor=load_processor(self.cfg, tokenizer) if self.cfg.processor_type else None,
                total_num_steps=data.total_num_steps,
            )
        return self.trainer.get_train_dataloader()

    def loss(self, model: nn.Module, batch: Any) -> Any:
        return self.trainer.compute_loss(model, batch)


def _settings(cfg: Mapping[str, Any]) -> Settings:
    shared = {ours: cfg[theirs] for theirs, ours in _SHARED.items() if cfg.get(theirs)}
    block = cfg.get("smt") or {}
    return Settings.read({**shared, **block} if isinstance(block, Mapping) else block)


def _task_type(cfg: Any) -> str:
    return "SEQ_CLS" if cfg.reward_model else "TOKEN_CLS" if cfg.process_reward_model else "CAUSAL_LM"
