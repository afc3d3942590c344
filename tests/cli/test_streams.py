"""The command line with closed streams and with terminals that lack characters."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cli.main import main
from engine.device import resolve_device
from engine.errors import ConfigError

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


def command(line: str, words: list[str], **changes: str) -> "subprocess.CompletedProcess[str]":
    """The command line itself, behind a shell's redirections."""
    return subprocess.run(
        ["/bin/sh", "-c", f'{line} "$@"', "sh", sys.executable, "-m", "cli.main", *words],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | changes,
        check=False,
        timeout=120,
    )


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["status", "--help"]])
def test_a_full_disk_behind_standard_output_is_named(words: list[str]) -> None:
    done = command(f"cd {ROOT} && exec >/dev/full;", words)
    assert done.returncode == 2, done.stderr
    assert re.fullmatch(
        r"engine: The system refused .* standard output: No space left on device .*\n", done.stderr
    )


def test_a_folder_that_is_gone_is_named(tmp_path: Path) -> None:
    deleted = tmp_path / "deleted"
    deleted.mkdir()
    done = command(f"cd {deleted} && rmdir {deleted} &&", ["plan", "--model", "llama-3.1-8b"])
    assert done.returncode == 2
    assert re.fullmatch(r"engine: The folder that this command was started in .*\n", done.stderr)


@pytest.mark.parametrize("line", ["<&-", "printf 'caf\\351' |"])
@pytest.mark.parametrize("locale", ["C.UTF-8", "C", "en_US.UTF-8"])
def test_standard_input_can_always_be_read(line: str, locale: str) -> None:
    program = (
        "import sys; from cli.streams import open_streams\n"
        "with open_streams(): print(ascii(sys.stdin.read()), sys.stdin.isatty())"
    )
    behind = line == "<&-"
    done = subprocess.run(
        ["/bin/sh", "-c", f'{"" if behind else line} "$@" {line if behind else ""}', "sh",
         sys.executable, "-c", program],
        capture_output=True, text=True, check=False, timeout=60,
        env=os.environ | {"PYTHONPATH": str(ROOT), "LC_ALL": locale},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == ("'' False\n" if behind else "'caf\\udce9' False\n")


@pytest.mark.parametrize(
    ("name", "value"),
    [("ENGINE_REFERENCE", "maybe"), ("ENGINE_REFERENCE", "nf4,"), ("ENGINE_ATTENTION", "no"),
     ("ENGINE_DEVICE", "tpu"), ("ENGINE_DEVICE", "cuda:-1")],
)  # fmt: skip
def test_a_variable_that_names_nothing_is_refused(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=name):
        resolve_device("auto")


@pytest.mark.parametrize("value", ["", "0", "1", "nf4, rms_norm"])
def test_a_variable_that_names_kernels_is_taken(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENGINE_REFERENCE", value)
    assert resolve_device("cpu").type == "cpu"
