"""Put a corpus where it was asked for, with its manifest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.config.settings import Settings
from engine.data.corpus.records import Record
from engine.data.corpus.writing import refuse_reading, write_records
from engine.data.origins import Origin, write_origins

_NO_SETTINGS = {"output", "output_dir", "overwrite", "strict", "report", "removed", "quarantine"}


@dataclass(frozen=True)
class Making:
    """How a corpus is made: the tool, what was asked for, and of what."""

    tool: str
    settings: Mapping[str, Any]
    origins: Sequence[Origin]

    @classmethod
    def of(cls, tool: str, settings: Settings, origins: Sequence[Origin]) -> Making:
        """From a verb's table; where the result goes does not change what it is."""
        return cls(tool, settings.model_dump(mode="json", exclude=_NO_SETTINGS), origins)


@dataclass
class CorpusReport:
    """What a tool did, for people and for programs.

    Attributes:
        tool: which one.
        read: rows read, good or bad.
        outputs: rows in each file that was written.
        left_out: rows that are in none of them, by the reason.
        figures: whatever else there is to say.
    """

    tool: str
    read: int = 0
    outputs: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """The report in sentences."""
        lines = [f"{count:,} rows in {path}" for path, count in self.outputs.items()]
        reasons = [f"{n:,} {why.replace('_', ' ')}" for why, n in self.left_out.items() if n]
        if self.read:
            told = f"left out: {', '.join(reasons)}" if reasons else "none left out"
            lines.append(f"{self.read:,} rows read, {told}")
        elif reasons:
            lines.append(f"Left out: {', '.join(reasons)}")
        for name, value in self.figures.items():
            shown = f"{value:,}" if isinstance(value, int) else value
            if isinstance(value, dict):
                shown = ", ".join(f"{key} {number:,}" for key, number in value.items())
            lines.append(f"{name.replace('_', ' ')}: {shown or 'none'}")
        return lines


def publish(output: Path, rows: Iterable[Record], making: Making, report: CorpusReport) -> None:
    """Write rows, then their manifest; both are counted in `report`.

    Raises:
        ConfigError: the output is one of the sources.
        CheckpointError: a file cannot be written.
    """
    refuse_reading(output, [origin.content for origin in making.origins])
    written = write_records(output, rows)
    report.outputs[str(output)] = written
    counts = {"read": report.read, "written": written, **report.left_out}
    write_origins(output, making.tool, making.settings, making.origins, counts)
