"""Data files that are not read: what they are is said, and what to do."""

import gzip
from pathlib import Path

import pytest

from engine.data.dataset import load_rows
from engine.data.sources import resolve
from engine.data.sources.hub import HubData
from engine.errors import DataError
from engine.inference.batch_files import read_rows

ROW = b'{"prompt": "Q", "response": "A"}\n'
FILES = [
    ("d.xlsx", b"PK\x03\x04..", "an Excel file", "read_excel"),
    ("d.zip", b"PK\x03\x04..", "a ZIP file", "unzip"),
    ("d.jsonl", ROW.decode().encode("utf-16"), "a UTF-16 file", "iconv"),
    ("d.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS file", "git lfs pull"),
    ("d.json", b"<!DOCTYPE html><html>", "an HTML file", "raw file"),
    ("d.pdf", b"%PDF-1.7", "a PDF file", ".txt"),
    ("run.yaml", b"model: x\ndata: y\n", "a YAML file", "--config '{path}'"),
    ("rows.yml", b"- prompt: Q\n  response: A\n", "a YAML file", "yaml.safe_load"),
    ("rows.py", b"print(1)\n", "a Python file", "json.dumps(row)"),
    ("rows.pkl", b"\x80\x04}", "a pickle file", "Parquet"),
    ("model.gguf", b"GGUF\x03", "a GGUF file", "--model"),
    ("d.csv.gz", gzip.compress(b"PK\x03\x04.."), "a ZIP file", "unzip"),
]


@pytest.mark.parametrize(("name", "content", "kind", "advice"), FILES, ids=range(len(FILES)))
@pytest.mark.parametrize("policy", ["fail", "skip"])
def test_other_kinds_of_files_are_named(
    name: str, content: bytes, kind: str, advice: str, policy: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_rows(path, bad_lines=policy)
    message = str(caught.value)
    assert message.startswith(f"{path}: this is {kind}")
    assert advice.replace("{path}", str(path)) in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "text",
    [
        '{"prompt": ["Q", "R"], "response": ["A", "B"]}\n',
        '{\n "prompt": ["Q", "R"],\n "response": ["A", "B"],\n "stars": [1, null]\n}',
        '{"prompt": {"0": "Q", "1": "R"}, "response": {"0": "A", "1": "B"}}',
    ],
)
def test_a_table_by_columns_is_read_as_its_rows(text: str, tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    path.write_text(text)
    rows = load_rows(path)
    assert [[m["content"] for m in row.messages] for row in rows] == [["Q", "A"], ["R", "B"]]


def test_two_objects_of_lists_are_no_table(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"prompt": ["Q"], "response": ["A"]}\n' * 2)
    with pytest.raises(DataError, match=r"prompt\[0\] is a text"):
        load_rows(path)


@pytest.mark.parametrize("name", ["d.csv", "d.txt", "d.parquet", "d", "d.jsonl"])
def test_the_content_decides_and_not_the_name(name: str, tmp_path: Path) -> None:
    for content in (ROW, b"\xef\xbb\xbf" + ROW, gzip.compress(ROW), b"[" + ROW + b"]"):
        path = tmp_path / name
        path.write_bytes(content)
        assert load_rows(path)[0].messages[0]["content"] == "Q"


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("https://host.org/rows.jsonl", "download the file"),
        ("{here}/a.jsonl,{here}/b.jsonl", "--data {here}/a.jsonl --data {here}/b.jsonl"),
        ("rows.jsonl", "Check the path"),
    ],
)
def test_a_name_of_no_file_is_answered_by_what_it_looks_like(
    name: str, advice: str, tmp_path: Path
) -> None:
    for file in ("a.jsonl", "b.jsonl"):
        (tmp_path / file).write_bytes(ROW)
    with pytest.raises(DataError, match="there is no such data file") as caught:
        load_rows(name.format(here=tmp_path))
    assert advice.format(here=tmp_path) in str(caught.value)


def test_a_file_with_the_longest_name_is_read(tmp_path: Path) -> None:
    longest = tmp_path / f"{'x' * 249}.jsonl"
    longest.write_text('{"text": "words"}\n', encoding="utf-8")
    assert len(load_rows([str(longest)])) == 1


def test_a_folder_of_everything_is_no_folder_of_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resolve, "_MOST_ENTRIES", 3)
    for number in range(3):
        (tmp_path / f"{number}.jsonl").write_text('{"text": "words"}\n', encoding="utf-8")
    assert len(load_rows([str(tmp_path)])) == 3
    (tmp_path / "3.jsonl").touch()
    with pytest.raises(DataError, match="over 3 files are in the folder and below it"):
        load_rows([str(tmp_path)])


def test_a_data_set_that_no_network_brings_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class ConnectError(Exception):
        """As a transport raises it: no child of OSError."""

    def fail(self: HubData) -> list[Path]:
        raise ConnectError("[Errno -2] Name or service not known")

    monkeypatch.setattr(HubData, "_download", fail)
    with pytest.raises(DataError, match=r"could not be downloaded \(\[Errno -2\] Name or service"):
        HubData("nobody/nothing").files()


@pytest.mark.parametrize("name", ["/dev/full", "/dev", "."])
def test_prompts_are_read_from_files_alone(name: str) -> None:
    with pytest.raises(DataError, match="a file of prompts was expected"):
        read_rows(Path(name))
