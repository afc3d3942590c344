"""`MANIFEST.json`: the file that makes a folder a whole checkpoint.

It holds the step and, for every other file of the folder, size and SHA-256; `self_sha256` covers
the manifest's own text with that one value left out. The text has to be exactly what `_text` makes
of its content, so that no byte of it can differ without being noticed.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

from engine.errors import CheckpointError
from engine.provenance import version
from engine.storage import durable
from engine.storage.safe_files import read_regular
from engine.storage.strict_json import parse_object

MANIFEST_NAME = "MANIFEST.json"
FORMAT_VERSION = 1
_LONGEST = 16 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")


def write_manifest(folder: Path, step: int, facts: Mapping[str, Any] | None = None) -> None:
    """Describe every file under `folder`; to be called when all of them are written.

    `facts` are further entries, of which the manifest's own digest is as well.
    """
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            files[name] = {"bytes": path.stat().st_size, "sha256": durable.sha256_file(path)}
    content = {
        "format_version": FORMAT_VERSION,
        "step": step,
        "engine_version": version(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "files": files,
    }
    content = {**(facts or {}), **content}
    content["self_sha256"] = _own_hash(content)
    durable.write_text(folder / MANIFEST_NAME, _text(content))


def read_manifest(folder: Path, step: int | None = None) -> dict[str, Any]:
    """The manifest of `folder`, itself verified, and that every file is there in its full size.

    Raises `CheckpointError`, also where it is of another step than `step`.
    """
    path = folder / MANIFEST_NAME
    try:
        text = read_regular(path, _LONGEST)
    except CheckpointError as error:
        raise CheckpointError(
            f"{folder} is no whole checkpoint: {MANIFEST_NAME} cannot be read: {error}"
        ) from None
    content = parse_object(text, str(path))
    _check_content(path, content, text)
    if step is not None and content["step"] != step:
        raise CheckpointError(f"{path} is of step {content['step']}, in a folder of step {step}.")
    for name, entry in content["files"].items():
        _check_size(folder / name, entry["bytes"])
    return content


def verify_files(folder: Path, manifest: dict[str, Any]) -> None:
    """Compare every file's SHA-256 with the manifest. Raises `CheckpointError` for the first."""
    for name, entry in manifest["files"].items():
        if durable.sha256_file(folder / name) != entry["sha256"]:
            raise CheckpointError(
                f"{folder / name} is damaged: its SHA-256 is not the one in {MANIFEST_NAME}."
            )


def _check_content(path: Path, content: dict[str, Any], text: bytes) -> None:
    if content.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} is not a manifest of format {FORMAT_VERSION}, the one this version reads."
        )
    files = content.get("files")
    sound = isinstance(content.get("step"), int) and isinstance(files, dict)
    if not sound or _own_hash(content) != content.get("self_sha256"):
        raise CheckpointError(f"{path} is damaged: its content does not match its own SHA-256.")
    if _text(content).encode() != text:
        raise CheckpointError(f"{path} is damaged: it is not written as this program writes it.")
    assert isinstance(files, dict)
    for name, entry in files.items():
        inside = PurePosixPath(name)
        plain = not inside.is_absolute() and ".." not in inside.parts
        sound = isinstance(entry, dict) and isinstance(entry.get("bytes"), int)
        if not plain or not sound or not _SHA256.fullmatch(str(entry.get("sha256"))):
            raise CheckpointError(f"{path} lists {name!r}, which no checkpoint holds.")


def _check_size(path: Path, size: int) -> None:
    try:
        actual = path.stat().st_size
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {durable.describe(error)}.") from None
    if actual != size:
        raise CheckpointError(f"{path} is damaged: it has {actual} bytes and should have {size}.")


def _own_hash(content: dict[str, Any]) -> str:
    rest = {key: value for key, value in content.items() if key != "self_sha256"}
    return hashlib.sha256(_text(rest).encode()).hexdigest()


def _text(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, sort_keys=True) + "\n"
