"""Names that begin with ~ where nobody has such a home."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cli.main import main
from engine.config.tasks.inference import EvalSettings
from engine.config.train_config import TrainConfig
from engine.errors import ConfigError
from engine.pipelines.recipe import read_recipe
from engine.storage.home import expanded
from engine.sweeps.recipe import read_sweep


def test_a_tilde_stands_for_a_home_that_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expanded("~/models") == tmp_path / "models"
    assert expanded("~nobody-of-this-name/x") == Path("~nobody-of-this-name/x")
    assert expanded(Path("a/~/b")) == Path("a/~/b")


def test_every_setting_that_is_a_path_may_begin_with_a_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = TrainConfig(model="m", data="d", output_dir="~/runs", resume="~/runs/a")
    assert (config.output_dir, config.resume) == (tmp_path / "runs", str(tmp_path / "runs" / "a"))
    given: dict[str, Any] = {"model": "m", "tasks": "t", "include_path": ("~/tasks", "./~/x")}
    read = EvalSettings(**given)
    assert read.include_path == (tmp_path / "tasks", Path("~/x"))


@pytest.mark.parametrize("read", [read_sweep, read_recipe])
def test_the_folders_of_sweeps_and_pipelines_are_read_as_those_of_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Callable[[Path], Any]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "file.yaml"
    content: dict[str, Any] = {
        "parameters": {"learning_rate": [1e-4]},
        "stages": [{"run": "bench", "with": {"output": "~/bench"}}],
    }
    content.pop("stages" if read is read_sweep else "parameters")
    file.write_text(json.dumps(content | {"output_dir": "~/all"}))
    assert read(file).output_dir == tmp_path / "all"
    if read is read_recipe:
        assert read(file).stages[0].outputs() == [tmp_path / "bench"]
    for wrong in ("s3://bucket/all", "a\0b", "\ud800"):
        file.write_text(json.dumps(content | {"output_dir": wrong}))
        with pytest.raises(ConfigError, match="`output_dir` = "):
            read(file)


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
