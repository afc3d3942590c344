"""Errors a user can act on.

Every message is one paragraph that says what was found, where (file, line and column where there
are any), what was expected and what to do. The command line prints that paragraph and exits with
status 2; the traceback goes to the run's log only.
"""

import re
from collections.abc import Iterable

_LONGEST = 2000
_NOTE = 40
"""Room for the number of characters that are left out."""


_FULL = ("CUBLAS_STATUS_ALLOC_FAILED", "out of memory", "can't allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was refused: by torch, by a library of the GPU's, or by Python itself."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _FULL)


def printable(text: str, longest: int = _LONGEST) -> str:
    """`text` as it can be shown on any terminal: odd characters escaped, the middle cut out.

    What comes from a file or a name may hold escape sequences, which a terminal would obey.
    """
    text = _cut(text, longest)
    if text.isprintable():
        return text
    shown = "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)
    return _cut(shown, longest)  # an escape is longer than what it stands for


def _cut(text: str, longest: int) -> str:
    """`text` with at most `longest` characters, those in the middle counted in place of shown."""
    if len(text) <= longest:
        return text
    half = max(longest - _NOTE, 0) // 2
    return f"{text[:half]} [... {len(text) - 2 * half} characters ...] {text[len(text) - half :]}"


_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def without_controls(text: str) -> str:
    """`text` with the characters escaped that move a terminal's cursor or turn its text around."""
    return _CONTROLS.sub(lambda match: ascii(match.group())[1:-1], text)


class EngineError(Exception):
    """Base of every error that `engine` raises on purpose; its message can always be shown."""

    def __init__(self, *values: object) -> None:
        super().__init__(*(printable(v) if isinstance(v, str) else v for v in values))


class ConfigError(EngineError):
    """An option, a configuration file or a model's config.json cannot be used."""


class CheckpointError(EngineError):
    """A model, adapter or training checkpoint is damaged, incomplete or does not match."""


class DataError(EngineError):
    """A data set cannot be read, or holds nothing that can be trained on."""


class GroupError(EngineError):
    """Another process of the group ended, or did not answer in time."""


class MemoryPlanError(EngineError):
    """A run does not fit in the memory it was given."""


_LISTED = 16
_LISTED_LENGTH = 500


def listing(items: Iterable[str]) -> str:
    """`items` in one line for a message, with the number of those left out.

    Of many, or long ones, the first sixteen are in it, or as many as 500 characters hold.
    """
    names = [printable(item, _LISTED_LENGTH // 2) for item in items]
    names = [name if name.isprintable() else ascii(name)[1:-1] for name in names]
    shown, length = 0, 0
    for name in names[:_LISTED]:
        length += len(name) + 2
        if shown and length > _LISTED_LENGTH:
            break
        shown += 1
    rest = f", and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + rest


def gib(size: float) -> str:
    """Bytes as people read them."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(size) >= factor:
            return f"{size / factor:.2f} {unit}"
    return f"{size:.0f} B"
