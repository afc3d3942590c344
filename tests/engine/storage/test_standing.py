"""Nothing that a verb did not write is written over, by whatever name it is given."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from cli.main import main
from engine.errors import CheckpointError, ConfigError
from engine.inference.batch_files import refuse_other_output, resume_after
from engine.plots import new_figure, refuse_foreign_picture, save_figure
from engine.storage.safe_files import read_regular
from engine.storage.standing import has_keys, refuse_foreign, refuse_sources

_ROWS = "".join(f'{{"prompt": "p{i}", "response": "r{i}"}}\n' for i in range(3))


def _names_of_rows(folder: Path) -> list[Path]:
    """One file of rows under five names."""
    rows = folder / "rows.jsonl"
    rows.write_text(_ROWS)
    (folder / "sub").mkdir()
    os.link(rows, folder / "hard.jsonl")
    (folder / "soft.jsonl").symlink_to("rows.jsonl")
    (folder / "around").symlink_to(".")
    return [
        rows,
        folder / "hard.jsonl",
        folder / "soft.jsonl",
        folder / "sub" / ".." / "rows.jsonl",
        folder / "around" / "rows.jsonl",
    ]


@pytest.mark.parametrize(
    "words",
    [
        "validate ROWS --report NAME",
        "validate ROWS --quarantine NAME --overwrite",
        "validate ROWS --output NEW --quarantine NAME --overwrite",
        "convert ROWS --output NAME --overwrite",
        "dedup ROWS --output NEW --removed NAME --overwrite",
        "decontaminate OTHER --against ROWS --output NEW --removed NAME --overwrite",
        "mix --config RECIPE --output NEW --report NAME --overwrite",
        "stats ROWS --plot NAME",
    ],
)
def test_rows_that_are_read_are_written_over_by_no_verb(
    tmp_path: Path, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    all_names = _names_of_rows(tmp_path)
    other, new = tmp_path / "other.jsonl", tmp_path / "new.jsonl"
    other.write_text('{"prompt": "q", "response": "s"}\n')
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"sources": [{"path": str(all_names[0])}]}))
    names = {"ROWS": all_names[0], "OTHER": other, "NEW": new, "RECIPE": recipe}
    for names["NAME"] in all_names:
        new.write_text(_ROWS)
        given = [str(names.get(word, word)) for word in ("data", *words.split())]
        assert main(given) == 2
        assert "one of the sources" in (told := capsys.readouterr().err) or "exists" in told
        assert [one.read_text() for one in all_names] == [_ROWS] * len(all_names)


def test_a_configuration_that_is_read_is_written_over_by_no_verb(tmp_path: Path) -> None:
    _names_of_rows(tmp_path)
    recipe, link = tmp_path / "mix.json", tmp_path / "hard.json"
    text = json.dumps({"sources": [{"path": str(tmp_path / "rows.jsonl")}]})
    recipe.write_text(text)
    os.link(recipe, link)
    words = ["data", "mix", "--config", str(recipe), "--output", str(tmp_path / "new.jsonl")]
    for report in (recipe, link, tmp_path / "around" / "mix.json"):
        assert main([*words, "--report", str(report), "--overwrite"]) == 2
    assert recipe.read_text() == link.read_text() == text
    assert not (tmp_path / "new.jsonl").exists()


@pytest.mark.parametrize("output", ["rows.jsonl/x.jsonl", "nowhere.jsonl", "loop/x.jsonl"])
def test_where_one_output_cannot_be_written_none_is(tmp_path: Path, output: str) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(_ROWS)
    (tmp_path / "nowhere.jsonl").symlink_to("missing")
    (tmp_path / "loop").symlink_to("loop")
    before = sorted(tmp_path.iterdir())
    words = ["data", "dedup", str(rows), "--output", str(tmp_path / output)]
    assert main([*words, "--removed", str(tmp_path / "removed.jsonl")]) == 2
    assert sorted(tmp_path.iterdir()) == before


def test_figures_are_replaced_where_they_are_of_the_same_verb(tmp_path: Path) -> None:
    rows, report = tmp_path / "rows.jsonl", tmp_path / "report.json"
    rows.write_text(_ROWS)
    words = ["data", "validate", str(rows), "--report", str(report)]
    assert main(words) == 0
    rows.write_text(_ROWS * 2)
    assert main(words) == 0
    assert json.loads(report.read_text())["read"]["read"] == 6
    report.write_text('{"mine": 1}')
    assert main(words) == 2
    assert report.read_text() == '{"mine": 1}'
    assert main([*words, "--overwrite"]) == 0


def test_a_manifest_of_somebody_else_stays(tmp_path: Path) -> None:
    rows, other = tmp_path / "rows.jsonl", tmp_path / "new.jsonl.manifest.json"
    rows.write_text(_ROWS)
    other.write_text('{"mine": 1}')
    assert main(["data", "convert", str(rows), "--output", str(tmp_path / "new.jsonl")]) == 2
    assert other.read_text() == '{"mine": 1}'


def test_two_outputs_of_one_name_are_refused_through_links(tmp_path: Path) -> None:
    _names_of_rows(tmp_path)
    words = ["data", "dedup", str(tmp_path / "rows.jsonl"), "--output", str(tmp_path / "new.jsonl")]
    assert main([*words, "--removed", str(tmp_path / "around" / "new.jsonl")]) == 2
    words[1] = "validate"
    assert main([*words, "--report", str(tmp_path / "around" / "new.jsonl.manifest.json")]) == 2
    assert not (tmp_path / "new.jsonl").exists()


def test_what_is_no_file_is_not_replaced_by_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, pipe, null = (tmp_path / f"{name}.jsonl" for name in ("rows", "pipe", "null"))
    rows.write_text(_ROWS)
    os.mkfifo(pipe)
    null.symlink_to(os.devnull)
    for output in (pipe, null):
        assert main(["data", "convert", str(rows), "--output", str(output), "--overwrite"]) == 2
        assert f"{output} is no file" in capsys.readouterr().err
    assert pipe.is_fifo() and null.is_symlink()


def test_a_link_that_leads_nowhere_stays(tmp_path: Path) -> None:
    link = tmp_path / "train.yaml"
    link.symlink_to("nowhere")
    assert main(["init", "--model", "m", "--data", "d", "--output", str(link)]) == 2
    assert link.is_symlink()


def test_docstrings_take_the_place_of_no_other_manifest(tmp_path: Path) -> None:
    other = tmp_path / "heldout.jsonl.manifest.json"
    other.write_text('{"mine": 1}')
    assert main(["data", "docstrings", "--output-dir", str(tmp_path), "--limit", "3"]) == 2
    assert other.read_text() == '{"mine": 1}'


def test_gates_are_not_measured_for_a_folder_that_cannot_be_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, gates = tmp_path / "rows.jsonl", tmp_path / "g.yaml"
    rows.write_text(_ROWS)
    gates.write_text("parse_rate: none\ncoverage: none\nperplexity: 5\n")
    words = ["eval", "--model", "no-such-model", "--data", str(rows), "--gates", str(gates)]
    assert main([*words, "--output-dir", str(rows / "out")]) == 2
    assert f"{rows / 'out'} cannot be written to" in capsys.readouterr().err
    assert main([*words, "--output-dir", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()


def test_pictures_are_replaced_where_they_are_ours(tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    figure = new_figure("picture", 1, 1)
    if figure is not None:
        save_figure(figure, picture)
        refuse_foreign_picture(picture)
    for content in (b"\x89PNG\r\n\x1a\nmine", b"mine", b""):
        picture.write_bytes(content)
        with pytest.raises(ConfigError, match="not a picture that engine wrote"):
            refuse_foreign_picture(picture)


def test_answers_go_into_no_file_that_is_not_of_answers(tmp_path: Path) -> None:
    for name in _names_of_rows(tmp_path):
        with pytest.raises(ConfigError, match="one of the sources"):
            refuse_other_output(tmp_path / "rows.jsonl", name)
    for name in (tmp_path, tmp_path / "around", tmp_path / "link"):
        (tmp_path / "link").unlink(missing_ok=True)
        (tmp_path / "link").symlink_to("nowhere")
        with pytest.raises(ConfigError, match="is a link, a folder, a pipe or a device"):
            refuse_other_output(tmp_path / "other.jsonl", name)
    letter = tmp_path / "letter.txt"
    for content in ("a letter", '{"prompt": "p0"}\nmore'):
        letter.write_text(content)
        with pytest.raises(ConfigError, match="no answer"):
            resume_after(letter, [{"prompt": "p0"}])
        assert letter.read_text() == content
    settings = tmp_path / "letter.txt.settings.json"
    settings.write_text('{"mine": 1}')
    with pytest.raises(ConfigError, match="not a file of settings"):
        refuse_other_output(tmp_path / "rows.jsonl", letter)


_RUNS = {
    "forge": ("results.json", "forge.png", "summary.json"),
    "sweep": ("trials.json", "sweep.json", "sweep.md", "sweep.png", "summary.json"),
    "pipeline": ("summary.json",),
    "eval": ("eval_results.json", "eval_answers.jsonl", "eval_gate_failed.json"),
    "bench": ("ops.json", "ops.csv", "roofline.png"),
}


@pytest.mark.parametrize(("verb", "name"), [(v, n) for v, names in _RUNS.items() for n in names])
def test_reports_of_somebody_else_stay(
    tmp_path: Path, verb: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, folder, gates, recipe = (tmp_path / n for n in ("rows.jsonl", "out", "g.yaml", "s.yaml"))
    rows.write_text(_ROWS)
    folder.mkdir()
    (folder / name).write_text('{"mine": 1}')
    stages = tmp_path / "p.yaml"
    stages.write_text(json.dumps({"stages": [{"run": "data validate", "with": {"data": "x"}}]}))
    gates.write_text("parse_rate: none\ncoverage: none\nperplexity: 5\n")
    recipe.write_text(
        json.dumps(
            {
                "with": {"model": "m", "data": [str(rows)], "heldout": 0.4},
                "parameters": {"seed": [1, 2]},
            }
        )
    )
    words = {
        "forge": ["--model", "m", "--data", rows, "--fraction", "0.3", "--output-dir", folder],
        "sweep": [recipe, "--output-dir", folder],
        "pipeline": [stages, "--output-dir", folder],
        "eval": ["--model", "m", "--data", rows, "--gates", gates, "--output-dir", folder],
        "bench": ["--ops", "rms_norm", "--output", folder],
    }
    assert main([verb, *map(str, words[verb])]) == 2
    assert str(folder / name) in capsys.readouterr().err
    assert [(one.name, one.read_text()) for one in folder.iterdir() if one.name != ".lock"] == [
        (name, '{"mine": 1}')
    ]


@pytest.mark.parametrize("verb", ["pipeline", "sweep"])
@pytest.mark.parametrize("name", ["a\0b", "a\ud800b", "", "/", "a/" * 3000])
def test_a_file_that_cannot_be_named_is_told_in_a_paragraph(
    verb: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([verb, f"--file={name}"]) == 2
    assert capsys.readouterr().err.startswith("engine: ")


def _device(folder: Path) -> Path:
    return Path(os.devnull)


def _folder(folder: Path) -> Path:
    return folder


def _circle(folder: Path) -> Path:
    (folder / "loop").symlink_to("loop")
    return folder / "loop"


@pytest.mark.parametrize("made", [_device, _folder, _circle])
def test_what_is_no_file_is_no_output(tmp_path: Path, made: Callable[[Path], Path]) -> None:
    name = made(tmp_path)
    with pytest.raises(ConfigError, match="exists already"):
        refuse_foreign(name, has_keys("a"), "of ours")
    refuse_sources([name], [tmp_path / "missing"])


def test_a_small_file_takes_no_memory_of_its_limit(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"abc")
    assert read_regular(file, 1 << 60) == b"abc"
    with pytest.raises(CheckpointError, match="holds more than"):
        read_regular(file, 2)
