import os
import re
import subprocess
from pathlib import Path

import pytest

from cli.main import main
from engine.config.tasks.inference import GenerateSettings
from engine.errors import CheckpointError, ConfigError, EngineError
from engine.storage.safe_files import (
    is_pickle,
    leads_outside,
    open_regular,
    read_given,
    read_json_object,
    read_regular,
    read_text,
)
from engine.storage.strict_json import parse_object
from engine.verbs.models.generate import answer
from tests.support.tiny_model import write_tiny_model


def hub_snapshot(root: Path) -> tuple[Path, Path]:
    """A snapshot folder and the blobs folder of a repository in a hub cache."""
    repository = root / "models--org--name"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    return snapshot, repository / "blobs"


def test_a_link_into_the_same_hub_repository_is_followed(tmp_path: Path) -> None:
    snapshot, blobs = hub_snapshot(tmp_path)
    (blobs / "1234").write_text("content")
    (snapshot / "config.json").symlink_to("../../blobs/1234")
    assert read_text(snapshot / "config.json") == "content"


def test_a_link_to_a_regular_file_is_followed_wherever_it_lies(tmp_path: Path) -> None:
    """As transformers does: people keep a configuration or a shard on another disk."""
    snapshot, _ = hub_snapshot(tmp_path)
    (tmp_path / "elsewhere").write_text("content")
    (snapshot / "config.json").symlink_to("../../../elsewhere")
    assert read_text(snapshot / "config.json") == "content"
    assert leads_outside(snapshot / "config.json")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "b").symlink_to("../elsewhere")
    (tmp_path / "model" / "a").symlink_to("b")
    os.close(open_regular(tmp_path / "model" / "a"))


@pytest.mark.parametrize("kind", ["folder", "pipe", "device"])
def test_a_link_to_what_is_no_regular_file_is_refused(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "target"
    if kind == "folder":
        target.mkdir()
    elif kind == "pipe":
        os.mkfifo(target)
    else:
        target = Path("/dev/zero")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "a").symlink_to(target)
    with pytest.raises(CheckpointError, match=r"not a regular file"):
        read_regular(tmp_path / "model" / "a", 100)


@pytest.mark.parametrize(
    "content",
    ["password", '"password"', '{"password": 1, "password": 2}', '{"a": password}', '["password"]'],
)
def test_what_lies_behind_a_link_out_of_the_folder_is_not_shown(
    tmp_path: Path, content: str
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "secret").write_text(content)
    (tmp_path / "model" / "config.json").symlink_to("../secret")
    with pytest.raises(CheckpointError) as caught:
        read_json_object(tmp_path / "model" / "config.json")
    assert "password" not in str(caught.value)
    assert "put a copy" in str(caught.value)


def test_a_link_within_the_folder_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("content")
    (tmp_path / "link").symlink_to("real")
    assert read_text(tmp_path / "link") == "content"


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe", "dangling", "loop"])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "dangling":
        path.symlink_to("nowhere")
    elif kind == "loop":
        path.symlink_to("a")
    with pytest.raises(CheckpointError, match=str(path)):
        read_regular(path, 100)


def test_a_file_beyond_its_limit_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(11))
    assert read_regular(tmp_path / "a", 11) == bytes(11)
    with pytest.raises(CheckpointError, match="more than"):
        read_regular(tmp_path / "a", 10)


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"ab\xff")
    with pytest.raises(CheckpointError, match="byte 2"):
        read_text(tmp_path / "a")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": 1, "a": 2}', "'a' stands in one object twice"),
        ('{"b": {"a": 1, "\\u0061": 2}}', "'a' stands in one object twice"),
        ('{"a": NaN}', "NaN is not a JSON number"),
        ('{"a": -Infinity}', "-Infinity is not a JSON number"),
        ('{"a": 1', "here:1:8"),
        ('{\n"a": }', "here:2:6"),
        ("[1]", "expected an object"),
        ("", "here:1:1"),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "not acceptable JSON"),
        ('{"a": ' + "9" * 5000 + "}", "not acceptable JSON"),
    ],
)
def test_json_is_read_strictly(text: str, words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        parse_object(text, "here")
    assert words in str(caught.value)
    assert len(str(caught.value)) < 500


def test_whatever_is_wrong_with_a_configuration_is_a_config_error(tmp_path: Path) -> None:
    for name, content in (("cut", b'{"a"'), ("bytes", b"\xff"), ("list", b"[]")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match=name):
            read_json_object(tmp_path / name, ConfigError)
    with pytest.raises(ConfigError, match="ENOENT"):
        read_json_object(tmp_path / "none", ConfigError)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.bin", b"harmless", True),
        ("a.pth", b"", True),
        ("a.dat", b"PK\x03\x04....", True),
        ("a.dat", b"\x80\x02}q\x00.", True),
        ("a.dat", b"\x80\x05\x95", True),
        ("a.dat", b"\x80\x00\x00\x00\x00\x00\x00\x00{", False),
        ("a.dat", b"", False),
    ],
)
def test_a_pickle_is_known_by_name_and_by_its_first_bytes(
    tmp_path: Path, name: str, content: bytes, expected: bool
) -> None:
    (tmp_path / name).write_bytes(content)
    assert is_pickle(tmp_path / name) is expected


def test_a_folder_of_links_into_the_hubs_cache_is_read(tmp_path: Path) -> None:
    """As `ln -s` and earlier downloads with `--local-dir` make them."""
    blobs = tmp_path / "hub" / "models--org--name" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "0123abcd").write_text('{"a": 1}')
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.json").symlink_to(blobs / "0123abcd")
    assert read_json_object(folder / "config.json") == {"a": 1}
    assert not leads_outside(folder / "config.json")


def test_an_object_far_larger_than_any_of_its_kind_is_refused_before_it_is_read(
    tmp_path: Path,
) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b" " * (5 << 20))
    with pytest.raises(CheckpointError, match="more than 4 MiB"):
        read_json_object(path)


@pytest.mark.parametrize("text", ["[0" + ",0" * 300_000, '{"a":[' + "[]," * 200_000, "{" * 300_000])
def test_very_many_values_are_refused_before_any_is_made(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(CheckpointError, match=r"config.json holds more than 262,144 values"):
        read_json_object(path)
    path.write_text('{"template": "' + ": [" * 80_000 + '"}')
    assert len(read_json_object(path)["template"]) == 240_000


@pytest.mark.parametrize("slow", [False, True])
def test_a_pipe_that_the_user_names_is_read_to_its_end(tmp_path: Path, slow: bool) -> None:
    os.mkfifo(tmp_path / "pipe")
    writer = "sleep 0.3; printf a; sleep 0.2; printf bc" if slow else "printf abc"
    with subprocess.Popen(["sh", "-c", f"({writer}) > {tmp_path / 'pipe'}"]):
        assert read_given(tmp_path / "pipe", 10) == b"abc"


def test_a_pipe_without_a_writer_and_an_endless_file_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.storage.safe_files._PATIENCE", 0.1)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="nobody writes to"):
        read_given(tmp_path / "pipe", 10)
    assert read_given(Path("/dev/zero"), 10) == bytes(11)


@pytest.mark.parametrize(
    "words", [["plan", "--config"], ["data", "stats", "--data"], ["import-config"]]
)
def test_no_command_waits_for_a_pipe_that_it_is_given(
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("engine.storage.safe_files._PATIENCE", 0.1)
    os.mkfifo(tmp_path / "pipe.yaml")
    assert main([*words, str(tmp_path / "pipe.yaml")]) == 2
    assert "is a pipe" in capsys.readouterr().err


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 9\n"


@pytest.mark.parametrize(
    ("content", "told"),
    [(POINTER, "a pointer of Git LFS.*git lfs pull"),
     (b"\n<!DOCTYPE html><html>Too many requests</html>" * 40, "a web page"),
     (b"<HTML lang=en>", "a web page")],
)  # fmt: skip
@pytest.mark.parametrize(
    "name",
    ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
     "special_tokens_map.json", "generation_config.json", "model.gguf"],
)  # fmt: skip
def test_what_stands_in_a_files_stead_is_named(
    name: str, content: bytes, told: str, tmp_path: Path
) -> None:
    model = write_tiny_model(tmp_path / "model")
    (model / name).write_bytes(content)
    words = str(model / name) if name == "model.gguf" else str(model)
    with pytest.raises(EngineError, match=f"{re.escape(name)} is {told}"):
        answer(GenerateSettings(model=words, prompt="a", max_new_tokens=1), lambda piece: None)
