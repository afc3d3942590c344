"""Every file of JSON goes through the strict reader, and no odd one ends in a raw exception."""

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.config.tasks.gates import GateSettings
from engine.data.origins import manifest_path, stale
from engine.data.streaming.line_index import index_lines
from engine.data.token_cache import read_tokens
from engine.errors import EngineError
from engine.gates.checkers import make_checker
from engine.gates.verdict import read_earlier
from engine.runs.identity import tokenizer_digest

ROOT = Path(__file__).parents[3]
ODD = {
    "deep": b"[" * 100_000,
    "deep object": b'{"a":' * 100_000,
    "digits": b'{"figures": {"a": ' + b"9" * 5000 + b"}}",
    "nan": b'{"figures": {"a": NaN}}',
    "list": b"[1, 2]",
    "number": b"7",
    "null": b"null",
    "twice": b'{"figures": {}, "figures": {"a": 1}}',
    "not text": b"\xff\xfe",
    "surrogate": b'{"figures": {"\\ud800": 1}}',
    "nothing": b"",
    "huge": b'{"figures": {"a": 1}}' + b" " * (5 << 20),
}
OWN_OUTPUT = {
    "engine/storage/strict_json.py",
    "engine/tokenization/sandbox.py",
    "engine/tokenization/sandbox_worker.py",
    "engine/tokenization/vocabularies/tokenizer_process.py",  # and of its own process
    "engine/patterns.py",  # what it says to the process that matches, and hears from it
    "engine/tokenization/vocabularies/limits.py",  # guarded, and what `tokenizers` says of itself
    "engine/gates/code_worker.py",  # reads its parent; the child's answer is guarded
    "engine/selfcheck/isolation.py",
    "engine/forging/stages.py",  # of what it has just written
    "engine/data/streaming/indexed_rows.py",  # lines that `converted` has just written
    "engine/exporting/gguf_vocabulary.py",  # what the library `tokenizers` says of itself
    "engine/model_sources/gguf/longest_match.py",
    "engine/runs/metrics.py",  # guarded line by line, 1e999 among them
    "engine/monitoring/metrics_tail.py",
    "engine/distributed/check_group.py",
    "engine/distributed/launch.py",  # what processes of one run tell each other
    "engine/training/processes/together.py",
    "engine/verbs/training/train.py",
    "engine/verbs/worker.py",
}


def test_nothing_else_reads_json_loosely() -> None:
    loose = re.compile(r"(?<![\w.])json\.loads?\(")
    files = [path for part in ("engine", "cli") for path in (ROOT / part).rglob("*.py")]
    readers = {str(path.relative_to(ROOT)) for path in files if loose.search(path.read_text())}
    assert readers <= OWN_OUTPUT, "read files with engine.storage.safe_files.read_json_object"


def schema(path: Path) -> None:
    make_checker(GateSettings.model_construct(checker="json-schema", schema_file=path))


def token_cache(path: Path) -> None:
    body = path.read_bytes() + b"\nrest"
    (path.parent / "k.tokens").write_bytes(body + hashlib.sha256(body).digest())
    assert read_tokens(path.parent, "k") is None


def line_index(path: Path) -> None:
    rows = path.parent / "rows.jsonl"
    rows.write_bytes(b'{"a": 1}\n')
    index = index_lines(rows, path.parent / "index").index
    index.write_bytes(path.read_bytes()[:4096].ljust(4096) + bytes(16))
    assert index_lines(rows, path.parent / "index").count == 1


def origins(path: Path) -> None:
    rows = path.parent / "rows.jsonl"
    rows.write_bytes(b"{}\n")
    manifest_path(rows).write_bytes(path.read_bytes())
    assert "cannot be read" in "".join(stale(rows))


READERS: dict[str, Callable[[Path], Any]] = {
    "schema": schema,
    "earlier": read_earlier,
    "token cache": token_cache,
    "line index": line_index,
    "origins": origins,
    "tokenizer": lambda path: tokenizer_digest({"tokenizer_config.json": path.read_bytes()}),
}
NO_FAULT = {("tokenizer", "huge")}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", ODD)
def test_an_odd_file_is_named_or_as_if_it_were_not_there(
    reader: str, kind: str, tmp_path: Path
) -> None:
    path = tmp_path / "odd.json"
    path.write_bytes(ODD[kind])
    if reader in ("token cache", "line index", "origins") or (reader, kind) in NO_FAULT:
        READERS[reader](path)
        return
    with pytest.raises(EngineError) as caught:
        READERS[reader](path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000
