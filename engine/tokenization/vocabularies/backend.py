"""Open a tokenizer.json, and tell the library's faults in one named error."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from tokenizers import Tokenizer as Backend

from engine.errors import CheckpointError

log = logging.getLogger(__name__)

_LONGEST_TOKEN = 10_000
_PROBE = "a b\n"
_MOST_GROWTH = 1_000
"""Characters that a normalizer may make of `_PROBE`; real ones add one or two."""


@contextmanager
def library_faults(where: str, part: str = "tokenizer") -> Iterator[None]:
    """Around calls of `tokenizers`: what it cannot do raises `CheckpointError` that names `where`.

    It raises bare exceptions, and where it panics one that no `except Exception` stops.
    """
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(
            f"{where}: its {part} cannot be used ({str(error)[:300]}). Fetch the tokenizer's "
            "files again, or install the `tokenizers` release that wrote them."
        ) from error


def open_backend(serialised: str, where: str) -> Backend:
    """The tokenizer of a tokenizer.json, which gives one text the same ids every time.

    Raises `CheckpointError` for one that is damaged, or built to take hours.
    """
    with library_faults(where, "tokenizer.json"):
        backend = Backend.from_str(serialised)
        _refuse_growth(backend, where)
    model = backend.model
    if getattr(model, "dropout", None):
        log.warning(
            "%s: its tokenizer leaves out merges at random (dropout %g); that is switched off, so "
            "that equal runs read equal rows.", where, model.dropout,
        )  # fmt: skip
        model.dropout = None
        backend.model = model
    return backend


def _refuse_growth(backend: Backend, where: str) -> None:
    longest = max((len(t.content) for t in backend.get_added_tokens_decoder().values()), default=0)
    if longest > _LONGEST_TOKEN:
        raise CheckpointError(
            f"{where}: its tokenizer has an added token of {longest} characters; the longest that "
            f"is read has {_LONGEST_TOKEN}. No model has such a token; take another tokenizer."
        )
    normalizer = backend.normalizer
    grown = len(normalizer.normalize_str(_PROBE)) if normalizer is not None else 0
    if grown > _MOST_GROWTH:
        raise CheckpointError(
            f"{where}: the normalizer of its tokenizer makes {grown} characters of "
            f"{len(_PROBE)}. No model has such a tokenizer; take another one."
        )
