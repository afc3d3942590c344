"""The same rows through every source are the same rows, and give the same token ids."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.config.train_config import TrainConfig
from engine.data.dataset import RowChoice, load_rows, read_chosen
from engine.data.examples import build_examples
from engine.data.rows import Row
from engine.errors import ConfigError, DataError
from engine.tokenization.tokenizer import Tokenizer, load_tokenizer
from tests.support.source_files import (
    WRITERS,
    Rows,
    question_rows,
    write_parquet,
    write_sqlite,
    zstandard,
)
from tests.support.tiny_model import write_tokenizer
from tests.support.tokenizer_folder import TokenizerFolder

ROWS = question_rows(5000)
QUERY = "select question, answer from asked order by id"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return load_tokenizer(TokenizerFolder(folder))


def talks(rows: list[Row]) -> list[list[dict[str, object]]]:
    return [row.messages for row in rows]


def expected(rows: Rows) -> list[list[dict[str, str]]]:
    return [
        [
            {"role": "user", "content": row["question"]},
            {"role": "assistant", "content": row["answer"]},
        ]
        for row in rows
    ]


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name, ROWS)
    assert talks(load_rows(tmp_path / name)) == expected(ROWS)


def test_every_source_gives_the_same_token_ids(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_sqlite(tmp_path / "app.db", ROWS)
    write_parquet(tmp_path / "d.parquet", ROWS)
    rows = TrainConfig(model="m", data=iter(ROWS)).data
    sources = [
        read_chosen(tmp_path / "d.parquet", RowChoice())[0],
        read_chosen(f"sqlite:///{tmp_path}/app.db", RowChoice(query=QUERY))[0],
        read_chosen(tmp_path / "app.db", RowChoice(query=QUERY))[0],
        read_chosen(rows, RowChoice())[0],
    ]
    reference = None
    for read in sources:
        examples, _ = build_examples(read, tokenizer, 256)
        ids = [(example.input_ids, example.trained) for example in examples]
        reference = reference or ids
        assert ids == reference
    assert len(reference or []) == len(ROWS)


def test_folders_and_patterns_are_read_in_the_order_of_names(tmp_path: Path) -> None:
    parts = tmp_path / "data"
    parts.mkdir()
    for number in range(3):
        write_parquet(parts / f"train-0000{number}-of-00003.parquet", ROWS[number * 10 :][:10])
    write_parquet(parts / "test-00000-of-00001.parquet", ROWS[:5])
    (tmp_path / "README.md").write_text("About the data.")
    (parts / "state.json").write_text("{}")
    for name in (tmp_path, f"{parts}/train-*.parquet", f"{tmp_path}/**/train*"):
        assert talks(load_rows(name)) == expected(ROWS[:30])


def test_a_folder_of_texts_is_one_document_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("# A\r\n\nText.", newline="")
    (tmp_path / "b.txt").write_text("[a link](b) and more")
    texts = [row.text for row in load_rows(tmp_path)]
    assert texts == ["# A\n\nText.", "[a link](b) and more"]


def test_a_very_long_text_is_divided_between_characters(tmp_path: Path) -> None:
    text = "é😀ab" * 1_500_000
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    parts = [row.text or "" for row in load_rows(tmp_path / "a.txt")]
    assert len(parts) > 1
    assert "".join(parts) == text


def test_standard_input_is_a_source(tmp_path: Path) -> None:
    program = (
        "from engine.data.dataset import load_rows\n"
        "assert len(load_rows('-')) == len(load_rows('-')) == 7\n"
        "print(load_rows('-')[0].source)"
    )
    for name in ("d.jsonl", "d.csv", "d.parquet", "d.jsonl.zst"):
        WRITERS[name](tmp_path / name, ROWS[:7])
        done = subprocess.run(
            [sys.executable, "-c", program],
            input=(tmp_path / name).read_bytes(),
            capture_output=True,
            env={**os.environ, "PYTHONPATH": str(Path.cwd())},
            check=False,
        )
        assert done.returncode == 0, done.stderr.decode()
        assert done.stdout.startswith(b"standard input:")


def test_rows_from_python_may_be_a_list_a_generator_or_a_function() -> None:
    def made() -> Iterator[dict[str, str]]:
        yield from ROWS[:9]

    for rows in (ROWS[:9], made(), made, tuple(ROWS[:9])):
        names = TrainConfig(model="m", data=rows).data
        assert talks(load_rows(names)) == talks(load_rows(names)) == expected(ROWS[:9])
    with pytest.raises(DataError, match="row 2: found str"):
        load_rows(TrainConfig(model="m", data=iter([ROWS[0], "x"])).data)
    with pytest.raises(ConfigError, match="Go on from Python"):
        load_rows("python:rows-0")


def write_hub(cache: Path, files: dict[str, bytes], readme: str = "") -> None:
    root = cache / "datasets--org--name"
    snapshot = root / "snapshots" / "abc123"
    for name, data in {**files, "README.md": readme.encode()}.items():
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).write_bytes(data)
    (root / "refs").mkdir()
    for ref in ("main", "v2"):
        (root / "refs" / ref).write_text("abc123")


def hub_rows(cache: Path, *names: str) -> list[int]:
    """Rows of data of the hub in a cache, in a process of its own; -1 for a refusal."""
    program = (
        "import sys\nfrom engine.data.dataset import load_rows\n"
        "from engine.errors import DataError\n"
        "for name in sys.argv[1:]:\n"
        "    try: print(len(load_rows(name)))\n"
        "    except DataError as error: print(-1, file=sys.stdout); print(error, file=sys.stderr)\n"
    )
    env = {**os.environ, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    env["PYTHONPATH"] = str(Path.cwd())
    done = subprocess.run(
        [sys.executable, "-c", program, *names], capture_output=True, env=env, check=True
    )
    return [int(line) for line in done.stdout.split()]


def test_data_of_the_hub_is_read_from_the_cache_by_its_splits(tmp_path: Path) -> None:
    def part(count: int) -> bytes:
        buffer = io.BytesIO()
        for row in ROWS[:count]:
            buffer.write(json.dumps(row).encode() + b"\n")
        return buffer.getvalue()

    files = {
        "data/train-00000-of-00002.jsonl": part(3),
        "data/train-00001-of-00002.jsonl": part(4),
        "data/test-00000-of-00001.jsonl": part(2),
    }
    write_hub(tmp_path / "plain", files)
    names = ("org/name", "org/name:train", "org/name:test", "org/name@v2", "hf:org/name:test")
    assert hub_rows(tmp_path / "plain", *names) == [7, 7, 2, 7, 2]
    assert hub_rows(tmp_path / "plain", "org/name:dev", "org/other", "org/name@v9") == [-1] * 3
    readme = (
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n"
        "    path: a/*\n  - split: test\n    path: [b/x.jsonl]\n"
        "- config_name: small\n  data_files: b/*\n---\nWords.\n"
    )
    write_hub(tmp_path / "told", {"a/1.jsonl": part(3), "b/x.jsonl": part(1)}, readme)
    small = ("org/name", "org/name:test", "org/name:small:train")
    assert hub_rows(tmp_path / "told", *small) == [3, 1, 1]


def test_a_misspelt_path_is_no_data_set_of_the_hub(tmp_path: Path) -> None:
    for name in (f"{tmp_path}/nope.jsonl", "tests/nope", "nope/rows.jsonl", "nope.csv"):
        with pytest.raises(DataError, match="there is no such data file"):
            load_rows(name)
    with pytest.raises(DataError, match="no file matches"):
        load_rows(f"{tmp_path}/*.jsonl")


def test_several_frames_of_zstandard_are_one_file(tmp_path: Path) -> None:
    halves = WRITERS["d.jsonl"], tmp_path / "half"
    data = b""
    for part in (ROWS[:5], ROWS[5:9]):
        halves[0](halves[1], part)
        data += zstandard(halves[1].read_bytes())
    (tmp_path / "d.jsonl.zst").write_bytes(data)
    assert talks(load_rows(tmp_path / "d.jsonl.zst")) == expected(ROWS[:9])
