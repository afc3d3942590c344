"""`engine doctor`: what this machine and installation can do."""

from cli.from_settings import Call, Verb, make_app

_MARKS = {"ok": "ok  ", "note": "note", "problem": "FAIL"}


def doctor(call: Call) -> int:
    """Check Python, torch, Triton, CUDA, memory, disk, package versions and extras.

    Exit status 1 if something keeps the engine from training at all.
    """
    from engine.verbs.doctor import examine

    checks = examine()
    if not call.print_json([check.__dict__ for check in checks]):
        width = max(len(check.name) for check in checks)
        for check in checks:
            print(f"{_MARKS[check.status]}  {check.name:<{width}}  {check.detail}")
    return int(any(check.status == "problem" for check in checks))


app = make_app((Verb("doctor"), doctor))
