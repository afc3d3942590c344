"""The same rows in every format that is read, and databases that hold them."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import shutil
import socket
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.feather
import pyarrow.ipc
import pyarrow.parquet

Rows = list[dict[str, str]]
_USER = "postgres"


def question_rows(count: int) -> Rows:
    """Rows with quotes, line breaks, delimiters and other letters in them."""
    return [
        {
            "question": f'What is {n} + 1, "exactly";\tor nearly?{" é" * (n % 3)}',
            "answer": f"{n + 1}.\nThat is {n},1 - no: {n + 1} | ✓" if n % 2 else f"It is {n + 1}.",
        }
        for n in range(count)
    ]


def lines(rows: Rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def table(rows: Rows, delimiter: str) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def zstandard(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()  # type: ignore[no-any-return]


def write_parquet(path: Path, rows: Rows) -> None:
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=700)


def write_arrow(path: Path, rows: Rows) -> None:
    whole = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_file(sink, whole.schema) as writer:
        writer.write_table(whole, max_chunksize=900)


def write_stream(path: Path, rows: Rows) -> None:
    whole = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, whole.schema) as writer:
        writer.write_table(whole)


def write_feather(path: Path, rows: Rows) -> None:
    pyarrow.feather.write_feather(pa.Table.from_pylist(rows), path)


def write_sqlite(path: Path, rows: Rows) -> None:
    with sqlite3.connect(path) as base:
        base.execute("create table asked (id integer primary key, question text, answer text)")
        values = [(row["question"], row["answer"]) for row in rows]
        base.executemany("insert into asked (question, answer) values (?, ?)", values)
    base.close()


def _bytes(make: Callable[[Rows], bytes]) -> Callable[[Path, Rows], None]:
    return lambda path, rows: void(path.write_bytes(make(rows)))


def void(_: object) -> None:
    """Nothing, of whatever was done."""


WRITERS: dict[str, Callable[[Path, Rows], None]] = {
    "d.jsonl": _bytes(lines),
    "d.json": _bytes(lambda rows: json.dumps(rows, indent=1).encode()),
    "wrapped.json": _bytes(lambda rows: json.dumps({"data": rows}).encode()),
    "d.jsonl.gz": _bytes(lambda rows: gzip.compress(lines(rows))),
    "d.jsonl.bz2": _bytes(lambda rows: bz2.compress(lines(rows))),
    "d.jsonl.xz": _bytes(lambda rows: lzma.compress(lines(rows))),
    "d.jsonl.zst": _bytes(lambda rows: zstandard(lines(rows))),
    "crlf.jsonl": _bytes(lambda rows: b"\xef\xbb\xbf" + lines(rows).replace(b"\n", b"\r\n")),
    "d.csv": _bytes(lambda rows: table(rows, ",")),
    "bom.csv": _bytes(lambda rows: b"\xef\xbb\xbf" + table(rows, ";")),
    "d.csv.zst": _bytes(lambda rows: zstandard(table(rows, ","))),
    "d.tsv": _bytes(lambda rows: table(rows, "\t")),
    "nameless": _bytes(lambda rows: table(rows, ",")),
    "d.parquet": write_parquet,
    "d.arrow": write_arrow,
    "stream.arrow": write_stream,
    "d.feather": write_feather,
}


@contextmanager
def postgres(folder: Path, rows: Rows, password: str) -> Iterator[str]:
    """A PostgreSQL server of its own with a table `asked`; gives its URL with the password.

    PostgreSQL does not run as root: there the account `postgres` starts it.
    """
    folder.mkdir()
    root = os.geteuid() == 0
    secret = folder / "password"
    secret.write_text(password)
    if root:
        for path in (folder, secret):
            shutil.chown(path, _USER)
        for path in folder.parents:
            if path.owner() == "root" and path != Path("/") and not path.stat().st_mode & 0o001:
                path.chmod(path.stat().st_mode | 0o011)
    port = _free_port()

    def run(*command: str) -> None:
        prefix = ["setpriv", f"--reuid={_USER}", f"--regid={_USER}", "--clear-groups"]
        whole = [*(prefix if root else []), *command]
        subprocess.run(whole, check=True, capture_output=True, cwd=folder)

    base = folder / "base"
    run("initdb", "-D", str(base), "-U", "me", "-A", "scram-sha-256", f"--pwfile={secret}",
        "-E", "UTF8", "--locale=C", "--no-sync")  # fmt: skip
    options = f"-p {port} -h 127.0.0.1 -k {folder} -F"
    run("pg_ctl", "-D", str(base), "-o", options, "-w", "-l", str(folder / "log"), "start")
    try:
        url = f"postgresql+psycopg://me:{password}@127.0.0.1:{port}/postgres"
        _fill(port, rows, password)
        yield url
    finally:
        run("pg_ctl", "-D", str(base), "-m", "immediate", "stop")


def _fill(port: int, rows: Rows, password: str) -> None:
    import psycopg

    where = f"host=127.0.0.1 port={port} user=me dbname=postgres"
    with psycopg.connect(where, password=password) as base, base.cursor() as cursor:
        cursor.execute("create table asked (id serial primary key, question text, answer text)")
        for row in rows:
            values = row["question"], row["answer"]
            cursor.execute("insert into asked (question, answer) values (%s, %s)", values)


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])
