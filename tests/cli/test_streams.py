"""The command line with closed streams and with terminals that lack characters."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHOW = (
    "import sys; from cli.streams import open_streams\n"
    "with open_streams():\n"
    "    file = open(sys.argv[1], 'w')\n"
    "    print('men\\u00e9 \\u4e2d'); print('oh', file=sys.stderr)\n"
    "    sys.stdout.flush(); file.write('mine'); file.close()\n"
)


def shell(line: str, output: Path, **changes: str) -> "subprocess.CompletedProcess[bytes]":
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | changes
    command = [sys.executable, "-c", SHOW, str(output)]
    return subprocess.run(
        ["/bin/sh", "-c", f'exec "$@" {line}', "sh", *command],
        capture_output=True,
        env=environment,
        check=False,
        timeout=120,
    )


@pytest.mark.parametrize("line", [">&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_is_no_error_and_no_file_takes_its_place(line: str, tmp_path: Path) -> None:
    done = shell(line, tmp_path / "own")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "own").read_text() == "mine"


def test_what_a_terminal_lacks_is_shown_as_an_escape(tmp_path: Path) -> None:
    done = shell("", tmp_path / "own", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout) == (0, b"men\\xe9 \\u4e2d\n")
    latin = shell("", tmp_path / "own", PYTHONIOENCODING="latin-1")
    assert (latin.returncode, latin.stdout) == (0, b"men\xe9 \\u4e2d\n")
