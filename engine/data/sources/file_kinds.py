"""What a data file is, by its content and its name."""

from __future__ import annotations

import csv
import re
from pathlib import Path

from engine.config.data_names import ROW_FIELDS
from engine.data.sources.streams.compressed import SUFFIXES as COMPRESSED

JSON, CSV, PARQUET, ARROW, TEXT = "JSON", "CSV", "Parquet", "Arrow", "text"
"""The kinds that are read."""

_MAGIC = (
    (b"PAR1", PARQUET),
    (b"ARROW1", ARROW),
    (b"FEA1", ARROW),
    (b"\xff\xff\xff\xff", ARROW),
    (b"PK\x03\x04", "ZIP"),
    (b"SQLite format 3\x00", "SQLite"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
    (b"version https://git-lfs", "Git LFS"),
    (b"<!DOCTYPE", "HTML"),
    (b"<html", "HTML"),
    (b"%PDF", "PDF"),
    (b"GGUF", "GGUF"),
)
_SUFFIXES = {
    ".csv": CSV, ".tsv": CSV, ".tab": CSV, ".txt": TEXT, ".text": TEXT, ".md": TEXT,
    ".markdown": TEXT, ".rst": TEXT, ".xlsx": "Excel", ".parquet": PARQUET, ".yaml": "YAML",
    ".yml": "YAML", ".toml": "TOML", ".py": "Python", ".xml": "XML", ".pkl": "pickle",
    ".pickle": "pickle", ".pt": "pickle", ".bin": "pickle", ".safetensors": "safetensors",
}  # fmt: skip
DATA_SUFFIXES = (".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".feather")
TEXT_SUFFIXES = (".txt", ".text", ".md", ".markdown", ".rst")
_JSON_HEAD = re.compile(rb'\s*(\[\s*(\{|\]|$)|\{\s*("|\}|$))')
_ADVICE = {
    "ZIP": "Unpack it (unzip '{path}') and name the data file inside",
    "Excel": (
        'Save it as CSV in UTF-8, or with pandas: python -c "import pandas; '
        "pandas.read_excel('{path}').to_csv('{new}', index=False)\""
    ),
    "SQLite": "Name it as a database, with a query: --data sqlite:///{path} --query 'SELECT ...'",
    "UTF-16": "Save it as UTF-8: iconv -f UTF-16 -t UTF-8 '{path}' > '{new}'",
    "Git LFS": "The file itself was not downloaded, only a pointer to it: git lfs pull",
    "HTML": "A web page was saved in the file's stead; download the raw file",
    "PDF": "Write its text into a .txt or .md file",
    "YAML": (
        "Settings belong to --config: --config '{path}'. Rows in YAML become JSON by: python -c "
        "\"import json, yaml; json.dump(yaml.safe_load(open('{path}')), open('{new}', 'w'))\""
    ),
    "TOML": "Settings are read from YAML (--config); write rows as JSON Lines, one object a line",
    "Python": (
        "A program prints its rows, one json.dumps(row) a line: python '{path}' > '{new}', or gives"
        " them to engine.train(TrainConfig(data=rows)). To train on code itself, make rows of it: "
        "engine data extract"
    ),
    "XML": "Write its rows as JSON Lines, one object a line",
    "pickle": "Pickles are never read, for they run code; write the rows as JSON Lines or Parquet",
    "safetensors": "It holds tensors: name the folder of a model with --model",
    "GGUF": "It holds a model: name it with --model",
}


def kind_of(path: Path, head: bytes) -> str:
    """The kind of a file: one of those above, or the name of one that is not read.

    Args:
        path: of the file; its suffix decides where the content does not.
        head: its first bytes, decompressed.
    """
    suffix = plain_suffix(path)
    for magic, kind in _MAGIC:
        if head.startswith(magic):
            return "Excel" if kind == "ZIP" and suffix == ".xlsx" else kind
    start = head.removeprefix(b"\xef\xbb\xbf")
    if _JSON_HEAD.match(start):
        return JSON
    named = _SUFFIXES.get(suffix)
    if named in (CSV, TEXT) and not start.strip():
        return JSON  # empty: the reader of JSON says so
    if named is not None:
        return named
    return CSV if suffix not in DATA_SUFFIXES and _is_header(start) else JSON


def plain_suffix(path: Path) -> str:
    """The suffix in lower case, without that of a compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    while suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def delimiter_of(path: Path, header: str) -> str:
    """What stands between the cells of a table, by its first line."""
    if plain_suffix(path) in (".tsv", ".tab") and "\t" in header:
        return "\t"
    outside = re.sub(r'"[^"]*"', "", header)
    return next((mark for mark in (",", ";", "\t", "|") if mark in outside), ",")


def _is_header(start: bytes) -> bool:
    """Whether a file without a telling name begins with columns that rows have."""
    try:
        line = start.splitlines()[0].decode() if start.strip() else ""
        cells = next(csv.reader([line], delimiter=delimiter_of(Path(), line)), [])
    except (UnicodeDecodeError, csv.Error, IndexError):
        return False
    usual = {*ROW_FIELDS, "question", "answer", "instruction", "output", "completion"}
    return len(cells) > 1 and bool(usual & {cell.strip().lower() for cell in cells})


def advice(path: Path, kind: str) -> str:
    """What to do with a file of a kind that is not read."""
    suffix = ".csv" if kind == "Excel" else ".jsonl"
    new = f"{path.stem.removesuffix('.jsonl')}.new{suffix}"
    return _ADVICE[kind].format(path=path, new=new)


def with_article(kind: str) -> str:
    """The kind with `a` or `an`, as it is spoken."""
    return f"{'an' if kind in ('Arrow', 'Excel', 'SQLite', 'HTML') else 'a'} {kind}"
