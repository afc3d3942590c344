"""Bad rows with their positions and reasons, in their own file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from engine.data.corpus.reading import CorpusRow
from engine.data.corpus.records import Record
from engine.data.sources.resolve import RowFile
from engine.data.sources.streams.compressed import open_plain
from engine.data.sources.streams.located import BadLine, Located

_LONGEST_TEXT = 1 << 20


class Quarantine:
    """Collects bad rows while they are read."""

    def __init__(self) -> None:
        self._entries: list[dict[str, Any]] = []

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, item: Located | BadLine, bad: BadLine) -> None:
        """A value that is no row, or a line that is no value."""
        position = bad.position
        told = {"file": position.file, "line": position.line, "column": position.column}
        entry = {**told, "reason": bad.fault, "advice": bad.advice}
        self._entries.append(entry | ({"row": item.value} if isinstance(item, Located) else {}))

    def divide(self, rows: Sequence[CorpusRow], dropped: Iterable[str]) -> list[CorpusRow]:
        """Take the rows that `dropped` names, as `file:line: reason`; the others are returned."""
        pairs = [line.partition(": ") for line in dropped]
        sources = {item.row.source for item in rows}
        reasons = {}
        for head, _, reason in pairs:
            while head not in sources and ": " in reason:  # a file may have a colon in its name
                more, _, reason = reason.partition(": ")
                head = f"{head}: {more}"
            reasons[head] = reason
        good: list[CorpusRow] = []
        for item in rows:
            why = reasons.get(item.row.source)
            if why is None:
                good.append(item)
                continue
            told = {"file": item.row.file, "line": item.row.line, "column": 1}
            self._entries.append({**told, "reason": why, "row": item.record})
        return good

    def records(self, files: Sequence[RowFile]) -> list[Record]:
        """All of them with their reasons; of what is no JSON the line itself, as `text`."""
        lines = {file.name: self._texts(file) for file in files}
        for entry in self._entries:
            text = lines.get(entry["file"], {}).get(entry["line"])
            if "row" not in entry and text is not None:
                entry["text"] = text
        return self._entries

    def _texts(self, file: RowFile) -> dict[int, str]:
        """The lines of a text file that are wanted, by their numbers."""
        wanted = {e["line"] for e in self._entries if e["file"] == file.name and "row" not in e}
        if not wanted or file.kind not in ("JSON", "CSV"):
            return {}
        texts = {}
        with open_plain(file.path) as stream:
            number, begins = 1, True
            while part := stream.readline(_LONGEST_TEXT):
                if begins and number in wanted:
                    texts[number] = part.decode("utf-8", "replace").rstrip("\r\n")
                begins = part.endswith(b"\n")
                number += begins
        return texts
