"""Rows of databases: what is asked, what is refused, and where a password may never stand."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from engine.config.data_names import DataName
from engine.config.data_names.passwords import hide_password, reveal, scrub
from engine.config.sources import dump_yaml
from engine.config.train_config import TrainConfig
from engine.data.dataset import RowChoice, read_chosen
from engine.errors import ConfigError, DataError
from tests.support.source_files import question_rows, write_sqlite

CANARY = "c4n@ry/p:ss"
QUOTED = "c4n%40ry%2Fp%3Ass"


@pytest.fixture
def base(tmp_path: Path) -> str:
    write_sqlite(tmp_path / "app.db", question_rows(40))
    return f"sqlite:///{tmp_path}/app.db"


def ask(url: str, query: str | None) -> list[str]:
    rows, _ = read_chosen(url, RowChoice(query=query))
    return [row.source for row in rows]


def test_rows_are_those_of_the_query_and_know_their_number(base: str) -> None:
    query = "select question, answer from asked where id % 2 = 0 and question like '%1%'"
    assert ask(base, query)[:2] == [f"{base}:1", f"{base}:2"]
    other = "select question as prompt, id as response from asked -- :id ?"
    rows, _ = read_chosen(base, RowChoice(query=other))
    assert rows[3].messages[-1]["content"] == "4"


@pytest.mark.parametrize(
    ("query", "words"),
    [
        (None, "say with --query"),
        ("  ", "say with --query"),
        ("select nope from asked", "no such column: nope"),
        ("delete from asked", "returns no rows"),
        ("select id, id from asked", "several columns are called 'id'"),
        ("select question from asked where id < 0", "data set is empty"),
        ("select question, x'00ff' as answer from asked", "'answer' holds bytes"),
        ("select question, null as answer from asked", "'answer' is null"),
    ],
    ids=range(8),
)
def test_queries_that_give_no_rows_say_why(base: str, query: str | None, words: str) -> None:
    with pytest.raises((DataError, ConfigError), match=words):
        ask(base, query)


def test_a_query_changes_nothing(base: str) -> None:
    with pytest.raises(DataError):
        ask(base, "delete from asked")
    assert len(ask(base, "select question, answer from asked")) == 40


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("sqlite:///nowhere/at/all.db", "there is no such file"),
        ("nosuchbase://host/db", "no such database"),
        ("postgresql+nodriver://host/db", "no such database"),
        ("mysql+pymysql://host/db", "driver is not installed"),
        ("postgresql://me:${NOT_SET_ANYWHERE}@host/db", "NOT_SET_ANYWHERE"),
    ],
    ids=range(5),
)
def test_urls_that_cannot_be_used_say_why(url: str, words: str) -> None:
    with pytest.raises((DataError, ConfigError), match=words):
        ask(url, "select 1")


def test_a_query_without_a_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    with pytest.raises(DataError, match="--query"):
        ask(str(tmp_path / "d.jsonl"), "select 1")


URLS = [
    f"postgresql://me:{QUOTED}@host:5432/db?sslmode=require",
    f"postgresql+psycopg://host/db?user=me&password={QUOTED}",
    f"mssql://host/db?odbc_connect=DRIVER%3DX%3BPWD%3D{QUOTED}",
    f"snowflake://me@host/db?private_key_passphrase={QUOTED}",
    f"mysql://me:{QUOTED}@host/db=2",
]


@pytest.mark.parametrize("url", URLS)
def test_a_password_is_in_no_form_of_the_settings(url: str) -> None:
    config = TrainConfig(model="m", data=[url, "b.jsonl"], query="select 1")
    shown = [dump_yaml(config), repr(config), config.model_dump_json(), str(config.trajectory())]
    assert all(QUOTED not in text and CANARY not in text for text in shown)
    assert "${DB_" in config.data[0]
    assert QUOTED in reveal(DataName.parse(config.data[0]).text)
    stored = yaml.safe_load(dump_yaml(config))
    assert TrainConfig(**stored) == config
    assert "***" in scrub(f"cannot log in with {CANARY} or {QUOTED}") or "odbc" in url


def test_two_passwords_have_two_variables_and_variables_stay() -> None:
    first, second = (hide_password(f"pg://u:{word}@h/d") for word in ("one-word", "other-word"))
    assert first != second
    assert reveal(second) == "pg://u:other-word@h/d"
    assert hide_password("pg://u:${MINE}@h/d") == "pg://u:${MINE}@h/d"
    assert hide_password("rows/a:b@c.jsonl") == "rows/a:b@c.jsonl"


def test_a_variable_of_the_environment_is_quoted_for_the_url(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CANARY_PASSWORD", CANARY)
    assert reveal("pg://u:${CANARY_PASSWORD}@h/d") == f"pg://u:{QUOTED}@h/d"
    assert CANARY not in scrub(f"it is {CANARY}")


def test_what_a_driver_says_holds_no_password(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    url = f"postgresql+psycopg://me:{QUOTED}@127.0.0.1:1/db"
    with pytest.raises(DataError) as caught:
        ask(url, "select 1")
    told = f"{caught.value} {caught.value.__cause__} {caplog.text}"
    assert QUOTED not in told
    assert CANARY not in told
    assert "${DB_PASSWORD" in told


def test_a_password_in_a_refused_command_is_not_printed(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cli.main", "train", "--model", "nope", "--query", "select 1"]
    env = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    for extra in (["--epochs", "0"], ["--data", "x=-3"], ["--min-rating", "9"]):
        url = f"postgresql+psycopg://me:{QUOTED}@127.0.0.1:1/db"
        done = subprocess.run(
            [*command, "--data", url, *extra], capture_output=True, env=env, cwd=tmp_path,
            check=False,
        )  # fmt: skip
        assert done.returncode == 2
        assert QUOTED.encode() not in done.stdout + done.stderr
        assert CANARY.encode() not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("given", "name", "weight"),
    [
        ("a.jsonl=0.5", "a.jsonl", 0.5),
        ("a=b.jsonl", "a=b.jsonl", 1.0),
        ({"path": "a.jsonl", "weight": 2}, "a.jsonl", 2.0),
        ("sqlite:///a.db=2", "sqlite:///a.db", 2.0),
        ("sqlite:///a.db?timeout=2", "sqlite:///a.db?timeout=2", 1.0),
        ({"path": "sqlite:///a.db?timeout=2", "weight": 3}, "sqlite:///a.db?timeout=2", 3.0),
    ],
    ids=range(6),
)
def test_weights_stand_behind_names(given: object, name: str, weight: float) -> None:
    parsed = DataName.parse(TrainConfig(model="m", data=[given]).data[0])
    assert (parsed.text, parsed.weight) == (name, weight)


@pytest.mark.parametrize("given", ["a=0", "a=2000", {"path": "a", "weight": "x"}, 5, [[1], 2]])
def test_data_that_is_no_source_is_refused(given: object) -> None:
    with pytest.raises(ConfigError, match="data"):
        TrainConfig(model="m", data=given)
