"""`engine doctor`: what this machine and installation can do."""

import json

import typer

from cli.options import Json

app = typer.Typer(add_completion=False)

_MARKS = {"ok": "ok  ", "note": "note", "problem": "FAIL"}


@app.command(name="doctor")
def doctor(as_json: Json = False) -> int:
    """Check Python, torch, Triton, CUDA, memory, disk, package versions and extras.

    Exit status 1 if something keeps the engine from training at all.
    """
    from engine.doctor import examine

    checks = examine()
    if as_json:
        print(json.dumps([check.__dict__ for check in checks]))
    else:
        width = max(len(check.name) for check in checks)
        for check in checks:
            print(f"{_MARKS[check.status]}  {check.name:<{width}}  {check.detail}")
    return int(any(check.status == "problem" for check in checks))
