"""The command line with closed streams and with terminals that lack characters."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cli.main import main

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


def test_no_text_of_others_steers_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = "a\x1b[2J\x9b31m\x07\u202eb"
    rows = tmp_path / f"{odd}.jsonl"
    row = {"prompt": odd, "response": odd, "category": odd}
    rows.write_text("\n".join([json.dumps(row, ensure_ascii=False), "{" + odd]))
    output = tmp_path / f"{odd}-out.jsonl"
    skip = ["--bad-lines", "skip"]
    for words in (
        ["data", "preview", "--data", str(rows), *skip],
        ["data", "convert", "--data", str(rows), "--output", str(output), *skip],
        ["data", "validate", "--data", str(rows), *skip],
        ["data", "stats", "--data", str(rows), *skip],
        ["data", "validate", "--data", str(tmp_path / odd)],
        ["init", "--model", odd, "--data", str(rows)],
    ):
        main(words)
        shown = "".join(capsys.readouterr())
        assert "a\\x1b[2J\\x9b31m\\x07\\u202eb" in shown or words[1] == "stats", words
        assert not set("\x1b\x9b\x07\u202e") & set(shown), words


def test_every_verb_speaks_through_say() -> None:
    spoken = re.compile(r"^(?!.*file=).*(?<![\w.])print\(.", re.MULTILINE)
    ours = [p for p in (ROOT / "cli").rglob("*.py") if p.name not in ("say.py", "main.py")]
    raw = {path.name for path in ours if spoken.search(path.read_text())}
    assert raw <= {"from_settings.py", "generate.py"}  # JSON, and an end of line
