"""`engine bench`: measure ops at the shapes of models, on this machine."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from engine.benchmark.cases.case import Case
from engine.benchmark.report import require_new, write
from engine.benchmark.roofline import Roofline, measure_roofline
from engine.benchmark.runner import (
    Baselines,
    Measurement,
    all_cases,
    chosen_ops,
    default_models,
    default_settings,
    run_case,
)
from engine.config.tasks.workflow import BenchSettings
from engine.device import resolve_device
from engine.errors import ConfigError
from engine.memory.find_model import find_model
from engine.provenance import measured_on


@dataclass(frozen=True)
class BenchResult:
    """The rows, the limits that they are compared with, the machine, and what was written."""

    rows: list[Measurement]
    roofline: Roofline
    machine: dict[str, Any]
    models: tuple[str, ...]
    written: tuple[Path, ...] = ()


def _uncounted(cases: Sequence[Case]) -> Iterator[Case]:
    return iter(cases)


def bench(
    settings: BenchSettings,
    progress: Callable[[Sequence[Case]], Iterator[Case]] = _uncounted,
) -> BenchResult:
    """Measure what `settings` ask for. `progress` is handed the cases and hands them on.

    Raises `ConfigError` for an op, model or module that is none, before anything is measured.
    """
    wanted, device = chosen_ops(settings.ops), resolve_device(settings.device)
    models = tuple(dict.fromkeys(settings.model or default_models(device)))
    baselines = [load_baselines(name) for name in settings.against]
    if settings.output is not None:
        require_new(settings.output)
    cases = [
        case
        for name in models
        for tokens in settings.tokens or (None,)
        for case in _cases(name, tokens, device)
        if case.op in wanted
    ]
    cases = list({case.name: case for case in cases}.values())
    if not cases:
        raise ConfigError(
            f"None of the models {', '.join(models)} has the op {', '.join(settings.ops)}. "
            "Mixtures and hybrids have ops of their own: --model qwen3-30b-a3b, or "
            "qwen3-next-80b-a3b."
        )
    roofline = measure_roofline(device, budget=min(settings.budget, 0.3))
    rows = [
        run_case(
            case,
            device,
            roofline,
            budget=settings.budget,
            compiled=settings.compile,
            baselines=baselines,
        )
        for case in progress(cases)
    ]
    machine = measured_on(device)
    written = () if settings.output is None else write(settings.output, rows, roofline, machine)
    return BenchResult(rows, roofline, dict(machine), models, tuple(written))


def _cases(model: str, tokens: int | None, device: Any) -> Iterator[Case]:
    config, _ = find_model(model)
    return all_cases(model, default_settings(device, tokens, config), config)


def load_baselines(name: str) -> Baselines:
    """`baselines` of a module that is installed, or of a .py file.

    Raises `ConfigError` saying what was looked for, and what to do.
    """
    try:
        module = _load_file(Path(name)) if name.endswith(".py") else importlib.import_module(name)
    except (ImportError, ValueError, TypeError) as error:
        raise ConfigError(
            f"--against {name} cannot be imported: {error}. It should be a module that this Python "
            f"({sys.executable}) has installed, or the path of a .py file, with a function "
            "`baselines(op, work)` that returns calls by name; bench.peers is one."
        ) from None
    # `contenders` is the function's earlier name.
    offer: Baselines | None = getattr(module, "baselines", None) or getattr(
        module, "contenders", None
    )
    if offer is None:
        raise ConfigError(
            f"--against {name} has no function `baselines(op, work)`, which returns calls by name; "
            "bench.peers is an example of one."
        )
    return offer


def _load_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise ImportError(f"there is no file {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
