"""Put a corpus where it was asked for, with its manifest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.config.settings import Settings
from engine.data.corpus.records import Record
from engine.data.corpus.writing import write_records
from engine.data.origins import Origin, manifest_path, write_origins
from engine.storage import durable, names
from engine.storage.standing import refuse_sources

_NO_SETTINGS = {"output", "output_dir", "overwrite", "strict", "report", "removed", "quarantine"}


@dataclass(frozen=True)
class Making:
    """How a corpus is made: the tool, what was asked for, and of what.

    With `overwrite` it may replace one that stands in its place.
    """

    tool: str
    settings: Mapping[str, Any]
    origins: Sequence[Origin]
    overwrite: bool = False

    @classmethod
    def of(cls, tool: str, settings: Settings, origins: Sequence[Origin]) -> Making:
        """From a verb's table; where the result goes does not change what it is."""
        asked = settings.model_dump(mode="json", exclude=_NO_SETTINGS)
        return cls(tool, asked, origins, bool(getattr(settings, "overwrite", False)))


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


def publish(
    output: Path,
    rows: Iterable[Record],
    making: Making,
    report: CorpusReport,
    removed: tuple[Path, Iterable[Record]] | None = None,
) -> None:
    """Write rows and their manifest, and before them those that were removed, if that was asked.

    Raises:
        ConfigError: the output is one of the sources.
        CheckpointError: a file cannot be written.
    """
    if removed is not None and removed[0].parent.absolute() == output.parent.absolute():
        publish_all({output: rows}, making, report, removed)
        return
    if removed is not None:
        refuse_sources((output, removed[0]), [origin.content for origin in making.origins])
        report.outputs[str(removed[0])] = write_records(*removed)
    publish_all({output: rows}, making, report)


def publish_all(
    outputs: Mapping[Path, Iterable[Record]],
    making: Making,
    report: CorpusReport,
    removed: tuple[Path, Iterable[Record]] | None = None,
) -> None:
    """Write files of rows of one folder, with their manifests, all together; the first last.

    `removed` is a file more, which has no manifest. Whoever calls refuses what is there before any
    work is done, and what came in between is not replaced either. Raises as `publish`.
    """
    others = () if removed is None else (removed[0],)
    refuse_sources((*outputs, *others), [origin.content for origin in making.origins])
    for output in outputs:
        if not output.exists():  # A manifest whose rows have gone speaks of nothing.
            with durable.writing(output):
                names.unlink(manifest_path(output), missing_ok=True)
    with durable.publish_files(next(iter(outputs)), making.overwrite) as folder:
        for output, rows in outputs.items():
            written = write_records(folder / output.name, rows)
            report.outputs[str(output)] = written
            counts = {"read": report.read, "written": written, **report.left_out}
            write_origins(
                output, making.tool, making.settings, making.origins, counts,
                content=folder / output.name, manifest=manifest_path(folder / output.name),
            )  # fmt: skip
        if removed is not None:
            report.outputs[str(removed[0])] = write_records(folder / removed[0].name, removed[1])
