"""Read Parquet, Arrow and Feather files in batches of rows, with pyarrow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.data.sources.cells import CellFault, cell
from engine.data.sources.file_kinds import PARQUET, with_article
from engine.data.sources.streams.located import BadLine, Located, Position
from engine.data.sources.tables import refuse_repeated
from engine.errors import DataError

_BATCH = 1024


def read_arrow(path: Path, kind: str, name: str) -> Iterator[Located | BadLine]:
    """The rows of a file as mappings; their positions are their numbers.

    Raises `DataError` where pyarrow is missing, or cannot read the file.
    """
    try:
        import pyarrow
    except ImportError:
        raise DataError(
            f"{name}: this is {with_article(kind)} file, which is read with pyarrow: pip install "
            "'engine-trainer[data]'. Or turn it into JSON Lines, with pandas for instance: "
            f"{_pandas(path, kind)}"
        ) from None
    try:
        number = 0
        for batch in _batches(path, kind):
            refuse_repeated(list(batch.schema.names), name)
            for values in batch.to_pylist():
                number += 1
                yield as_row(values, Position(name, number))
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(
            f"{name}: the {kind} file cannot be read ({str(error).splitlines()[0][:200]}). Check "
            "that it is complete."
        ) from None


def as_row(values: dict[str, Any], position: Position) -> Located | BadLine:
    """One row of a table, its cells as rows have them."""
    try:
        return Located(position, {name: cell(name, value) for name, value in values.items()})
    except CellFault as fault:
        return BadLine(position, f"found that {fault}", "Leave the column out, or decode it.")


def _batches(path: Path, kind: str) -> Iterator[Any]:
    if kind == PARQUET:
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(path) as file:
            yield from file.iter_batches(batch_size=_BATCH)
        return
    import pyarrow.feather
    import pyarrow.ipc

    head = _head(path)
    if head.startswith(b"FEA1"):
        yield from pyarrow.feather.read_table(path).to_batches(max_chunksize=_BATCH)
    elif head.startswith(b"ARROW1"):
        with pyarrow.memory_map(str(path)) as source, pyarrow.ipc.open_file(source) as reader:
            for index in range(reader.num_record_batches):
                yield from _sliced(reader.get_batch(index))
    else:
        with pyarrow.memory_map(str(path)) as source, pyarrow.ipc.open_stream(source) as reader:
            for batch in reader:
                yield from _sliced(batch)


def _sliced(batch: Any) -> Iterator[Any]:
    for start in range(0, batch.num_rows, _BATCH):
        yield batch.slice(start, _BATCH)


def _head(path: Path) -> bytes:
    with path.open("rb") as stream:
        return stream.read(8)


def _pandas(path: Path, kind: str) -> str:
    read = f"read_{'parquet' if kind == PARQUET else 'feather'}('{path}')"
    return (
        f"python -c \"import pandas; pandas.{read}.to_json('{path.stem}.new.jsonl', "
        "orient='records', lines=True)\""
    )
