"""Open a tokenizer.json, and tell the library's faults in one named error."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from tokenizers import Tokenizer as Backend

from engine.errors import CheckpointError
from engine.tokenization.vocabularies.limits import refuse_long_tokens

log = logging.getLogger(__name__)


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
    refuse_long_tokens(serialised, where)
    with library_faults(where, "tokenizer.json"):
        backend = Backend.from_str(serialised)
    model = backend.model
    if getattr(model, "dropout", None):
        log.warning(
            "%s: its tokenizer leaves out merges at random (dropout %g); that is switched off, so "
            "that equal runs read equal rows.", where, model.dropout,
        )  # fmt: skip
        model.dropout = None
        backend.model = model
    return backend
