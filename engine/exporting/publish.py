"""Send a result to the hub, without the paths of this machine.

What is sent is chosen by name, so a folder's checkpoints, logs, rows and summaries stay here. Paths
in its JSON files and its README become the name that others know a model by: the hub id, or the
last part.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

from engine.config.publishing import Publishing
from engine.exporting.model_page import model_page
from engine.hub.upload import Destination, require_destination, upload
from engine.model_sources.adapter.config import public_name
from engine.model_sources.pruning_record import FORMAT, PRUNING, sealed
from engine.model_sources.vocabulary.folder import TOKENIZER_FILES
from engine.storage.home import expanded
from engine.storage.safe_files import MIB, read_json_object, read_regular, read_text

_PAGE = "README.md"
_OUR_JSON = ("config.json", "generation_config.json", "adapter_config.json", "base.json", PRUNING)
_TOKENIZER_PATHS = ("name_or_path", "tokenizer_file", "special_tokens_map_file", "vocab_file")
_WEIGHTS = re.compile(
    r"(adapter_)?model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
    r"|adapter_model\.bin|pytorch_model.*\.(bin|bin\.index\.json)"
)
_TEMPLATE = re.compile(r"additional_chat_templates/[\w.\-]+\.jinja")


def destination(settings: Publishing) -> Destination | None:
    """Where the settings send a result; None for nowhere. Asks the hub whether it takes it.

    Raises `ConfigError` where it would not.
    """
    if settings.push_to_hub is None:
        return None
    where = Destination(settings.push_to_hub, settings.private, settings.commit_message)
    require_destination(where)
    return where


def publish_folder(where: Destination | None, folder: Path, base: str | None = None) -> str | None:
    """Send the model or adapter in `folder`; returns the commit's address, None for nowhere.

    `base` names the model that it was made from, for a folder without a README. Raises
    `ConfigError`.
    """
    if where is None:
        return None
    files: dict[str, bytes | Path] = {}
    for path in sorted(file for file in folder.rglob("*") if file.is_file()):
        name = path.relative_to(folder).as_posix()
        if name in _OUR_JSON or name == "tokenizer_config.json":
            files[name] = _public_json(path)
        elif name == _PAGE:
            files[name] = without_paths(read_text(path, MIB), folder).encode()
        elif name in TOKENIZER_FILES or _TEMPLATE.fullmatch(name):
            files[name] = read_regular(path, 256 * MIB)
        elif _WEIGHTS.fullmatch(name) and not name.endswith(".bin"):
            files[name] = path
    if _PAGE not in files:
        files[_PAGE] = model_page(where.repository, base and public_name(base)).encode()
    return upload(where, files, lambda name: _WEIGHTS.fullmatch(name) is not None, folder)


def publish_gguf(where: Destination | None, files: Iterable[Path], base: str) -> str | None:
    """Send GGUF files, and a Modelfile among them; as `publish_folder`."""
    if where is None:
        return None
    paths = list(files)
    sent: dict[str, bytes | Path] = {path.name: path for path in paths}
    page = model_page(where.repository, public_name(base), gguf=paths[0].name)
    sent[_PAGE] = page.encode()
    return upload(where, sent, lambda name: False, paths[0].parent)


def _public_json(path: Path) -> bytes:
    """A JSON file without paths of this machine; byte by byte as it is where it has none."""
    value = read_json_object(path)
    if path.name == "tokenizer_config.json":
        # Its other strings are tokens, of which "/" and the like are no paths.
        cleaned = {
            key: _public_value(item) if key in _TOKENIZER_PATHS else item
            for key, item in value.items()
        }
    else:
        cleaned = _public_value(value)
        if path.name == PRUNING and cleaned != value and cleaned.get("format") == FORMAT:
            cleaned = sealed(cleaned)
    if cleaned == value:
        return read_regular(path, 256 * MIB)
    return (json.dumps(cleaned, indent=2, ensure_ascii=False) + "\n").encode()


def _public_value(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _public_value(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_public_value(item) for item in value]
    if isinstance(value, str) and _is_local(value):
        return public_name(str(expanded(value).absolute()))
    return value


def _is_local(text: str) -> bool:
    """Whether a string is an absolute path, or one that leads out of this folder."""
    return text.startswith(("/", "~/", "./", "../")) or PureWindowsPath(text).drive != ""


def without_paths(text: str, folder: Path) -> str:
    """`text` with every path below this machine's own folders replaced by its last part."""
    own = {Path.home(), Path.cwd(), Path(tempfile.gettempdir()), folder.absolute().parent}
    for root in sorted(map(str, own), key=len, reverse=True):
        if len(root) > 1:
            below = re.compile(re.escape(root) + r"(/[^\s`\"'<>|)]*)?")
            text = below.sub(lambda match: public_name(match[0]), text)
    return text
