"""Makes `SMT` a tuner type of PEFT: the only file that touches PEFT's enum and its mappings.

PEFT's `PeftType` is a closed enum and has no plug-in hook, so the member is added the way `enum` itself stores one.
"""

from __future__ import annotations

from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType

NAME = "SMT"


def extend_peft_type() -> bool:
    """Add `PeftType.SMT`. Returns False, changing nothing, when the enum already has the name."""
    if NAME in PeftType.__members__:
        return False
    member = str.__new__(PeftType, NAME)
    member._name_ = member._value_ = NAME
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType.__members__)
    # EnumType.__setattr__ refuses new members, and on CPython >= 3.12 attribute look-up needs the class attribute.
    type.__setattr__(PeftType, NAME, member)
    PeftType._member_names_.append(NAME)
    PeftType._member_map_[NAME] = member
    PeftType._value2member_map_[NAME] = member
    if hasattr(PeftType, "_hashable_values_"):
        PeftType._hashable_values_.append(NAME)
    return True


def register() -> bool:
    """Register the tuner with PEFT; a second call, or a PEFT that ships its own `SMT`, changes nothing.

    Returns:
        True when this package's tuner serves `SMT`, False when PEFT's own does.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    extend_peft_type()
    from .config import SMTConfig
    from .tuner.model import SMTModel

    registered = PEFT_TYPE_TO_CONFIG_MAPPING.get(PeftType.SMT)
    if registered is None:
        register_peft_method(name="smt", config_cls=SMTConfig, model_cls=SMTModel)
        return True
    return registered is SMTConfig
