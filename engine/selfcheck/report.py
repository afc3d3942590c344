"""Run the checks in processes of their own, and tell what holds."""

from __future__ import annotations

import difflib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from engine.config.tasks.workflow import DoctorSettings
from engine.device import resolve_device
from engine.errors import ConfigError
from engine.provenance import measured_on
from engine.selfcheck.checks import CHECKS
from engine.selfcheck.isolation import Outcome, ProcessLimits, run_each
from kernels.runtime.device import free_memory

_MODULE = "engine.selfcheck.checks"
_ITEM_SECONDS = 60.0
_GPU_BYTES = 8 << 30
"""What a check may take of a GPU: truth in float64 at the sizes of a real model."""

_INTERPRETER = {"TRITON_INTERPRET": "1", "ENGINE_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}


@dataclass(frozen=True)
class CheckResult:
    """How one check ended: "ok", "FAIL" or "not run". `remedy` is the way around a failure."""

    name: str
    status: str
    detail: str
    remedy: str
    seconds: float
    figures: Any = None

    @classmethod
    def of(cls, outcome: Outcome) -> CheckResult:
        """From a process's answer; one that died or hung has failed."""
        data, seconds = outcome.data, round(outcome.seconds, 2)
        if data is None:
            late = outcome.error is not None and outcome.error.startswith("not run")
            status, detail, figures = ("not run" if late else "FAIL"), str(outcome.error), None
        else:
            status = {True: "ok", False: "FAIL", None: "not run"}[data["passed"]]
            detail, figures = data["detail"], data["figures"]
        remedy = CHECKS[outcome.item].remedy if status == "FAIL" else ""
        return cls(outcome.item, status, detail, remedy, seconds, figures)

    def plain(self) -> dict[str, Any]:
        """What JSON holds."""
        return {key: value for key, value in vars(self).items() if value not in (None, "")}


def chosen_checks(names: Sequence[str]) -> list[str]:
    """`names`, or all. Raises `ConfigError` for one that does not exist, with the nearest."""
    for name in names:
        if name not in CHECKS:
            near = difflib.get_close_matches(name, CHECKS, n=1, cutoff=0.4)
            meant = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"There is no check {name!r}.{meant} Checks: {', '.join(CHECKS)}.")
    return list(dict.fromkeys(names)) or list(CHECKS)


def failures(results: Sequence[CheckResult]) -> list[CheckResult]:
    """The checks that failed."""
    return [result for result in results if result.status == "FAIL"]


def check_machine(
    settings: DoctorSettings, names: Sequence[str], *, figures: bool
) -> tuple[dict[str, Any], Iterator[CheckResult]]:
    """What the machine is, and the results of these checks on it as they end.

    Raises `ConfigError` where there is no GPU to check, or two things were asked for.
    """
    if settings.gpu and settings.interpret:
        raise ConfigError("--gpu checks a GPU and --interpret does without one; give one of them.")
    wanted = settings.device
    if settings.interpret:
        wanted = "cpu"
    elif wanted == "auto":
        wanted = "cuda"
    if wanted == "cpu" and not settings.interpret:
        raise ConfigError("--gpu checks a GPU, and --device is cpu; `engine doctor --interpret`.")
    try:
        device = resolve_device(wanted)
    except ConfigError as error:
        raise ConfigError(
            f"There is no GPU to check here: {error} On a CPU the kernels are checked in Triton's "
            "interpreter: engine doctor --interpret"
        ) from error
    running = run_checks(
        names,
        str(device),
        interpret=settings.interpret,
        seconds=settings.seconds,
        figures=figures,
    )
    return measured_on(device), running


def _at_a_time(device: torch.device) -> int:
    """How many checks may run beside each other: a GPU's memory and the processors decide."""
    several = min(4, os.cpu_count() or 1)
    if device.type == "cuda":
        several = min(several, free_memory(device) // _GPU_BYTES)
    return max(1, several)


def run_checks(
    names: Sequence[str],
    device: str,
    *,
    interpret: bool,
    seconds: float,
    figures: bool = False,
    environment: Mapping[str, str] | None = None,
) -> Iterator[CheckResult]:
    """Each check's result as it ends, those that want the device to themselves last.

    `seconds` bounds all of them together; `interpret` runs Triton's kernels on the CPU. `figures`
    keeps what was measured of every value.
    """
    options = {
        "device": "cpu" if interpret else device,
        "interpret": interpret,
        "figures": figures,
        # One thread: several checks run at a time, and their tensors are small.
        "environment": {"OMP_NUM_THREADS": "1"}
        | (_INTERPRETER if interpret else {})
        | dict(environment or {}),
    }
    if interpret:
        for name in names:
            if CHECKS[name].needs:
                yield CheckResult(name, "not run", CHECKS[name].needs, "", 0.0)
        names = [name for name in names if not CHECKS[name].needs]
    deadline = time.monotonic() + seconds
    several = _at_a_time(torch.device("cpu" if interpret else device))
    for alone in (False, True):
        items = [name for name in names if CHECKS[name].alone == alone]
        limits = ProcessLimits(deadline, _ITEM_SECONDS, 1 if alone else several)
        for outcome in run_each(_MODULE, "checks", items, options, limits):
            yield CheckResult.of(outcome)
