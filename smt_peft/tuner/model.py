"""`SMTModel`: puts SMT layers over the targets of a model, as every tuner of PEFT does for its method."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..config import SMTConfig
from ..targets import DEFAULT_TARGETS
from .layer import Linear, SMTBlocks, SMTLayer
from .plan import Plan, check_base, make_plan


class SMTModel(BaseTuner):
    """A model whose targeted linear layers train blocks of their weights (SMT, arXiv 2405.15525).

    Args:
        model: the base model; its parameters are frozen.
        config: which blocks, see `SMTConfig`.
        adapter_name: name of the adapter.

    Example:
        >>> config = SMTConfig(target_modules="all-linear", density=0.01)
        >>> config.selection = select_blocks(model, config, dataloader, num_batches=64)
        >>> model = get_peft_model(model, config)
    """

    prefix = "smt_"
    tuner_layer_cls = SMTLayer
    target_module_mapping = DEFAULT_TARGETS

    def _prepare_model(self, peft_config: SMTConfig, model: nn.Module) -> None:
        """Settle every block before the first layer is touched, so that an error leaves the model as it was."""
        plan = make_plan(model, peft_config)
        peft_config.block_pattern = plan.block_pattern()
        peft_config.base_fingerprint = plan.base_fingerprint
        peft_config.attach_plan(plan)

    @staticmethod
    def _check_target_module_exists(peft_config: SMTConfig, key: str) -> Any:
        """Modules without a chosen block are not wrapped at all."""
        matched = BaseTuner._check_target_module_exists(peft_config, key)
        if not matched or not peft_config.block_pattern:
            return matched
        return key in peft_config.block_pattern or any(
            name.endswith("." + key) or key.endswith("." + name) for name in peft_config.block_pattern
        )

    def _create_and_replace(
        self,
        peft_config: SMTConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        plan: Plan = peft_config.plan
        grid, num_blocks, index = plan.entry(current_key)
        inference_mode = getattr(peft_config, "inference_mode", False)
        if isinstance(target, SMTLayer):
            target.update_layer(adapter_name, grid, num_blocks, index, peft_config, inference_mode)
            return
        layer = Linear(target, current_key)
        layer.set_adapter(self.active_adapters)
        layer.update_layer(adapter_name, grid, num_blocks, index, peft_config, inference_mode)
        if adapter_name not in self.active_adapters:
            # Adding an adapter that is not the active one must not make it train.
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hands `adapter_names`, one per row of the batch, to every SMT layer for the length of one call."""
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        layers = [module for module in self.modules() if isinstance(module, SMTLayer)]
        known = {name for layer in layers for name in layer.smt_blocks} | {"__base__"}
        unknown = sorted(set(adapter_names) - known)
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
        wrappers = [module for module in self.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
        handles = [
            module.register_forward_pre_hook(
                lambda _, args, kwargs: (args, {**kwargs, "adapter_names": adapter_names}), with_kwargs=True
            )
            for module in layers + wrappers
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: SMTConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Map checkpoint keys to model keys, and check every tensor before the first is copied.

        Raises:
            ValueError: an index or a weight is damaged or belongs to another model; names the module. An adapter that
                was being added is taken out again.
        """
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        blocks = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, SMTBlocks) and name.endswith(f".smt_blocks.{adapter_name}")
        }
        weights = {name: remapped.get(f"{name}.weight") for name in blocks}
        try:
            for name, module in blocks.items():
                module.check_loaded(weights[name], remapped.get(f"{name}.index"))
            # An adapter that was never trained does no harm on any base.
            if any(bool(weight.any()) for weight in weights.values()):
                check_base(
                    config,
                    {
                        layer.smt_name: layer.weight_view()
                        for layer in model.modules()
                        if isinstance(layer, SMTLayer) and not layer.merged
                    },
                )
        except ValueError:
            added_just_now = all(module.untouched for module in blocks.values())
            if added_just_now and len(model.peft_config) > 1 and hasattr(model, "delete_adapter"):
                model.delete_adapter(adapter_name)
            raise
        return remapped

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Trainable weights and all weights, the padding of ragged blocks not counted (PEFT's own count has it in)."""
        padding = sum(
            module.padding()
            for module in self.model.modules()
            if isinstance(module, SMTBlocks) and module.weight.requires_grad
        )
        trainable = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        return trainable - padding, sum(p.numel() for p in self.model.parameters()) - padding
