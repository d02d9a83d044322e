"""Where backward ends: the gradient of a model's input, which nobody reads."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


def end_above_input(model: nn.Module) -> RemovableHandle | None:
    """Let backward end above the lowest layer that trains, also where trainers have asked for the input's gradient.

    PEFT, TRL and Transformers ask for it (`enable_input_require_grads`) whenever activations are checkpointed, as
    reentrant checkpoints need it. Others do not, and with it every layer keeps its input, is recomputed, and hands down
    a gradient, whether it trains or not.

    Returns:
        What takes this back; None where the embedding trains, where checkpoints are reentrant, and in models that
        do not name their embedding.
    """
    try:
        embedding = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    if embedding is None or any(map(_checkpoints_reentrantly, model.modules())):
        return None
    if any(parameter.requires_grad for parameter in embedding.parameters()):
        return None
    return embedding.register_forward_hook(_detached)


def _detached(module: nn.Module, args: tuple, output: Any) -> Any:
    # The patches of some images come with their number, of which no trainer can ask for a gradient.
    return output.detach() if isinstance(output, Tensor) else output


def _checkpoints_reentrantly(module: nn.Module) -> bool:
    if not getattr(module, "gradient_checkpointing", False):
        return False
    # Transformers binds the keywords that PyTorch's `checkpoint` gets.
    function = getattr(module, "_gradient_checkpointing_func", None)
    return getattr(function, "keywords", {}).get("use_reentrant", True)
