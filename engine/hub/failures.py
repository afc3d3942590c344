"""Explain what the hub, network or disk answered, in one paragraph."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

from engine.errors import ConfigError, EngineError
from engine.hub.names import HubName

_LONGEST = 200
_TRANSFER_STATUS = re.compile(r"HTTP status (?:client|server) error \((\d{3})\b")
"""How hf_xet, which moves large files for huggingface_hub, says what it was answered."""


@contextmanager
def explained(name: HubName) -> Iterator[None]:
    """Raise `ConfigError` in place of whatever fails inside, while `name` is downloaded."""
    from huggingface_hub import constants

    try:
        yield
    except EngineError:
        raise
    # The client, its transport and its storage have no common base of their errors.
    except Exception as error:
        text = refusal(error, name, "read") or (
            f"{str(name)!r} is no path on this machine, is not wholly in the cache "
            f"{constants.HF_HUB_CACHE}, and could not be downloaded from {constants.ENDPOINT} "
            f"({first_line(error)}). What has arrived stays and is not downloaded again. Fetch it "
            f"where the network allows, and it is used from the cache: {name.command()}"
        )
        raise ConfigError(text) from error


def refusal(error: Exception, name: HubName, may: str) -> str | None:
    """What the hub or the disk refused and what to do; None where nobody answered.

    `may` is what the token has to allow: read or write.
    """
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{'datasets/' if name.kind == 'dataset' else ''}{name.repository}"
    log_in = f"run `hf auth login`, or set HF_TOKEN to a token that may {may} it"
    if isinstance(error, errors.GatedRepoError):
        return (
            f"{name} is gated: its owners want their terms accepted first. Accept them at {page}, "
            f"then {log_in}. To try that alone: {name.command()}"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{name.repository} has no branch, tag or commit {name.revision or 'main'!r}."
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"The hub knows no {name.kind} {name.repository!r}, or it is private and may not be "
            f"read from here. Check the spelling; if it is private, {log_in}."
        )
    status = getattr(getattr(error, "response", None), "status_code", None)
    told = _TRANSFER_STATUS.search(str(error))
    if status is None and told is not None:  # the storage's client has no error for each status
        status = int(told[1])
    if status in (401, 403):
        return (
            f"The hub refuses {name} ({status}): the token is missing, has expired, or may not "
            f"{may} it. To change that, {log_in}."
        )
    if status is not None:
        later = " Try again later." if status == 429 or status >= 500 else ""
        return f"The hub answered {status} for {name} ({first_line(error)}).{later}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"The disk of the cache {constants.HF_HUB_CACHE} is full. Make room, or name a folder "
            "on another disk in HF_HOME."
        )
    return None


def first_line(error: Exception) -> str:
    """The first line of what `error` says, or its name where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:_LONGEST].rstrip(". ")
