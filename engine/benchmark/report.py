"""Measurements as table cells, Markdown and files."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.benchmark.roofline import Roofline
from engine.benchmark.runner import Measurement
from engine.errors import ConfigError
from engine.storage import durable, names

HEADINGS = ("op", "shape", "time", "spread", "rate", "of limit", "memory")


def seconds(value: float) -> str:
    """A time in the unit that fits it."""
    for factor, unit in ((1.0, "s"), (1e3, "ms")):
        if value * factor >= 1.0:
            return f"{value * factor:.3g} {unit}"
    return f"{value * 1e6:.3g} us"


def size(nbytes: int) -> str:
    """Bytes in the unit that fits them."""
    for factor, unit in ((1 << 30, "GiB"), (1 << 20, "MiB")):
        if nbytes >= factor:
            return f"{nbytes / factor:.3g} {unit}"
    return f"{nbytes / 1024:.3g} KiB"


def reasons(rows: Sequence[Measurement]) -> list[str]:
    """Why other implementations were not measured, each reason once with the ops it is of."""
    ops: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for name, reason in row.failed.items():
            ops.setdefault((name, reason), []).append(row.op)
    return [
        f"{name}, {', '.join(dict.fromkeys(of))}: {reason}" for (name, reason), of in ops.items()
    ]


def csv_text(rows: Sequence[Measurement]) -> str:
    """The rows with a line of headings, commas between values; a column of seconds per other."""
    others = other_names(rows)
    skipped = ("others", "ratios", "failed")
    names = [name for name in Measurement.__dataclass_fields__ if name not in skipped]
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow([*names, *(f"{name} seconds" for name in others), "failed"])
    for row in rows:
        values, reason = row.plain(), "; ".join(f"{k}: {v}" for k, v in row.failed.items())
        seconds_of = [row.others.get(name, "") for name in others]
        lines.writerow([*(values[name] for name in names), *seconds_of, reason])
    return text.getvalue()


def rate(row: Measurement) -> str:
    """Operations per second where they are the limit, else bytes per second."""
    if row.bound == "compute":
        return f"{row.tflops:.3g} TFLOP/s"
    return f"{row.gigabytes_per_second:.4g} GB/s"


def cells(row: Measurement, others: Sequence[str]) -> list[str]:
    """The row under `HEADINGS` and, per other implementation, its time over ours.

    The spread is that between the 20th and the 80th percentile, as a share of the median.
    """
    ratios = [
        "failed" if name in row.failed else f"{row.ratios[name]:.2f}x" if name in row.ratios else ""
        for name in others
    ]
    return [
        row.op,
        row.shape,
        seconds(row.seconds),
        f"{(row.p80 - row.p20) / row.seconds:.0%}",
        rate(row),
        f"{row.roofline_share:.0%}",
        size(row.memory_bytes),
        *ratios,
    ]


def other_names(rows: Sequence[Measurement]) -> list[str]:
    """Every other implementation that was tried, in the order of first appearance."""
    return list(dict.fromkeys(name for row in rows for name in (*row.others, *row.failed)))


def limits(roofline: Roofline) -> str:
    """The measured ceilings in one line."""
    rates = ", ".join(f"{k} {v / 1e12:.3g} TFLOP/s" for k, v in roofline.flops.items())
    return f"Measured limits: copy {roofline.bandwidth / 1e9:.4g} GB/s, products {rates}."


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; bars inside cells are escaped."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines
    )


_FILES = ("ops.json", "ops.csv", "roofline.png")


def require_new(directory: Path) -> None:
    """Raise `ConfigError` where a folder holds results that would be overwritten."""
    standing = [name for name in _FILES if (directory / name).exists()]
    if standing:
        raise ConfigError(
            f"{directory / standing[0]} holds earlier results, which are not overwritten. Give "
            f"--output another folder, then put both side by side: engine bench --compare "
            f"{directory} OTHER"
        )


def write(
    directory: Path, rows: Sequence[Measurement], roofline: Roofline, machine: Mapping[str, Any]
) -> list[Path]:
    """`ops.json`, `ops.csv` and, with matplotlib, `roofline.png`; returns what was written.

    Every row in the file carries the machine, so that rows of several files can be put together.
    Raises `ConfigError` where there are results already.
    """
    require_new(directory)
    names.mkdir(directory, parents=True, exist_ok=True)
    written = [directory / "ops.json", directory / "ops.csv"]
    content = {
        "machine": dict(machine),
        "roofline": {"bandwidth": roofline.bandwidth, "flops": dict(roofline.flops)},
        "rows": [{**row.plain(), **machine} for row in rows],
    }
    durable.write_json(written[0], content)
    durable.write_text(written[1], csv_text(rows))
    from engine.benchmark.plot import draw

    picture = directory / "roofline.png"
    if draw(rows, roofline, str(machine.get("device", "")), picture):
        written.append(picture)
    return written
