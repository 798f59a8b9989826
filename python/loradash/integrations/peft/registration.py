"""PEFT's enum of methods is closed: here it gets one more member."""

from __future__ import annotations

from typing import Any

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import register_peft_method

NAME = "LORADASH"


def _member() -> PeftType:
    """`PeftType.LORADASH`, made where it is not yet: by name, by value, in iteration and in pickles it is like the others."""
    known: Any = PeftType._member_map_.get(NAME)
    if known is not None:
        return known
    member: Any = str.__new__(PeftType, NAME)
    member._name_, member._value_, member.__objclass__ = NAME, NAME, PeftType
    member._sort_order_ = len(PeftType._member_names_)
    PeftType._member_names_.append(NAME)
    PeftType._member_map_[NAME] = member
    PeftType._value2member_map_[NAME] = member
    # Python 3.12 finds members as attributes of the class; the enum's own way of setting them is for its construction.
    type.__setattr__(PeftType, NAME, member)
    return member


PEFT_TYPE = _member()


def register(config_cls: type, model_cls: type) -> None:
    """Tells PEFT which classes are LORADASH's; again: no effect. Raises ImportError where somebody else has the name."""
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(PEFT_TYPE)
    if known is None:
        register_peft_method(name=NAME.lower(), config_cls=config_cls, model_cls=model_cls, prefix="lora_")
    elif known.__module__ != config_cls.__module__:
        raise ImportError(f"peft has a method {NAME} already, from {known.__module__}; one of the two must go")
    else:
        PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = config_cls
        PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = model_cls
