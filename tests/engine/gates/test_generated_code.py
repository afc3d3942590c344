"""Generated programs are run, and are shut off from network, files and other processes."""

import os
import sys
from pathlib import Path

import pytest

from engine.gates.generated_code import CodeLimits, run_program

LIMITS = CodeLimits(cpu_seconds=2, wall_seconds=3.0, memory_bytes=256 << 20)

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="programs are shut off by Linux namespaces and Landlock"
)


@pytest.mark.parametrize(
    "program",
    ["x = 1", "assert sorted([2, 1]) == [1, 2]", "open('own', 'w').write('x')",
     "import os\nassert os.getpid() == 1",
     "import subprocess\nsubprocess.run(['true'], stdout=subprocess.DEVNULL, check=True)"],
)  # fmt: skip
def test_a_program_that_ends_well_passes(program: str) -> None:
    assert run_program(program, LIMITS) is None


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("assert 1 == 2, 'sum'", "AssertionError: sum"),
        ("def f(:", "SyntaxError"),
        ("x = bytearray(1 << 30)", "MemoryError"),
        ("import sys\nsys.exit(0)", "left by exit"),
        ("import os\nos._exit(0)", "was ended"),
        ("import os\nos.kill(os.getpid(), 9)\nwhile True: pass", "no end"),
        ("while True: pass", "no end"),
        ("import time\ntime.sleep(60)", "no end"),
        ("def f(): return f()\nf()", "RecursionError"),
        ("raise BaseException('x')", "BaseException: x"),
        ("import socket\nsocket.create_connection(('127.0.0.1', 9), 1)", "unreachable"),
        ("open('/dev/shm/x', 'w')", "Permission"),
    ],
)
def test_a_program_that_does_not_says_why(program: str, reason: str) -> None:
    said = run_program(program, LIMITS)
    assert said is not None
    assert reason in said


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        (CodeLimits(1, 60.0, 256 << 20), "no end in 1 s of the processor's time"),
        (CodeLimits(60, 1.0, 256 << 20), "no end in 1.0 s"),
    ],
)
def test_either_clock_ends_a_program_and_is_named(limits: CodeLimits, reason: str) -> None:
    assert run_program("while True: pass", limits) == reason


def test_nothing_outside_is_written_or_cut_and_nobody_is_signalled(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("rows")
    for action in ("open(path, 'w')", "os.truncate(path, 0)", "os.remove(path)",
                   "os.rename(path, path + '2')", "os.symlink(path, path + '3')"):  # fmt: skip
        said = run_program(f"import os\npath = {str(precious)!r}\n{action}", LIMITS)
        assert said is not None, action
        assert "Permission" in said, action
    assert "ProcessLookup" in str(run_program(f"import os\nos.kill({os.getpid()}, 9)", LIMITS))
    assert precious.read_text() == "rows"
    assert list(tmp_path.iterdir()) == [precious]


def test_what_a_program_started_ends_with_it(tmp_path: Path) -> None:
    mark = f"61.{os.getpid() % 1000:03d}1"
    program = f"import os, subprocess\nos.setsid\nsubprocess.Popen(['sleep', '{mark}'])"
    assert run_program(program, LIMITS) is None
    running = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                running.append((entry / "cmdline").read_bytes())
            except OSError:
                continue
    assert not [line for line in running if mark.encode() in line]


def test_the_environment_of_the_user_does_not_reach_a_program(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    program = "import os\nassert 'hf_canary' not in str(dict(os.environ))"
    assert run_program(program, LIMITS) is None
