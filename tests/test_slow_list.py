"""The list of slow tests names tests that exist."""

import ast
from pathlib import Path

from tests.support.slow_tests import LIST, seconds_by_test

ROOT = Path(__file__).parent.parent


def functions(file: Path) -> set[str]:
    return {
        node.name for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)
    }


def test_every_slow_test_exists() -> None:
    stale = []
    for line in LIST.read_text().splitlines():
        file, _, name = line.partition("::")
        if not (ROOT / file).is_file() or name not in functions(ROOT / file):
            stale.append(line)
    assert not stale, f"renamed or removed, change tests/support/slow_tests.txt: {stale}"


def test_durations_are_added_up_over_the_cases_of_a_test() -> None:
    log = """\
65.19s call     tests/kernels/test_compile.py::test_one
 1.50s call     tests/a/test_b.py::test_two[x-1.0]
 0.50s setup    tests/a/test_b.py::test_two[y z]
3 passed in 67.19s
"""
    assert seconds_by_test(log) == {
        "tests/kernels/test_compile.py::test_one": 65.19,
        "tests/a/test_b.py::test_two": 2.0,
    }
