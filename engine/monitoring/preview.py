"""Rows of a run as its model reads them, trained tokens marked.

Only reads: the run's data and tokenizer, wherever its settings say that they are.
"""

from __future__ import annotations

from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from engine.monitoring.confined import is_own_file

if TYPE_CHECKING:
    from engine.config.train_config import TrainConfig
    from engine.data.rows import Row
    from engine.monitoring.numbered_rows import NumberedRows
    from engine.tokenization.tokenizer import Tokenizer

MOST_ROWS = 20
_CHARACTERS = 20_000


class RowPreview:
    """Previews of rows; the rows' numbers and the tokenizer of the last run stay in memory."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._key: tuple[Path, int] | None = None
        self._rows: dict[str, NumberedRows] = {}
        self._config: TrainConfig
        self._tokenizer: Tokenizer

    def rows(self, run: Path, part: str, first: int, count: int) -> dict[str, Any]:
        """Rows `first` (from 1) and after it of a run's `part`, `train` or `heldout`.

        Each row is a list of stretches of text that are trained or not, as `engine data preview`
        shows them. Raises `EngineError` where the run's data or tokenizer cannot be read.
        """
        with self._lock:
            self._open(run)
            rows = self._rows[part]
            chosen = rows.rows(first - 1, min(count, MOST_ROWS))
            return {
                "total": len(rows),
                "first": first,
                "rows": [self._shown(row) for row in chosen],
            }

    def _open(self, run: Path) -> None:
        """Read settings, rows and tokenizer, unless they are those of the last call."""
        from engine.config.sources import build
        from engine.config.train_config import TrainConfig
        from engine.errors import DataError
        from engine.model_sources.scratch.open_base import describe_base
        from engine.monitoring.numbered_rows import rows_by_part
        from engine.runs.stored import CONFIG, read_settings
        from engine.tokenization.tokenizer import load_tokenizer

        if not is_own_file(run / CONFIG):
            raise DataError(f"{run} has no {CONFIG} of its own, which would name its rows.")
        key = run, (run / CONFIG).stat().st_mtime_ns
        if key == self._key:
            return
        self._key = None
        self._config = build(TrainConfig, read_settings(run))
        described = describe_base(self._config)
        self._tokenizer = load_tokenizer(described, self._config.template_date)
        self._rows, self._key = rows_by_part(self._config), key

    def _shown(self, row: Row) -> dict[str, Any]:
        from engine.errors import EngineError
        from engine.training.row_set import examples_of_run

        try:
            made, report = examples_of_run(self._config, [row], self._tokenizer)
        except EngineError as error:
            return {"source": row.source, "error": str(error)}
        if not made:
            return {"source": row.source, "error": "; ".join(report.dropped)}
        example = made[0]  # of a document that is divided, its first piece
        stretches, left = [], _CHARACTERS
        for trained, ids in example.stretches():
            text = self._tokenizer.decode(ids, skip_special_tokens=False)
            stretches.append({"trained": trained, "text": text[:left]})
            left -= len(text)
            if left <= 0:
                break
        return {
            "source": row.source,
            "tokens": len(example),
            "trained_tokens": example.trained_tokens,
            "cut": left < 0,
            "stretches": stretches,
        }
