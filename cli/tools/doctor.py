"""`engine doctor`: what this machine and installation can do."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from cli.from_settings import Call, Verb, make_app
from cli.say import say
from engine.config.tasks.workflow import DoctorSettings

if TYPE_CHECKING:
    from engine.selfcheck.report import CheckResult

_MARKS = {"ok": "ok  ", "note": "note", "problem": "FAIL", "not run": "----"}


def doctor(call: Call) -> int:
    """Check Python, torch, Triton, CUDA, memory, disk, package versions and extras.

    With --gpu or --interpret check that every kernel computes what it should, each in a process of
    its own, and name the way around those that do not. With --distributed, under torchrun or with
    --gpus, check that processes can train together. Exit status 1 if something keeps the engine
    from training at all, or if a check fails.
    """
    settings = call.read(DoctorSettings)
    if settings.distributed:
        return _group_check(call, settings)
    if settings.gpu or settings.interpret or settings.only:
        return _self_check(call, settings)
    from engine.verbs.doctor import examine

    checks = examine()
    if not call.print_json([check.__dict__ for check in checks]):
        width = max(len(check.name) for check in checks)
        for check in checks:
            say(f"{_MARKS[check.status]}  {check.name:<{width}}  {check.detail}")
    return int(any(check.status == "problem" for check in checks))


def _group_check(call: Call, settings: DoctorSettings) -> int:
    from engine.verbs.doctor_group import examine_group

    report = examine_group(settings)
    if report is None:  # the first process tells it
        return 0
    if not call.print_json(report.plain()):
        say("\n".join(report.lines()))
    return int(bool(report.problems))


def _self_check(call: Call, settings: DoctorSettings) -> int:
    from engine.selfcheck.report import check_machine, chosen_checks, failures

    names = chosen_checks(settings.only)
    machine, running = check_machine(settings, names, figures=call.as_json)
    results = []
    for result in running:
        results.append(result)
        if not call.as_json:
            _show(result, max(map(len, names)))
    wrong = failures(results)
    everything = {"machine": machine, "passed": not wrong, "checks": [r.plain() for r in results]}
    if not call.print_json(everything):
        ok = sum(result.status == "ok" for result in results)
        say(f"{ok} passed, {len(wrong)} failed, {len(results) - ok - len(wrong)} not run.")
    return int(bool(wrong))


def _show(result: CheckResult, width: int) -> None:
    mark = _MARKS.get(result.status, result.status)
    say(f"{mark}  {result.name:<{width}}  {result.seconds:5.1f} s  {result.detail}")
    if result.remedy:
        say(f"      {'':<{width}}           way around: {result.remedy}")
    sys.stdout.flush()


app = make_app((Verb("doctor", (DoctorSettings,)), doctor))
