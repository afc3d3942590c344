"""A PostgreSQL server trains to the bytes of the file, and its password is nowhere.

Collected where Debian's `postgresql` is installed (tests/conftest.py).
"""

import re
from pathlib import Path

import pytest

from cli.main import main
from tests.support.small_runs import adapter_bytes, quick_words
from tests.support.source_files import lines, postgres, question_rows
from tests.support.tiny_model import write_tiny_model

EXAMPLES = Path(__file__).parents[2] / "examples" / "sources"
ROWS = question_rows(12)
PASSWORD = "c4n@ry-p:ssword"


@pytest.fixture
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    return tmp_path


def test_a_server_trains_to_the_bytes_of_the_file(
    tiny: Path, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (work / "data" / "rows.jsonl").write_bytes(lines(ROWS))
    plain = ["train", "--config", str(EXAMPLES / "jsonl.yaml"), *quick_words(tiny, work / "file")]
    assert main(plain) == 0
    monkeypatch.setenv("DB_PASSWORD", PASSWORD)
    query = "select question, answer from asked order by id"
    with postgres(work / "server", ROWS, PASSWORD) as url:
        url = re.sub(r"me:.*@", "me:${DB_PASSWORD}@", url)
        example = (EXAMPLES / "postgres.yaml").read_text()
        file = work / "postgres.yaml"
        file.write_text(re.sub(r"(?m)^data: .*", f"data: {url}", example))
        words = ["train", "--config", str(file), *quick_words(tiny, work / "base")]
        assert main([*words, "--query", query, "checkpoint_every=1"]) == 0
        typed = [
            *quick_words(tiny, work / "typed"),
            "--data",
            url.replace("${DB_PASSWORD}", "w:rong"),
        ]
        assert main(["train", *typed, "--query", query]) == 2
    assert adapter_bytes(work / "base") == adapter_bytes(work / "file")
    for path in (p for p in work.rglob("*") if p.is_file() and "server" not in p.parts):
        data = path.read_bytes()
        assert PASSWORD.encode() not in data, path
        assert b"w:rong" not in data, path
        assert b"c4n%40ry" not in data, path
