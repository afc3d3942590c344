"""Rows of every shape become rows of every other that can say the same, and are read back."""

import json
from pathlib import Path
from typing import Any

import pytest

from cli.main import main
from engine.data.corpus.reading import read_corpus
from engine.data.corpus.records import SCHEMA_VERSION
from engine.data.dataset import RowChoice, load_rows
from engine.data.origins import manifest_path, stale

ABOUT = {"category": "c", "rating": 4, "tags": ["loop", "file"], "difficulty": "easy"}
PAIR = {"prompt": "Ask", "response": "Answer", **ABOUT}
CALL = {"function": {"name": "f", "arguments": {"a": 1}}, "type": "function"}
CHAT = {
    "messages": [
        {"role": "user", "content": "Ask"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "Three"},
    ]
}
SHAPES = ("prompt-response", "prompt-completion", "question-answer", "alpaca", "messages")


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def data(*words: object, status: int = 0) -> None:
    assert main(["data", *map(str, words)]) == status


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".parquet"])
@pytest.mark.parametrize("shape", [*SHAPES, "sharegpt", "auto"])
def test_what_is_taught_survives_every_shape_and_format(
    shape: str, ending: str, tmp_path: Path
) -> None:
    system = {**PAIR, "system": "Be brief", "response": 'é "quoted"\nnext'}
    rows = write(tmp_path / "in.jsonl", PAIR, system)
    output = tmp_path / f"out{ending}"
    data("convert", rows, "--output", output, "--shape", shape)
    for one, other in zip(load_rows(rows), load_rows(output), strict=True):
        assert one.messages == other.messages
        assert (one.category, one.rating) == (other.category, other.rating)
    again = tmp_path / "again.jsonl"
    data("convert", output, "--output", again)
    first = lines(again)[0]
    assert first == {**PAIR, "source": f"{rows}:1", "schema_version": SCHEMA_VERSION}
    assert list(first) == [
        "prompt", "response", "category", "tags", "difficulty", "rating", "source",
        "schema_version",
    ]  # fmt: skip


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_tool_calls_documents_pairs_and_other_keys_survive(ending: str, tmp_path: Path) -> None:
    pair = {"prompt": "P", "chosen": "good", "rejected": "bad"}
    ids = {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}
    rows = write(tmp_path / "in.jsonl", CHAT, {"text": "Long ago"}, pair, ids, {**PAIR, "id": 7})
    output = tmp_path / f"out{ending}"
    data("convert", rows, "--output", output)
    before, after = load_rows(rows), load_rows(output)
    for one, other in zip(before, after, strict=True):
        told = (one.messages, one.text, one.rejected, one.ids)
        assert told == (other.messages, other.text, other.rejected, other.ids)
    corpus = read_corpus(str(output), RowChoice())
    assert str(corpus.rows[4].record["id"]) == "7"


def test_what_a_shape_cannot_say_is_refused_or_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write(tmp_path / "in.jsonl", PAIR, CHAT, {"text": "Long ago"})
    output = tmp_path / "out.jsonl"
    data("convert", rows, "--output", output, "--shape", "alpaca", status=2)
    assert "2 of 3 rows cannot be written as alpaca" in " ".join(capsys.readouterr().err.split())
    assert not output.exists()
    data("convert", rows, "--output", output, "--shape", "alpaca", "--bad-lines", "skip")
    assert "2 of another shape" in capsys.readouterr().out
    assert len(lines(output)) == 1
    assert json.loads(manifest_path(output).read_text())["counts"] == {
        "read": 3, "written": 1, "of_another_shape": 2,
    }  # fmt: skip


def test_nothing_is_overwritten_unless_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write(tmp_path / "in.jsonl", PAIR)
    output = write(tmp_path / "out.jsonl", "precious")
    data("convert", rows, "--output", output, status=2)
    data("convert", rows, "--output", rows, "--overwrite", status=2)
    data("convert", rows, "--output", tmp_path / "out.csv", status=2)
    assert output.read_text() == '"precious"\n'
    assert lines(rows) == [PAIR]
    data("convert", rows, "--output", output, "--overwrite")
    assert lines(output)[0]["prompt"] == "Ask"


def test_equal_rows_are_equal_bytes_and_equal_fingerprints(tmp_path: Path) -> None:
    rows = write(tmp_path / "in.jsonl", PAIR, CHAT)
    outputs = [tmp_path / name for name in ("a.jsonl.gz", "b.jsonl.gz")]
    for output in outputs:
        data("convert", rows, "--output", output)
    assert outputs[0].read_bytes() == outputs[1].read_bytes()
    prints = [json.loads(manifest_path(path).read_text())["fingerprint"] for path in outputs]
    assert prints[0] == prints[1]
    data("convert", rows, "--output", tmp_path / "c.jsonl", "--shape", "messages")
    assert json.loads(manifest_path(tmp_path / "c.jsonl").read_text())["fingerprint"] != prints[0]


def test_a_stale_corpus_is_noticed_also_at_second_hand(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, one, two = (tmp_path / name for name in ("in.jsonl", "one.jsonl", "two.jsonl"))
    write(rows, PAIR)
    data("convert", rows, "--output", one)
    data("convert", one, "--output", two, "--strict")
    assert stale(two) == []
    write(rows, {**PAIR, "response": "Answex"})  # as long as it was
    assert len(stale(two)) == 1
    capsys.readouterr()
    data("stats", two)
    assert "is stale: its source" in " ".join(capsys.readouterr().err.split())
    data("convert", two, "--output", tmp_path / "three.jsonl", "--strict", status=2)
    data("convert", two, "--output", tmp_path / "three.jsonl")
    write(rows, PAIR)  # what counts is the content, not its time
    assert stale(two) == []
    write(two, PAIR)
    assert "has changed since" in stale(two)[0]
    manifest_path(one).write_text("{")
    assert "cannot be read" in stale(one)[0]


def test_bad_rows_go_to_quarantine_and_good_ones_to_the_output(tmp_path: Path) -> None:
    rows = write(tmp_path / "in.jsonl", PAIR, {"prompt": "no answer"}, {**PAIR, "rating": 9})
    with rows.open("a") as file:
        file.write('{"prompt": "torn\n')
    good, bad, report = (tmp_path / n for n in ("good.jsonl", "bad.jsonl", "report.json"))
    data("validate", rows, "--output", good, "--quarantine", bad, "--report", report)
    assert [row["prompt"] for row in lines(good)] == ["Ask"]
    entries = lines(bad)
    assert [entry["line"] for entry in entries] == [2, 3, 4]
    assert entries[0]["row"] == {"prompt": "no answer"}
    assert "'rating' is 9" in entries[1]["reason"]
    assert entries[2]["text"] == '{"prompt": "torn'
    assert len(json.loads(report.read_text())["read"]["skipped"]) == 3
    data("validate", good, "--strict")
    again = tmp_path / "more.jsonl"
    data("validate", rows, "--quarantine", again, "--strict", status=2)
    assert len(lines(again)) == 3


def test_stats_counts_repeats_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write(tmp_path / "in.jsonl", PAIR, {**PAIR, "prompt": " ask"}, {**PAIR, "response": "B"})
    picture = tmp_path / "lengths.png"
    data("stats", rows, "--plot", picture, "--json")
    figures = json.loads(capsys.readouterr().out)
    assert (figures["exact_duplicates"], figures["repeated_prompts"]) == (1, 2)
    assert figures["tags"] == {"file": 3, "loop": 3}
    assert picture.read_bytes().startswith(b"\x89PNG")
