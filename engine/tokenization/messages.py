"""What a message says, and whether it contributes to the loss."""

from collections.abc import Mapping
from typing import Any

from engine.errors import DataError

REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
"""Names a message's reasoning is given under; templates read the first two."""


class ConversationError(DataError):
    """One conversation does not fit the chat template or its limits; others may."""


def contributes_to_loss(message: Mapping[str, Any]) -> bool:
    """Whether a message contributes to the loss.

    An assistant's does, unless it says `weight: 0` or `train: false`.
    """
    if message["role"] != "assistant":
        return False
    return message.get("weight", 1) != 0 and message.get("train", True) is not False


def has_text(content: Any) -> bool:
    """Whether a message's content, text or a list of parts, says anything."""
    return bool(content.strip()) if isinstance(content, str) else bool(content)
