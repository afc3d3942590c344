"""Write the list of slow tests from the durations of a full run.

    make test PYTEST_ARGS="--durations=0 --durations-min=0.02" | tee durations.log
    python -m tests.support.slow_tests durations.log

A test is slow where all its parametrised cases together take longer than `LIMIT` seconds. The list,
`tests/support/slow_tests.txt`, holds one test function per line and is applied by
`tests/conftest.py`; `tests/test_slow_list.py` fails where it names a test that does not exist.
"""

import re
import sys
from collections import defaultdict
from pathlib import Path

LIST = Path(__file__).with_suffix(".txt")
LIMIT = 0.6
_LINE = re.compile(r"^\s*([\d.]+)s (?:setup|call|teardown)\s+(tests/\S+?\.py::[^\[\s]+)")


def seconds_by_test(durations: str) -> dict[str, float]:
    """Seconds of every test function in the output of `pytest --durations=0`."""
    totals: dict[str, float] = defaultdict(float)
    for line in durations.splitlines():
        match = _LINE.match(line)
        if match:
            totals[match[2]] += float(match[1])
    return totals


def main(log: Path) -> None:
    totals = seconds_by_test(log.read_text())
    slow = sorted(name for name, seconds in totals.items() if seconds > LIMIT)
    LIST.write_text("".join(f"{name}\n" for name in slow))
    rest = sum(seconds for seconds in totals.values() if seconds <= LIMIT)
    print(f"{len(slow)} slow tests of {len(totals)}; the others take {rest:.0f} s in one process")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
