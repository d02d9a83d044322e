"""`--tuner_type smt` for ms-swift, by a file of the user's own that `--external_plugins` names:

```python
from smt_peft.integrations.ms_swift import register

register(density=0.01, warmup_batches=16)
```
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from peft import PeftModel
from swift.template import MaxLengthError
from swift.tuner_plugin import PeftTuner, tuners_map
from torch import Tensor, nn

from .settings import Settings

NAME = "smt"
# What ms-swift's collator adds for its own trainers, and models do not take.
_NOT_FOR_THE_MODEL = ("channel", "compute_loss_func", "loss_scale", "text_position_ids")


def register(**settings: Any) -> None:
    """Make `--tuner_type smt` known to ms-swift.

    Args:
        **settings: fields of `SMTConfig`, and `selection` (`"auto"` or a file) and `warmup_batches`. Where they do not
            say it, the flags of ms-swift do: `--target_modules`, `--target_regex`, `--target_parameters`,
            `--modules_to_save`.

    Raises:
        ValueError: as `Settings.read` does.
    """
    Settings.read(settings)
    tuners_map[NAME] = type("SMTTuner", (_SMTTuner,), {"settings": settings})


class _SMTTuner(PeftTuner):
    """Adapts a new model; saving, loading and resuming are ms-swift's own, for anything of PEFT."""

    settings: dict[str, Any] = {}

    @classmethod
    def prepare_model(cls, args: Any, model: nn.Module) -> PeftModel:
        settings = Settings.read({**_given_by_flags(args, model), **cls.settings})
        if settings.need_batches and (reason := _why_no_batches(args)):
            raise ValueError(
                f"{reason}, so blocks cannot be chosen by its batches; give register() a file as `selection` (`smt "
                "select` makes one), or a `score` without data, such as 'magnitude'"
            )
        return settings.adapt(
            model, lambda: _batches(args), args.output_dir, task_type=args.task_type.upper(), loss_fn=_loss
        )


def _given_by_flags(args: Any, model: nn.Module) -> dict[str, Any]:
    # At run time: ms-swift imports its plugins before its pipelines.
    from swift.pipelines.train.tuner import get_target_modules

    shared = {
        "target_modules": get_target_modules(args, model),
        "target_parameters": args.target_parameters,
        "modules_to_save": args.modules_to_save,
    }
    return {name: value for name, value in shared.items() if value}


def _why_no_batches(args: Any) -> str | None:
    if getattr(args, "rlhf_type", None):
        return f"rlhf_type={args.rlhf_type} does not train on labelled text"
    if args.task_type != "causal_lm":
        return f"task_type={args.task_type} has a loss of ms-swift's own"
    if args.model_meta.is_multimodal:
        return f"{args.model_type} embeds pictures and sounds inside ms-swift's trainer"
    return None if args.dataset else "the data come tokenised (--cached_dataset)"


def _batches(args: Any) -> Iterator[dict[str, Tensor]]:
    """This process's rows, as ms-swift reads, shuffles, encodes and pads them, but not packed."""
    template = args.get_template()
    template.set_mode("train")
    rows, _ = args.load_dataset()
    encoded = _encoded(template, islice(rows, max(args.rank, 0), None, args.global_world_size))
    while batch := list(islice(encoded, args.per_device_train_batch_size)):
        yield template.data_collator(batch)


def _encoded(template: Any, rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for row in rows:
        try:
            encoded = template.encode(row)
        except MaxLengthError:
            # The trainer leaves such rows out too.
            continue
        # A long row of pre-training is split into several.
        yield from encoded if isinstance(encoded, list) else [encoded]


def _loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**{name: value for name, value in batch.items() if name not in _NOT_FOR_THE_MODEL}).loss
