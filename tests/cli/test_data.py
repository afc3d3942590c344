"""`engine data`: what each verb prints, and one paragraph for what is wrong."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

from cli.main import main

PAIR = {"prompt": "Ask", "response": "Answer", "category": "c", "rating": 4}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write(tmp_path / "d.jsonl", PAIR, {**PAIR, "rating": 2}, {"prompt": "Q", "answer": "B"})


@pytest.fixture
def model(tmp_path: Path, golden: Callable[[str], Path]) -> Path:
    """A tiny checkpoint of 128 ids with a tokenizer of ASCII characters."""
    folder = tmp_path / "model"
    shutil.copytree(golden("qwen2"), folder)
    characters = ["Ġ", "Ċ", *(chr(code) for code in range(0x21, 0x7F))]
    backend = Backend(BPE({token: index for index, token in enumerate(characters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokens = ["<|im_start|>", "<|im_end|>"]
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in tokens])
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def run(capsys: pytest.CaptureFixture[str], *words: object, status: int = 0) -> str:
    assert main(["data", *map(str, words)]) == status
    captured = capsys.readouterr()
    return captured.out if status == 0 else captured.err


def test_validate_counts_what_is_left_out(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, "validate", data, "--min-rating", 3)
    assert "1 of 3 rows are good: 0 bad, 1 rated too low, 1 without a rating" in out


def test_validate_lists_bad_rows_when_asked(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with data.open("a") as file:
        file.write('{"prompt": NaN}\n')
    assert f"{data}:4:12: broken JSON: NaN" in run(capsys, "validate", data, status=2)
    out = run(capsys, "validate", "--data", data, "--bad-lines", "skip")
    assert f"skipped {data}:4:12:" in out
    assert "3 of 4 rows are good: 1 bad" in out


def test_validate_with_a_model_tokenises(
    data: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run(capsys, "validate", data, "--model", model, "--json")
    figures = json.loads(out)["examples"]
    assert (figures["rows"], figures["examples"], figures["dropped"]) == (3, 3, [])
    assert figures["trained_tokens"] == len("AnswerAnswerB") + 3


def test_ids_beyond_the_model_are_refused(
    data: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = model / "tokenizer.json"
    serialised = json.loads(path.read_text())
    serialised["model"]["vocab"]["A"] = 128
    path.write_text(json.dumps(serialised))
    err = run(capsys, "validate", data, "--model", model, status=2)
    assert "token id 128 is beyond the model's vocabulary of 128 rows" in " ".join(err.split())


def test_stats_counts_rows_and_tokens(
    data: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = json.loads(run(capsys, "stats", data, "--model", model, "--json"))
    assert figures["rows"] == 3
    assert figures["ratings"] == {"2": 1, "4": 1, "none": 1}
    assert figures["categories"] == {"c": 2, "none": 1}
    assert figures["tokens"]["longest"] > figures["tokens"]["shortest"] > 0
    assert "categories" in run(capsys, "stats", data)


def test_preview_colours_the_trained_tokens_and_no_others(
    data: Path,
    model: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = run(capsys, "preview", data, "--model", model)
    assert "trained: 'Answer<|im_end|>'" in plain
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured = run(capsys, "preview", data, "--model", model, "--row", 3)
    green = [part.split("\x1b[0m")[0] for part in coloured.split("\x1b[1;30;42m")[1:]]
    assert green == ["B<|im_end|>"]


def test_preview_without_a_model_shows_messages(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run(capsys, "preview", data, "--row", 2, "--count", 2)
    assert out.count("[user]") == out.count("[assistant]") == 2
    assert "no row 9" in run(capsys, "preview", data, "--row", 9, status=2)


def test_docstrings_writes_both_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, "docstrings", "--output-dir", tmp_path / "out", "--limit", 60)
    assert "rows in" in out
    written = [(tmp_path / "out" / f"{n}.jsonl").read_text() for n in ("train", "heldout")]
    assert 0 < sum(text.count("\n") for text in written) <= 60
    assert json.loads(written[0].splitlines()[0]).keys() >= {"prompt", "response", "rating"}
    manifest = json.loads((tmp_path / "out" / "train.jsonl.manifest.json").read_text())
    assert manifest["counts"]["written"] == written[0].count("\n")


def test_rows_that_the_length_leaves_nothing_of_go_to_quarantine(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = {"prompt": "long " * 40, "response": "never read"}
    rows = write(tmp_path / "r.jsonl", PAIR, long, PAIR, {"prompt": "no answer"})
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    words = ("--model", model, "--max-length", 64, "--output", good, "--quarantine", bad)
    out = run(capsys, "validate", rows, *words)
    assert f"2 rows in {good}" in out
    assert f"2 rows in {bad}" in out
    entries = [json.loads(line) for line in bad.read_text().splitlines()]
    assert sorted(entry["line"] for entry in entries) == [2, 4]
    dropped = next(entry for entry in entries if entry["line"] == 2)
    assert "the answer begins beyond the first 64 tokens" in dropped["reason"]
    assert dropped["row"]["response"] == "never read"
    figures = json.loads(run(capsys, "stats", good, "--model", model, "--json"))
    assert figures["trained_share"] == round(figures["trained_tokens"] / figures["all_tokens"], 4)
    assert figures["exact_duplicates"] == 1


def test_a_template_that_tries_to_escape_is_one_paragraph(
    data: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (model / "chat_template.jinja").write_text("{{ messages.__class__.__mro__ }}")
    err = run(capsys, "validate", data, "--model", model, status=2)
    assert "tried to leave the sandbox" in " ".join(err.split())
    assert "Traceback" not in err


@pytest.mark.parametrize("words", [("validate",), ("stats", "--data", "missing.jsonl")])
def test_missing_data_is_refused(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert "data file" in run(capsys, *words, status=2)


NOTE = "Keys of the data that are not used: 'id' (2 rows)."


def test_unused_keys_are_reported_by_every_verb(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write(tmp_path / "r.jsonl", *({**PAIR, "id": number} for number in range(2)))
    words = ("--model", str(model), "--max-length", "64")
    for verb in ("validate", "stats", "preview"):
        for more in ((), words):
            assert main(["data", verb, str(rows), *more]) == 0
            assert capsys.readouterr().err.count(NOTE) == 1, (verb, more)
    run_dir = str(tmp_path / "run")
    train = ["train", "--data", str(rows), "--output-dir", run_dir, "--dry-run", *words]
    assert main(train) == 0
    assert capsys.readouterr().err.count(NOTE) == 1


def test_strict_refuses_what_would_not_be_used(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    thinking = {"role": "assistant", "content": "Answer", "reasoning_content": "Because"}
    messages = {"messages": [{"role": "user", "content": "Ask"}, thinking]}
    words = ("--model", model, "--max-length", 64)
    good = write(tmp_path / "good.jsonl", PAIR)
    run(capsys, "validate", good, *words, "--strict")
    rows = write(tmp_path / "r.jsonl", messages)
    assert "leaves out the reasoning of 1 messages" in run(
        capsys, "validate", rows, *words, "--strict", status=2
    )
    run(capsys, "validate", rows, *words)
    for row in ({**PAIR, "id": 1}, {**PAIR, "response": "long " * 40}):
        rows = write(tmp_path / "r.jsonl", row)
        assert "(--strict)" in run(capsys, "validate", rows, *words, "--strict", status=2)
