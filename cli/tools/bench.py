"""`engine bench`: the kernels against this machine's limits and against other implementations."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from cli.from_settings import Call, Verb, make_app
from cli.say import say
from engine.config.tasks.workflow import BenchSettings

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from engine.benchmark.cases.case import Case
    from engine.benchmark.runner import Measurement


def bench(call: Call) -> None:
    """Time each op: share of the measured limits, memory, and ratio to plain torch and others.

    The limits, copy bandwidth and matrix products, are measured on this machine first. With
    --compare A B two earlier results are put side by side instead.
    """
    settings = call.read(BenchSettings)
    if settings.compare:
        _compare(call, [*settings.compare, *settings.ops])
        return
    from engine.benchmark.report import csv_text, limits, reasons
    from engine.verbs.bench import bench as measure

    result = measure(settings, _counted)
    if call.print_json([{**row.plain(), **result.machine} for row in result.rows]):
        return
    if settings.csv:
        say(csv_text(result.rows), end="")
        return
    for name in result.models:
        own = [row for row in result.rows if row.model == name]
        _show(own, f"{result.machine['device']}: {name}")
    say(limits(result.roofline))
    for reason in reasons(result.rows):
        say(f"Not measured: {reason}")
    for path in result.written:
        say(f"Written: {path}")


def _compare(call: Call, paths: list[str]) -> None:
    from engine.benchmark.comparison import compare
    from engine.errors import ConfigError

    if len(paths) != 2:
        raise ConfigError(f"--compare takes two results, A B; {len(paths)} were given.")
    rows, differing = compare(Path(paths[0]), Path(paths[1]))
    if call.print_json({"rows": [row.plain() for row in rows], "differing": differing}):
        return
    from engine.benchmark.report import seconds, size

    headings = ("op", "model", "shape", "A", "B", "A / B", "memory A", "memory B")
    lines = []
    for row in rows:
        times = ["" if value is None else seconds(value) for value in row.seconds]
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}x"
        bytes_of = ["" if value is None else size(value) for value in row.memory_bytes]
        lines.append([row.op, row.model, row.shape, *times, ratio, *bytes_of])
    _table(f"A {paths[0]}, B {paths[1]}", headings, lines)
    for line in differing:
        say(f"The machines differ in {line}")


def _counted(cases: Sequence[Case]) -> Iterator[Case]:
    """The cases one by one, with a line on a terminal that counts them."""
    terminal = sys.stderr.isatty()
    for number, case in enumerate(cases, 1):
        if terminal:
            text = f"\r{number}/{len(cases)} {case.name:<70.70}"
            print(text, end="", file=sys.stderr, flush=True)
        yield case
    if terminal:
        print("\r" + " " * 78, end="\r", file=sys.stderr, flush=True)


def _show(rows: Sequence[Measurement], title: str) -> None:
    from engine.benchmark.report import HEADINGS, cells, other_names

    others = other_names(rows)
    headings = (*HEADINGS, *(f"{name} / ours" for name in others))
    _table(title, headings, [cells(row, others) for row in rows])


def _table(title: str, headings: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for heading in headings:
        left = heading in ("op", "model", "shape")
        table.add_column(
            heading,
            justify="left" if left else "right",
            overflow="fold",
            no_wrap=heading == "op",
        )
    for line in lines:
        table.add_row(*line)
    Console().print(table)


app = make_app((Verb("bench", (BenchSettings,), words="ops"), bench))
