"""Data files that are not JSON, and what to do with them."""

from pathlib import Path

_PANDAS = (
    "python -c \"import pandas; pandas.{read}.to_json('{new}', orient='records', lines=True)\""
)
_READERS = {
    "Parquet": "read_parquet('{path}')",
    "CSV": "read_csv('{path}')",
    "TSV": "read_csv('{path}', sep='\\t')",
    "Excel": "read_excel('{path}')",
    "Arrow": "read_feather('{path}')",
    "Feather": "read_feather('{path}')",
}
_MAGIC = (
    (b"PAR1", "Parquet"),
    (b"ARROW1", "Arrow"),
    (b"FEA1", "Feather"),
    (b"PK\x03\x04", "ZIP"),
    (b"\x28\xb5\x2f\xfd", "Zstandard"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ\x00", "xz"),
    (b"SQLite format 3\x00", "SQLite"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
    (b"version https://git-lfs", "Git LFS"),
    (b"<!DOCTYPE", "HTML"),
    (b"<html", "HTML"),
    (b"%PDF", "PDF"),
)
_SUFFIXES = {".csv": "CSV", ".tsv": "TSV", ".xlsx": "Excel", ".parquet": "Parquet"}
_ADVICE = {
    "ZIP": "Unpack it (unzip '{path}') and name the data file inside",
    "Zstandard": "Decompress it: zstd -d '{path}'",
    "bzip2": "Decompress it: bunzip2 '{path}'",
    "xz": "Decompress it: unxz '{path}'",
    "SQLite": "Write its rows as JSON: sqlite3 -json '{path}' 'SELECT ...' > data.json",
    "UTF-16": "Save it as UTF-8: iconv -f UTF-16 -t UTF-8 '{path}' > '{new}'",
    "Git LFS": "The file itself was not downloaded, only a pointer to it: git lfs pull",
    "HTML": "A web page was saved in the file's stead; download the raw file",
    "PDF": "Write its text as rows of prompt and response",
    "text": (
        "A row says what is a prompt and what the response: write one JSON object a line, "
        '{{"prompt": "...", "response": "..."}}'
    ),
}


def foreign_kind(path: Path, head: bytes) -> str | None:
    """What a file is that is neither JSON nor JSON compressed with gzip, or None.

    Args:
        path: of the file.
        head: its first bytes, decompressed.
    """
    for magic, kind in _MAGIC:
        if head.startswith(magic):
            return "Excel" if kind == "ZIP" and path.suffix.lower() == ".xlsx" else kind
    if head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"{", b"["):
        return None
    if path.suffix.lower() in (".txt", ".md") and head.strip():
        return "text"
    return _SUFFIXES.get(path.suffix.lower())


def advice(path: Path, kind: str) -> str:
    """What to do with a file of a kind that is not read."""
    new = f"{path.stem.removesuffix('.jsonl')}.new.jsonl"
    if kind in _READERS:
        command = _PANDAS.format(read=_READERS[kind].format(path=path), new=new)
        return f"Turn it into JSON Lines, with pandas for instance: {command}"
    return _ADVICE[kind].format(path=path, new=new)


def with_article(kind: str) -> str:
    """The kind with `a` or `an`, as it is spoken."""
    return f"{'an' if kind in ('Arrow', 'Excel', 'SQLite', 'HTML', 'xz') else 'a'} {kind}"
