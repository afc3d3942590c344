"""Send files to a repository of the hub, in one commit.

Before the work begins the hub is asked whether it would take them; afterwards huggingface_hub sends
large files by its own means and makes the commit. The token is huggingface_hub's (HF_TOKEN, or what
`hf auth login` stored); it is never read here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from engine.errors import ConfigError
from engine.hub.failures import first_line, refusal
from engine.hub.names import HubName, hub_name

_TIMEOUT = 10.0
_PAGE = "README.md"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Destination:
    """Where a result goes: a repository, which is made if there is none, and the commit's words."""

    repository: str
    private: bool = False
    message: str | None = None


def require_destination(where: Destination) -> None:
    """Raise `ConfigError` unless the hub answers, knows the token, and may be written to.

    A repository that anybody may read is refused where a private one was asked for.
    """
    import huggingface_hub
    from huggingface_hub import constants

    name = hub_name(where.repository)
    if name is None or name.revision or name.file:
        raise ConfigError(
            f"--push-to-hub {where.repository!r} is no name of a repository; expected "
            "organisation/name, and no folder of this machine."
        )
    if constants.HF_HUB_OFFLINE:
        raise ConfigError(
            f"Nothing can be sent to {name}: HF_HUB_OFFLINE forbids it. Unset it, or leave out "
            "--push-to-hub."
        )
    if huggingface_hub.get_token() is None:
        raise ConfigError(
            f"Nothing can be sent to {name} without a token. Run `hf auth login`, or set HF_TOKEN "
            "to a token that may write; https://huggingface.co/settings/tokens makes one."
        )
    try:
        public = _is_public(name)
        huggingface_hub.HfApi().whoami()
    except Exception as error:  # the client's errors have no common base
        raise ConfigError(_refused(error, name)) from error
    if where.private and public:
        raise ConfigError(
            f"{name} exists and anybody may read it, and --private was asked for. Make it private "
            f"at {constants.ENDPOINT}/{name}/settings, or name another repository."
        )


def upload(
    where: Destination,
    files: Mapping[str, bytes | Path],
    replaces: Callable[[str], bool],
    local: Path,
) -> str:
    """Send `files`, by their paths in the repository; returns the address of the commit.

    Files of the repository that `replaces` names and that are not among `files` are deleted: older
    weights beside newer ones would be read. A README that stands there stays as it is. Raises
    `ConfigError`, which says that the result stands in `local`.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    name, api = HubName(where.repository), HfApi()
    try:
        api.create_repo(where.repository, private=where.private or None, exist_ok=True)
        info = api.model_info(where.repository, timeout=_TIMEOUT)
        before = {file.rfilename for file in info.siblings or []}
        if _PAGE in before:
            log.info("%s has a %s already, which stays", name, _PAGE)
        sent = {path: data for path, data in files.items() if path != _PAGE or path not in before}
        old = sorted(path for path in before - files.keys() if replaces(path))
        log.info("%s: %d files to send", name, len(sent))
        commit = api.create_commit(
            where.repository,
            [
                *(CommitOperationAdd(path, data) for path, data in sent.items()),
                *(CommitOperationDelete(path) for path in old),
            ],
            commit_message=where.message or "Upload with engine",
        )
    except Exception as error:
        raise ConfigError(
            f"{_refused(error, name)} The result stands in {local}. Send it with: hf upload "
            f"{name} {local} --exclude summary.json"
        ) from error
    return str(commit.commit_url)


def _is_public(name: HubName) -> bool:
    """Whether a repository is there and anybody may read it."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return HfApi().model_info(name.repository, timeout=_TIMEOUT).private is False
    except RepositoryNotFoundError:
        return False


def _refused(error: Exception, name: HubName) -> str:
    from huggingface_hub import constants

    return refusal(error, name, "write") or (
        f"Nothing could be sent to {name}: {constants.ENDPOINT} could not be reached "
        f"({first_line(error)})."
    )
