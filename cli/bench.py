"""`engine bench`: the kernels against this machine's limits and against other implementations."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.options import Device, Json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from engine.benchmark.runner import Baselines, Row

app = typer.Typer(add_completion=False)


@app.command(name="bench")
def bench(
    ops: Annotated[list[str] | None, typer.Argument(help="Ops to measure; all by default.")] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="Whose shapes, repeatable; by default llama-3.1-8b, qwen3-8b, qwen3-4b and "
            "llama-3.3-70b, on a CPU smollm2-135m."
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=0, help="Tokens at once; 0 chooses.")] = 0,
    device: Device = "auto",
    budget: Annotated[float, typer.Option(min=0.0, help="Seconds to spend on one timing.")] = 0.2,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Also time torch.compile of the plain form.")
    ] = False,
    against: Annotated[
        list[str] | None,
        typer.Option(help="Module with `baselines(op, work)`, such as bench.peers; repeatable."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for ops.json and roofline.png.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Time each op: share of the measured limits, and ratio to plain torch and others.

    The limits, copy bandwidth and matrix products, are measured on this machine first.
    """
    from engine.benchmark.report import limits, write
    from engine.benchmark.roofline import measure_roofline
    from engine.benchmark.runner import (
        all_cases,
        chosen_ops,
        default_models,
        default_settings,
        run_case,
    )
    from engine.device import resolve_device
    from engine.provenance import measured_on

    wanted, where = chosen_ops(ops or []), resolve_device(device)
    models = list(dict.fromkeys(model or default_models(where)))
    offers = [_baselines(name) for name in against or []]
    cases = [
        case
        for name in models
        for case in all_cases(name, default_settings(where, tokens or None))
        if case.op in wanted
    ]
    roofline, rows = measure_roofline(where, budget=min(budget, 0.3)), list["Row"]()
    for number, case in enumerate(cases, 1):
        if sys.stderr.isatty():
            print(
                f"\r{number}/{len(cases)} {case.name:<70.70}", end="", file=sys.stderr, flush=True
            )
        rows.append(
            run_case(case, where, roofline, budget=budget, compiled=compiled, baselines=offers)
        )
    if sys.stderr.isatty():
        print("\r" + " " * 78, end="\r", file=sys.stderr, flush=True)
    machine = measured_on(where)
    if as_json:
        print(json.dumps([{**row.plain(), **machine} for row in rows]))
    else:
        for name in models:
            _show([row for row in rows if row.model == name], f"{machine['device']}: {name}")
        print(limits(roofline))
    for path in write(output, rows, roofline, machine) if output is not None else []:
        if not as_json:
            print(f"Written: {path}")


def _baselines(name: str) -> Baselines:
    """`baselines` of a module that the user named."""
    import importlib

    from engine.errors import ConfigError

    try:
        found: Baselines = importlib.import_module(name).baselines
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"--against {name} is no module with a function baselines(op, work): {error}."
        ) from None
    return found


def _show(rows: Sequence[Row], title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    from engine.benchmark.report import HEADINGS, cells, other_names

    others = other_names(rows)
    table = Table(title=title)
    for heading in (*HEADINGS, *(f"{name} / ours" for name in others)):
        table.add_column(
            heading,
            justify="left" if heading in ("op", "shape") else "right",
            overflow="fold",
            no_wrap=heading == "op",
        )
    for row in rows:
        table.add_row(*cells(row, others))
    Console().print(table)
