"""Rows of a database: the result of a query, through SQLAlchemy.

Rows come in batches, through a cursor on the server where the driver has one, in a transaction that
is never committed. A URL is shown with the variables that stand for its secrets
(`engine.config.data_names.passwords`), and what a driver says is scrubbed of them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.config.data_names.passwords import URL, reveal, scrub
from engine.data.sources.cells import cell
from engine.data.sources.spool import write_rows
from engine.data.sources.tables import refuse_repeated
from engine.errors import ConfigError, DataError

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine

log = logging.getLogger(__name__)

_BATCH = 1000
_SQLITE = b"SQLite format 3\x00"


def is_database(text: str) -> bool:
    """Whether data is named by a URL of a database, or is a file of SQLite's."""
    files = ("hf:", "file:", "http:", "https:", "ftp:", "s3:", "gs:")
    return (URL.match(text) is not None and not text.startswith(files)) or _is_sqlite(Path(text))


def check_database(url: str, query: str | None) -> None:
    """Refuse what cannot be asked: without a query, or without SQLAlchemy. Asks nothing."""
    if not query or not query.strip():
        raise ConfigError(
            f"{url} is a database: say with --query which of its rows to read, such as --query "
            "'select question, answer from tickets where rating >= 4'."
        )
    try:
        import sqlalchemy  # noqa: F401
    except ImportError:
        raise ConfigError(
            f"{url} is a database, which is read with SQLAlchemy: pip install "
            "'engine-trainer[sql]', and the driver of the database."
        ) from None


@cache
def spooled_query(url: str, query: str) -> Path:
    """The rows of a query as a file of JSON Lines; the database is asked once.

    Raises `DataError` for a query that cannot be answered, `ConfigError` for a URL that cannot be
    used.
    """
    if _is_sqlite(Path(url)):
        url = f"sqlite:///{url}"
    return write_rows(_rows(url, query), f"the rows of {url}")


def _is_sqlite(path: Path) -> bool:
    try:
        if not path.is_file():  # a pipe that nobody writes to would keep who opens it waiting
            return False
        with path.open("rb") as stream:
            return stream.read(len(_SQLITE)) == _SQLITE
    except OSError:
        return False


def _rows(url: str, query: str) -> Iterator[dict[str, Any]]:
    from sqlalchemy.exc import SQLAlchemyError

    database = _connect(url)
    reason = None
    try:
        # No parameters, so that a percent sign or a colon in the query stands for itself.
        options = {"stream_results": True, "yield_per": _BATCH, "no_parameters": True}
        with database.connect().execution_options(**options) as connection:
            result = connection.exec_driver_sql(query)
            if not result.returns_rows:
                raise DataError(f"{url}: the query returns no rows; expected a SELECT: {query}")
            columns = [str(column) for column in list(result.keys())]
            refuse_repeated(columns, url)
            for part in result.partitions():
                for values in part:
                    named = zip(columns, values, strict=True)
                    yield {column: cell(column, value) for column, value in named}
            connection.rollback()
    except (SQLAlchemyError, OSError) as error:
        reason = _reason(error)
    except ValueError as error:
        reason = str(error)
    finally:
        database.dispose()
    if reason is not None:
        raise DataError(f"{url}: the query cannot be answered ({reason}). The query: {query}")


def _connect(url: str) -> Engine:
    import sqlalchemy
    from sqlalchemy.exc import ArgumentError, NoSuchModuleError

    whole = reveal(url)
    path = url.partition(":///")[2].partition("?")[0]
    if url.startswith("sqlite") and path and path != ":memory:" and not Path(path).exists():
        # SQLite would make an empty database of a misspelt name.
        raise DataError(f"{url}: there is no such file; check the path.")
    try:
        return sqlalchemy.create_engine(whole)
    except NoSuchModuleError as error:
        problem = f"SQLAlchemy knows no such database ({error})"
    except ImportError as error:
        problem = f"its driver is not installed ({error}); install it with pip"
    except (ArgumentError, ValueError, TypeError) as error:
        problem = f"the URL cannot be used ({error})"
    raise ConfigError(f"{url}: {scrub(problem)}.")


def _reason(error: Exception) -> str:
    """The first line of what a driver says, without secrets."""
    original = getattr(error, "orig", None) or error
    lines = [line for line in str(original).splitlines() if line.strip()]
    return scrub(lines[0].strip()[:300]) if lines else type(error).__name__
