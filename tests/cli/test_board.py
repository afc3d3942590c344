"""engine board from the command line: it says where it is, answers, and ends at Ctrl-C."""

import json
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from cli.main import main
from engine.serving.server import listen
from tests.support.pages.written_runs import write_run
from tests.support.source_tree import ROOT


def test_the_board_answers_until_it_is_interrupted(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "first", 5)
    command = [sys.executable, "-m", "cli.main", "board", str(tmp_path / "runs"), "--port", "0"]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            said = process.stdout.readline()
            address = re.search(r"http://127\.0\.0\.1:\d+/", said)
            assert address, said
            with urllib.request.urlopen(f"{address[0]}api/runs", timeout=20) as answer:
                listed = json.load(answer)
            assert [run["name"] for run in listed["runs"]] == ["first"]
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=20) == 130
            assert process.stderr is not None
            assert process.stderr.read() == "engine: Stopped.\n"
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "nowhere does not exist"),
        (["--port", "70000"], "less than or equal to 65535"),
        (["TAKEN"], "cannot listen on 127.0.0.1"),
    ],
)
def test_what_cannot_be_served_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    with listen("127.0.0.1", 0) as taken:
        port = str(taken.getsockname()[1])
        words = [str(tmp_path), "--port", port] if words == ["TAKEN"] else words
        assert main(["board", *words]) == 2
    assert said in capsys.readouterr().err
