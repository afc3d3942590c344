"""What a message says, and whether it contributes to the loss."""

from collections.abc import Mapping
from typing import Any

from engine.errors import DataError

REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
"""Names a message's reasoning is given under; templates read the first two."""

LOSS_FLAGS = ("weight", "train", "loss")
"""Names of a message's say in whether it contributes to the loss."""


MOST_WEIGHT = 1000.0
"""The largest factor of a row's or a message's loss."""


class ConversationError(DataError):
    """One conversation does not fit the chat template or its limits; others may."""


class LimitError(ConversationError):
    """The template was stopped at one of its limits."""


def contributes_to_loss(message: Mapping[str, Any]) -> bool:
    """Whether a message contributes to the loss.

    An assistant's does, unless it says `weight: 0`, `train: false` or `loss: false`. Another weight
    is how much its tokens count (`loss_weight`).
    """
    return message["role"] == "assistant" and loss_flag(message) is not False


def loss_flag(message: Mapping[str, Any]) -> bool | None:
    """What a message says about its loss, or None where it says nothing.

    Raises:
        ConversationError: it says something other than yes or no, or both.
    """
    given: dict[str, bool] = {}
    for key in LOSS_FLAGS:
        value = message.get(key)
        if value is None:
            continue
        if key == "weight" and not isinstance(value, bool):
            given[key] = checked_weight(value, "'weight'") > 0
            continue
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise ConversationError(f"'{key}' is {value!r} where true, false, 1 or 0 was expected")
        given[key] = bool(value)
    if len(set(given.values())) > 1:
        said = " and ".join(f"'{key}' {value}" for key, value in given.items())
        raise ConversationError(f"{said}, which contradict each other; keep one of them")
    return next(iter(given.values()), None)


def loss_weight(message: Mapping[str, Any]) -> float:
    """How much a message that contributes counts: its `weight`, or 1."""
    value = message.get("weight")
    return 1.0 if value is None else float(value)


def checked_weight(value: Any, what: str) -> float:
    """A factor of a loss. Raises `ConversationError` for what is none; `what` names it there."""
    if not isinstance(value, bool | int | float) or not 0 <= value <= MOST_WEIGHT:
        raise ConversationError(
            f"{what} is {value!r} where a number from 0 to {MOST_WEIGHT:g} was expected"
        )
    return float(value)


def has_text(content: Any) -> bool:
    """Whether a message's content, text or a list of parts, says anything."""
    return bool(content.strip()) if isinstance(content, str) else bool(content)
