"""`SMTModel`: puts SMT layers over the targets of a model, as every tuner of PEFT does for its method."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.quantization_utils import get_quantization_kwargs
from torch import Tensor, nn

from ..bases.fingerprint import fingerprint
from ..bases.packed import format_of, is_packed, quantization_of, unpacked_numel
from ..bases.repacking import keep_exact, let_repack
from ..bases.sharded import full_numel, is_offloaded, is_partitioned, plain_name, present, why_absent
from ..bases.targets import DEFAULT_TARGETS
from ..config import SMTConfig
from ..say import say
from .combination import check_combination, combined_config, weighted_sum
from .delta import SMTBlocks
from .embedding import Embedding
from .engines import PlainNames, gather_blocks
from .experts import ParameterLayer, ParamWrapper, check_rows
from .layer import SMTLayer
from .linear import Linear
from .low_rank import LowRank
from .plan import Plan, check_base, make_plan
from .quantised import QuantisedLinear, tell_rounding


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
    # `requires_grad` of the parameters before the adapter that is being loaded was put in.
    _before_loading: dict[str, bool] = {}

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Put an adapter into the model, or leave model and config as they were."""
        config = self.peft_config[adapter_name]
        config.reopen()
        targets = config.target_modules
        before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except Exception:
            take_out(model, adapter_name, before)
            config.reopen()
            config.target_modules = targets
            raise
        finally:
            config.plan = None
        keep_exact(model)
        # PEFT has resolved "all-linear" into names by now.
        config.filled_in["target_modules"] = targets, config.target_modules
        if config.awaits_weights:
            self._before_loading = before
        padding = sum(blocks.padding() for blocks in _blocks_of(model, adapter_name).values())
        if padding:
            say(
                f"{padding:,} stored entries are padding of blocks at ragged edges: they stay zero and are no "
                "parameters, though print_trainable_parameters counts them"
            )

    def _prepare_adapter_config(self, peft_config: SMTConfig, model_config: dict) -> SMTConfig:
        if peft_config.target_modules is None and peft_config.target_parameters:
            return peft_config
        return super()._prepare_adapter_config(peft_config, model_config)

    def _prepare_model(self, peft_config: SMTConfig, model: nn.Module) -> None:
        """Settle every block before the first layer is touched."""
        plan = make_plan(model, peft_config)
        quantization = peft_config.base_quantization if peft_config.awaits_weights else quantization_of(model)
        peft_config.fill_in(
            block_pattern=plan.block_pattern(),
            base_fingerprint=plan.base_fingerprint,
            base_quantization=quantization,
        )
        modules = {name: module for name, module in model.named_modules() if name in plan.selection.blocks}
        if any(is_packed(module) and not isinstance(module, nn.Linear) for module in modules.values()):
            # PEFT's own "all-linear" would pass over quantised layers that are no `nn.Linear`.
            peft_config.target_modules = {
                name for name, module in modules.items() if not isinstance(module, ParameterLayer)
            }
        peft_config.plan = plan

    @staticmethod
    def _check_target_module_exists(peft_config: SMTConfig, key: str) -> Any:
        """Modules without a chosen block are not wrapped at all."""
        matched = BaseTuner._check_target_module_exists(peft_config, key)
        if not matched or not peft_config.block_pattern:
            return matched
        # Where PEFT injects by a state dict it hands over the names of a compiled model without their prefix.
        return key in peft_config.block_pattern or f"_orig_mod.{key}" in peft_config.block_pattern

    def _create_and_replace(
        self,
        peft_config: SMTConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
        **_: Any,
    ) -> None:
        plan: Plan = peft_config.plan
        if parameter_name is not None and current_key not in plan.selection.blocks:
            # PEFT goes by the names alone: without a chosen block, or outside layers_to_transform.
            return
        grid, num_blocks, index = plan.entry(current_key)
        inference_mode = getattr(peft_config, "inference_mode", False)
        if parameter_name is not None:
            wrapper = parent if isinstance(parent, ParamWrapper) else target
            if not isinstance(wrapper, ParamWrapper):
                wrapper = ParamWrapper(target)
                self._replace_module(parent, target_name, wrapper, target)
            target = wrapper.layer(parameter_name, current_key, self.active_adapters)
        if isinstance(target, SMTLayer):
            target.update_layer(adapter_name, grid, num_blocks, index, peft_config, inference_mode)
            return
        layer = self._new_layer(target, current_key)
        layer.set_adapter(self.active_adapters)
        layer.update_layer(adapter_name, grid, num_blocks, index, peft_config, inference_mode)
        if isinstance(parent, nn.TransformerEncoderLayer):
            # In evaluation its fused path would read the weight past the adapter; any hook switches that path off.
            layer.register_forward_pre_hook(_no_fused_path)
        self._replace_module(parent, target_name, layer, target)

    def _new_layer(self, target: nn.Module, name: str) -> SMTLayer:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if isinstance(base, nn.Embedding):
            return Embedding(target, name)
        if format_of(base) is None:
            return Linear(target, name)
        return QuantisedLinear(target, name, get_quantization_kwargs(self.model).get("get_apply_tensor_subclass"))

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if hasattr(new_module, "base_layer"):
            if is_offloaded(new_module.get_base_layer()) or _awaits_values(new_module):
                # PEFT would send the blocks to where the weight is between calls: the meta device; or, of an 8-bit
                # layer of bitsandbytes, blocks without values from there.
                setattr(parent, child_name, new_module)
            else:
                super()._replace_module(parent, child_name, new_module, child)
        else:
            # Unloading: the module goes back as it is. PEFT would copy the wrapper's weight into it, which is no
            # Parameter where token rows are trained.
            setattr(parent, child_name, new_module)

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "linear"
    ) -> None:
        """Add an adapter whose delta is the weighted sum of those of others: exact, over the union of their blocks.

        The new adapter is neither active nor trainable, and is saved and loaded like any other. Adapters of different
        block sizes are combined in the largest blocks that tile all of them.

        Args:
            adapters: names of adapters of this model.
            weights: one finite factor for each, also negative.
            adapter_name: name of the new adapter.
            combination_type: `"linear"`, the weighted sum.

        Raises:
            ValueError: an adapter is missing or trains more than blocks, a weight is not finite, the name is taken, or
                another `combination_type` is asked for. Nothing has been added then.
        """
        check_combination(self.peft_config, adapters, weights, adapter_name, combination_type)
        sums = {}
        for layer in _layers_of(self.model):
            pairs = zip(adapters, weights, strict=True)
            if parts := [(layer.smt_blocks[name], factor) for name, factor in pairs if name in layer.smt_blocks]:
                sums[layer.smt_name] = weighted_sum(parts)
        grids = {name: grid for name, (grid, _, _) in sums.items()}
        blocks = {name: index.cpu() for name, (_, index, _) in sums.items()}
        bare = {layer.smt_name for layer in _layers_of(self.model) if isinstance(layer, ParameterLayer)}
        self.peft_config[adapter_name] = combined_config(self.peft_config[adapters[0]], grids, blocks, bare)
        try:
            self.inject_adapter(self.model, adapter_name)
        except Exception:
            del self.peft_config[adapter_name]
            raise
        with torch.no_grad():
            for layer in _layers_of(self.model):
                if layer.smt_name in sums:
                    # PEFT makes new adapters in the dtype of the base.
                    layer.smt_blocks[adapter_name].float().weight.copy_(sums[layer.smt_name][2])
        for module in _blocks_of(self.model, adapter_name).values():
            module.requires_grad_(False)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        self._check_merge(safe_merge, adapter_names)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)
        tell_rounding(_layers_of(self.model))

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        layers = _layers_of(self.model)
        if merge:
            self._check_merge(safe_merge, adapter_names)
        for layer in layers:
            layer.heal()
            if not merge and layer.merged:
                layer.unmerge()
        model = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        tell_rounding(layers)
        let_repack(model)
        return model

    def _check_merge(self, safe_merge: bool, adapter_names: list[str] | None) -> None:
        """Look at every layer before the first is written; layers that share a weight keep one record of merges."""
        records: dict[int, list] = {}
        for layer in _layers_of(self.model):
            with present(layer.get_base_layer()) if is_offloaded(layer.get_base_layer()) else nullcontext():
                layer.check_merge(adapter_names, safe_merge)
            record = records.setdefault(id(layer.stored_weight()), layer._merges)
            if layer._merges is not record:
                record.extend(layer._merges)
                layer._merges = record

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hands `adapter_names`, one per row of the batch, to every SMT layer for the length of one call."""
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        layers = _layers_of(self.model)
        check_rows(layers, adapter_names)
        known = {name for layer in layers for name in layer.smt_blocks} | {"__base__"}
        unknown = sorted(set(adapter_names) - known)
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
        wrappers = [m for m in self.modules() if isinstance(m, (AuxiliaryTrainingWrapper, ParamWrapper))]
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
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: SMTConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """Tensors to save; the config saved beside them is brought in line, as it may serve several models."""
        layers = {layer.smt_name: layer for layer in _layers_of(model) if adapter_name in layer.smt_blocks}
        blocks = {name: layer.smt_blocks[adapter_name] for name, layer in layers.items()}
        config.block_pattern = {name: list(module.shape) for name, module in blocks.items()}
        # Of a base that cannot be read now, what was read when the adapter was put in still holds.
        if not any(layer.merged or why_absent(layer.stored_weight()) for layer in layers.values()):
            config.base_fingerprint = fingerprint({name: layer.evidence() for name, layer in layers.items()})
            config.base_quantization = quantization_of(model)
        _unmerge_tables(model, state_dict)
        tensors = super()._get_adapter_state_dict(
            PlainNames(model), config, adapter_name, state_dict, unwanted_adapter_names
        )
        return gather_blocks(tensors, _saved_of(model, adapter_name))

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: SMTConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Map checkpoint keys to model keys, and check every tensor before the first is copied.

        Raises:
            ValueError: an index or a weight is damaged or belongs to another model; names the module. An adapter that
                was being added is taken out again.
        """
        remapped = super()._remap_adapter_state_dict_for_load(PlainNames(model), config, adapter_name, state_dict)
        saved = _saved_of(model, adapter_name)
        try:
            _check_file(remapped, saved)
            # An adapter that was never trained does no harm on any base: its blocks and its lora_B are zero.
            if any(bool(remapped[f"{name}.{module.starts_at_zero}"].any()) for name, module in saved.items()):
                check_base(
                    config, {layer.smt_name: layer.evidence() for layer in _layers_of(model) if not layer.merged}
                )
        except ValueError:
            tuner = getattr(model, "base_model", None)
            if config.awaits_weights and isinstance(tuner, SMTModel):
                take_out(tuner.model, adapter_name, tuner._before_loading)
                model.peft_config.pop(adapter_name)
                if not model.peft_config:
                    del tuner.model.peft_config
            raise
        config.awaits_weights = False
        return remapped

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Trainable weights and all weights, the padding of ragged blocks not counted (PEFT's own count has it in)."""
        padding = sum(
            module.padding()
            for module in self.model.modules()
            if isinstance(module, SMTBlocks) and module.weight.requires_grad
        )
        trainable = sum(full_numel(p) for p in self.model.parameters() if p.requires_grad)
        everything = sum(full_numel(p) if is_partitioned(p) else unpacked_numel(p) for p in self.model.parameters())
        return trainable - padding, everything - padding


def take_out(model: nn.Module, adapter_name: str, requires_grad: dict[str, bool]) -> None:
    """Undo the injection of an adapter: its layers, its wrappers, and the flags of the parameters that were there."""
    # Inner modules first: what is left of a wrapper shows only then.
    for name, module in reversed(list(model.named_modules())):
        if isinstance(module, ParamWrapper):
            wrapped, left = module.base_layer, module.take_out(adapter_name)
        elif isinstance(module, ParameterLayer):
            continue
        elif isinstance(module, SMTLayer):
            module.delete_adapter(adapter_name)
            wrapped, left = module.base_layer, module.smt_blocks
        elif isinstance(module, AuxiliaryTrainingWrapper):
            module.delete_adapter(adapter_name, [other for other in module.active_adapters if other != adapter_name])
            wrapped, left = module.original_module, module._adapters
        else:
            continue
        if not left:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, wrapped)
    for name, parameter in model.named_parameters():
        if name in requires_grad:
            parameter.requires_grad_(requires_grad[name])


def _layers_of(model: nn.Module) -> list[SMTLayer]:
    return [module for module in model.modules() if isinstance(module, SMTLayer)]


def _blocks_of(model: nn.Module, adapter_name: str) -> dict[str, SMTBlocks]:
    named = ((plain_name(name), module) for name, module in model.named_modules())
    return {
        name: module
        for name, module in named
        if isinstance(module, SMTBlocks) and name.endswith(f"smt_blocks.{adapter_name}")
    }


def _saved_of(model: nn.Module, adapter_name: str) -> dict[str, SMTBlocks | LowRank]:
    """What an adapter saves: its blocks and its low-rank pairs, by the prefix of their keys."""
    named = ((plain_name(name), module) for name, module in model.named_modules())
    return {
        name: module
        for name, module in named
        if isinstance(module, (SMTBlocks, LowRank)) and name.endswith(f"{module.kind}.{adapter_name}")
    }


def _awaits_values(module: nn.Module) -> bool:
    """Whether blocks are on the meta device until their file is read (`low_cpu_mem_usage`)."""
    return any(blocks.weight.is_meta for blocks in module.modules() if isinstance(blocks, SMTBlocks))


def _unmerge_tables(model: nn.Module, state_dict: dict[str, Tensor]) -> None:
    """PEFT saves targeted embeddings whole, beside the blocks: without what is merged, or it would count twice."""
    merged = {id(layer.stored_weight()): layer for layer in _layers_of(model) if layer._merges}
    if not merged or not hasattr(model, "get_input_embeddings"):
        return
    tables = model.get_input_embeddings(), model.get_output_embeddings()
    tables = [table.get_base_layer() if isinstance(table, SMTLayer) else table for table in tables]
    for name, module in model.named_modules():
        key = f"{plain_name(name)}.weight"
        if key in state_dict and any(module is table for table in tables) and id(module.weight) in merged:
            state_dict[key] = merged[id(module.weight)].unmerged_weight().to(state_dict[key])


def _check_file(tensors: dict[str, Tensor], saved: dict[str, SMTBlocks | LowRank]) -> None:
    for name, module in saved.items():
        module.check_loaded(*(tensors.get(f"{name}.{part}") for part in module.parts))
    known = {f"{name}.{part}" for name, module in saved.items() for part in module.parts}
    if extra := [key for key in tensors if ".smt_blocks." in key and key not in known]:
        raise ValueError(
            f"{extra[0].split('.smt_blocks.')[0]}: the adapter file has blocks for this module, but block_pattern in "
            "adapter_config.json does not name it, or the model has no such target; restore the config, or load the "
            "adapter on its own base"
        )
    if extra := [key for key in tensors if ".smt_low_rank." in key and key not in known]:
        raise ValueError(
            f"{extra[0].split('.smt_low_rank.')[0]}: the adapter file has a low-rank pair for this module, but "
            "adapter_config.json has no lora_rank, or does not name the module; restore the config, or save the "
            "adapter again"
        )


def _no_fused_path(module: nn.Module, args: tuple) -> None:
    """Does nothing; see `_create_and_replace`."""
