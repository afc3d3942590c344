"""Names that begin with ~ where nobody has such a home."""

from pathlib import Path

import pytest

from cli.main import main
from engine.storage.home import expanded


def test_a_tilde_stands_for_a_home_that_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expanded("~/models") == tmp_path / "models"
    assert expanded("~nobody-of-this-name/x") == Path("~nobody-of-this-name/x")
    assert expanded(Path("a/~/b")) == Path("a/~/b")


@pytest.mark.parametrize(
    "words",
    [
        ("generate", "--prompt", "hi", "--model", "~nobody-of-this-name"),
        ("data", "validate", "~nobody-of-this-name/rows.jsonl"),
        ("eval", "--data", "~nobody-of-this-name.jsonl", "--model", "~nobody-of-this-name"),
        ("plan", "--model", "~nobody-of-this-name"),
    ],
)
def test_a_home_that_there_is_not_is_told_in_a_paragraph(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert "~nobody-of-this-name" in capsys.readouterr().err
