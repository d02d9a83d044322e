"""SMT as a tuner of PEFT: the model, the layers, and which forward a layer takes."""

from .hotswap import hotswap_adapter, make_room

__all__ = ["hotswap_adapter", "make_room"]
