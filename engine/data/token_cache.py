"""Rows that were tokenised once, stored under everything that decides their tokens.

The key is a SHA-256 of the rows themselves, the tokenizer, the chat template (with the date, where
it writes one), all settings, and the source code that does the work. A file is the key, the counts
and the arrays behind each other, closed by a SHA-256 of all that: one that is damaged, or was made
of anything else, is as if it were not there.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path

import numpy as np

from engine.data.example_report import ExampleReport
from engine.data.examples import Example, ExampleSettings
from engine.data.rows import Row
from engine.errors import CheckpointError
from engine.storage import durable, names, strict_json
from engine.storage.cache_folder import cache_folder, keep_newest
from engine.storage.home import expanded
from engine.storage.safe_files import open_regular
from engine.tokenization.tokenizer import Tokenizer

log = logging.getLogger(__name__)

WORTH_IT = 1 << 20
"""Characters of rows from which on they are stored, where it is left to the engine."""

_MOST_FILES = 16
_DIGEST = 32
Tokenised = tuple[list[Example], ExampleReport]


def cache_of(setting: str, rows: Sequence[Row]) -> Path | None:
    """The folder of tokenised rows, by `--token-cache`; None where they are not to be stored."""
    if setting == "none":
        return None
    if setting != "auto":
        return expanded(setting)
    return cache_folder("tokens") if _characters(rows) >= WORTH_IT else None


def _characters(rows: Sequence[Row]) -> int:
    return sum(
        len(row.text or "") + sum(len(str(m.get("content") or "")) for m in row.messages)
        for row in rows
    )


def key_of(rows: Sequence[Row], tokenizer: Tokenizer, how: ExampleSettings) -> str:
    """What the tokens of these rows depend on, as 64 hexadecimal digits."""
    template = tokenizer.chat_template
    facts = {
        "code": _code(),
        "tokenizer": tokenizer.serialised(),
        "special": tokenizer.special_tokens,
        "around": [tokenizer.prefix_ids, tokenizer.suffix_ids],
        "template": template.sources,
        "now": template.now if template.reads_clock else None,
        "settings": asdict(how),
    }
    digest = hashlib.sha256(_json(facts))
    for row in rows:
        ids = None if row.ids is None else [row.ids.ids, row.ids.trained]
        weight = [] if row.weight is None else [row.weight]
        digest.update(_json([row.source, row.messages, row.tools, row.text, ids, *weight]))
    return digest.hexdigest()


def read_tokens(folder: Path, key: str) -> Tokenised | None:
    """What was stored under a key, or None."""
    path = folder / f"{key}.tokens"
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            data = file.read()
    except (CheckpointError, OSError):
        return None
    body = memoryview(data)[:-_DIGEST]
    try:
        if len(data) < _DIGEST or hashlib.sha256(body).digest() != data[-_DIGEST:]:
            raise ValueError("its digest is another")
        tokenised = _parsed(data[: data.find(b"\n")], body, key)
    except (ValueError, KeyError, TypeError, IndexError, OverflowError) as error:
        log.warning("%s is damaged (%s); the rows are tokenised again", path, error)
        return None
    if tokenised is not None:
        log.info("%d examples come from the token cache: %s", len(tokenised[0]), path)
    return tokenised


def _parsed(head: bytes, body: memoryview, key: str) -> Tokenised | None:
    """The content of a file; None of one that is of another key. Raises built-in exceptions."""
    header = strict_json.loads(head.decode())
    if header["key"] != key:
        return None
    rest = body[len(head) + 1 :]
    count, tokens = header["examples"], header["tokens"]
    lengths = np.frombuffer(rest[: 4 * count], dtype="<i4")
    ids = np.frombuffer(rest[4 * count : 4 * (count + tokens)], dtype="<i4")
    marks = 4 * (count + tokens)
    bits = np.frombuffer(rest[marks : marks + -(-tokens // 8)], dtype=np.uint8)
    mask = np.unpackbits(bits, count=tokens).astype(np.bool_)
    weights = np.frombuffer(rest[marks + -(-tokens // 8) :], dtype="<f4")
    weighted = iter(np.split(weights, np.cumsum([lengths[i] for i in header["weighted"]])))
    known = dict(zip(header["weighted"], weighted, strict=False))
    ends = np.cumsum(lengths)
    examples = [
        Example(ids[end - length : end], mask[end - length : end], source, known.get(index))
        for index, (end, length, source) in enumerate(
            zip(ends, lengths, header["sources"], strict=True)
        )
    ]
    return examples, ExampleReport(**header["report"])


def write_tokens(folder: Path, key: str, tokenised: Tokenised) -> None:
    """Store examples under a key. A disk that refuses is a warning: they are made again then."""
    examples, report = tokenised
    header = {
        "key": key,
        "examples": len(examples),
        "tokens": sum(map(len, examples)),
        "sources": [example.source for example in examples],
        "weighted": [index for index, e in enumerate(examples) if e.weights is not None],
        "report": asdict(report),
    }
    lengths = np.array([len(example) for example in examples], dtype="<i4")
    ids = np.concatenate([e.ids for e in examples] or [np.zeros(0, dtype=np.int32)]).astype("<i4")
    mask = np.concatenate([e.mask for e in examples] or [np.zeros(0, dtype=np.bool_)])
    none = [np.zeros(0, dtype=np.float32)]
    weights = np.concatenate([e.weights for e in examples if e.weights is not None] or none)
    digest = hashlib.sha256()
    try:
        names.mkdir(folder, parents=True, exist_ok=True)
        with durable.replacing(folder / f"{key}.tokens") as out:
            for part in (
                _json(header) + b"\n",
                lengths,
                ids,
                np.packbits(mask),
                weights.astype("<f4"),
            ):
                data = part if isinstance(part, bytes) else part.tobytes()
                digest.update(data)
                out.write(data)
            out.write(digest.digest())
        keep_newest(folder, ".tokens", _MOST_FILES)
    except (OSError, CheckpointError) as error:
        log.warning("The token cache in %s was not written: %s", folder, error)


@cache
def _code() -> str:
    """A digest of the source code that turns rows into tokens, and of the library that encodes."""
    import tokenizers

    root = Path(__file__).parent.parent
    digest = hashlib.sha256(tokenizers.__version__.encode())
    for part in ("data", "tokenization"):
        for path in sorted((root / part).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, ensure_ascii=True).encode()
