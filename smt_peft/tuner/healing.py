"""A module over weights that a swap, cut off by an interrupt, may have left written; see `ops.swap`."""

from __future__ import annotations

from typing import Any

from torch import nn


class HealingModule(nn.Module):
    """Puts the base back, by the `heal` of the class it joins, before weights are read, replaced or moved whole."""

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        self.heal()
        return super().state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.heal()
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, *args: Any, **kwargs: Any) -> HealingModule:
        self.heal()
        return super()._apply(*args, **kwargs)

    def __repr__(self) -> str:
        return "smt." + super().__repr__()
