"""Files whose names are no UTF-8, and folders of caches that hold somebody else's files."""

import json
import os
from pathlib import Path

import pytest

from cli.main import main
from engine.data.dataset import RowChoice
from engine.data.sources.resolve import RowFile
from engine.data.streaming.indexed_rows import IndexedRows
from engine.model_sources.interface.checks import quick_digest
from engine.storage.cache_folder import keep_newest

ODD = os.fsdecode(b"odd-\xff")
_ROW = json.dumps({"prompt": "p", "response": "r"}) + "\n"


@pytest.mark.parametrize("ending", [".jsonl", ".csv"])
def test_rows_in_a_file_whose_name_is_no_utf8_are_indexed(tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"{ODD}{ending}"
    file.write_text(_ROW if ending == ".jsonl" else "prompt,response\np,r\n")
    rows = IndexedRows([RowFile(file, "rows")], RowChoice(), tmp_path / "cache")
    assert rows.count == 1


def test_a_model_file_whose_name_is_no_utf8_has_a_digest(tmp_path: Path) -> None:
    file = tmp_path / f"{ODD}.gguf"
    file.write_text("weights")
    assert len(quick_digest({}, [file])) == 64


def test_corpora_are_made_of_files_whose_names_are_no_utf8(tmp_path: Path) -> None:
    docs, rows, recipe = tmp_path / "docs", tmp_path / f"{ODD}.jsonl", tmp_path / "mix.json"
    docs.mkdir()
    (docs / f"{ODD}.md").write_text("# A page\n\n" + "Some words. " * 40)
    rows.write_text(_ROW)
    recipe.write_text(json.dumps({"sources": [{"path": str(rows)}]}))
    pages = ("pairs", "--docs", str(docs), "--mode", "prose", "--all-pages")
    for words in (pages, ("mix", "--config", str(recipe))):
        output = tmp_path / f"{words[0]}.jsonl"
        assert main(["data", *words, "--output", str(output)]) == 0
        assert output.read_text()


def test_a_cache_keeps_its_newest_files_and_every_one_that_is_not_its_own(tmp_path: Path) -> None:
    own = [tmp_path / f"{number:064x}.tokens" for number in range(4)]
    theirs = [tmp_path / name for name in ("mine.tokens", f"{9:064x}.other", f"{9:063x}.tokens")]
    for age, file in enumerate([*own, *theirs]):
        file.write_text("")
        os.utime(file, (1000 - age, 1000 - age))
    keep_newest(tmp_path, ".tokens", 2)
    assert sorted(tmp_path.iterdir()) == sorted([*own[:2], *theirs])


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_templates_that_never_end_are_told_in_a_paragraph(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.storage.safe_files._PATIENCE", 0.1)
    file = tmp_path / "templates.yaml"
    if kind == "pipe":
        os.mkfifo(file)
    else:
        file.symlink_to("/dev/zero")
    words = ["data", "synth", "--templates", str(file), "--output", str(tmp_path / "o.jsonl")]
    assert main(words) == 2
    assert str(file) in capsys.readouterr().err
