"""`engine bench`: the kernels against this machine's limits and against other implementations."""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING

from cli.from_settings import Call, Verb, make_app
from engine.config.tasks.workflow import BenchSettings

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from engine.benchmark.cases.case import Case
    from engine.benchmark.runner import Baselines, Measurement


def bench(call: Call) -> None:
    """Time each op: share of the measured limits, and ratio to plain torch and others.

    The limits, copy bandwidth and matrix products, are measured on this machine first.
    """
    settings = call.read(BenchSettings)
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

    wanted, device = chosen_ops(settings.ops), resolve_device(settings.device)
    models = list(dict.fromkeys(settings.model or default_models(device)))
    baselines = [_baselines(name) for name in settings.against]
    sizes = default_settings(device, settings.tokens or None)
    cases = [case for name in models for case in all_cases(name, sizes) if case.op in wanted]
    roofline = measure_roofline(device, budget=min(settings.budget, 0.3))
    measure = partial(
        run_case, device=device, roofline=roofline, budget=settings.budget,
        compiled=settings.compile, baselines=baselines,
    )  # fmt: skip
    rows = [measure(case) for case in _counted(cases)]
    machine = measured_on(device)
    as_json = call.print_json([{**row.plain(), **machine} for row in rows])
    if not as_json:
        for name in models:
            _show([row for row in rows if row.model == name], f"{machine['device']}: {name}")
        print(limits(roofline))
    if settings.output is not None:
        for path in write(settings.output, rows, roofline, machine):
            if not as_json:
                print(f"Written: {path}")


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


def _baselines(name: str) -> Baselines:
    """`baselines` of a module that the user named."""
    import importlib

    from engine.errors import ConfigError

    try:
        module = importlib.import_module(name)
        # `contenders` is the function's earlier name.
        offer: Baselines = getattr(module, "contenders", None) or module.baselines
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"--against {name} is no module with a function baselines(op, work): {error}."
        ) from None
    return offer


def _show(rows: Sequence[Measurement], title: str) -> None:
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


app = make_app((Verb("bench", (BenchSettings,), words="ops"), bench))
