"""The collector of cyclic garbage rests during imports and at the end, and at no other time."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import pytest

from engine.runs.startup import importing

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("collects", [True, False])
def test_the_collector_is_as_it_was_after_an_import(collects: bool) -> None:
    before = gc.isenabled()
    try:
        (gc.enable if collects else gc.disable)()
        with importing():
            assert not gc.isenabled()
        with pytest.raises(ImportError), importing():
            raise ImportError
        assert gc.isenabled() is collects
    finally:
        (gc.enable if before else gc.disable)()


def test_a_verb_runs_with_the_collector_and_ends_without_it() -> None:
    script = (
        "import atexit, gc, sys\n"
        "atexit.register(lambda: print(gc.isenabled(), gc.get_freeze_count()))\n"
        "import cli.main\n"
        "print(cli.main.main(['status', 'nowhere']), gc.isenabled(), gc.get_freeze_count())\n"
        "atexit.register(lambda: print('frozen later', gc.get_freeze_count()))\n"
    )
    words = [sys.executable, "-c", script]
    out = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)
    inside, later, end = out.stdout.splitlines()[-3:]
    # What is registered last is called first: the last line is printed when all is frozen.
    assert inside.split()[1:] == ["True", "0"]
    assert later == "frozen later 0"
    assert end.startswith("True ") and int(end.split()[1]) > 10_000
