"""Models with several chat templates: the default, and those for other occasions by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.errors import ConfigError
from engine.model_sources.model_files import ModelFiles


@pytest.fixture
def folder(tmp_path: Path, golden: Callable[[str], Path]) -> Path:
    shutil.copytree(golden("qwen2"), tmp_path / "model")
    return tmp_path / "model"


def write_list(folder: Path, **named: str) -> None:
    listed = [{"name": name, "template": text} for name, text in named.items()]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": listed}))


def test_templates_of_a_list_have_names(folder: Path) -> None:
    write_list(folder, default="d", tool_use="t")
    files = ModelFiles(folder)
    names = ("default", "tool_use", "rag")
    assert [files.chat_template(name) for name in names] == ["d", "t", None]
    write_list(folder, tool_use="t")
    with pytest.raises(ConfigError, match="one named 'default'"):
        ModelFiles(folder).chat_template()


def test_files_of_templates_win(folder: Path) -> None:
    write_list(folder, default="d", tool_use="t")
    (folder / "chat_template.jinja").write_text("D")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("T")
    files = ModelFiles(folder)
    assert files.chat_template() == "D"
    assert files.chat_template("tool_use") == "T"
    assert set(files.tokenizer_files()) >= {"additional_chat_templates/tool_use.jinja"}


def test_a_single_template_is_the_default(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "d"}))
    files = ModelFiles(folder)
    assert (files.chat_template(), files.chat_template("tool_use")) == ("d", None)


@pytest.mark.parametrize("name", [[], {}, [[1]], {"a": {}}, None, 5])
def test_a_name_that_is_no_text_names_no_template(folder: Path, name: object) -> None:
    listed = [{"name": name, "template": "odd"}, {"name": "default", "template": "d"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": listed}))
    assert ModelFiles(folder).chat_template() == "d"
