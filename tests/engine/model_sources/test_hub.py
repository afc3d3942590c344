import shutil
import sys
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants

from engine.errors import CheckpointError, ConfigError
from engine.model_sources.adapter.config import AdapterConfig
from engine.model_sources.adapter.peft import load_adapter, save_adapter
from engine.model_sources.adapter_path import adapter_path
from engine.model_sources.hub import resolve
from engine.model_sources.open import open_model_source

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, on a machine that may not use the network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "hub").mkdir()
    return tmp_path / "hub"


def fill(cache: Path, source: Path, names: tuple[str, ...]) -> Path:
    """Put files of `source` into the cache as the hub does, as links to blobs."""
    repository = cache / "models--org--tiny"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    for name in names:
        shutil.copy(source / name, repository / "blobs" / f"blob-{name}")
        (snapshot / name).symlink_to(f"../../blobs/blob-{name}")
    return snapshot


def test_a_local_path_never_asks_the_hub(
    golden: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", None)
    assert resolve(str(golden("llama"))) == golden("llama")
    assert open_model_source(golden("llama")).config.model_type == "llama"


def test_a_cached_model_opens_without_a_network(cache: Path, golden: Callable[[str], Path]) -> None:
    snapshot = fill(cache, golden("llama"), ("config.json", "model.safetensors"))
    assert resolve("org/tiny") == snapshot
    checkpoint = open_model_source("org/tiny")
    assert checkpoint.tensor("model.norm.weight").shape == (64,)


def test_a_revision_is_looked_up_in_the_cache(cache: Path, golden: Callable[[str], Path]) -> None:
    snapshot = fill(cache, golden("llama"), ("config.json", "model.safetensors"))
    assert resolve("org/tiny", COMMIT) == snapshot
    with pytest.raises(ConfigError, match="'org/tiny at other' is no path"):
        resolve("org/tiny", "other")


def test_a_model_that_cannot_be_reached_is_named(cache: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"'org/tiny' is no path .* is not in the cache"
    ) as caught:
        resolve("org/tiny")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("names", [("config.json",), ("model.safetensors",)])
def test_half_a_model_in_the_cache_is_fetched_again(
    cache: Path,
    golden: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    names: tuple[str, ...],
) -> None:
    fill(cache, golden("llama"), names)
    calls = []
    original = huggingface_hub.snapshot_download

    def record(repository: str, *, local_files_only: bool, **kwargs: Any) -> object:
        calls.append(local_files_only)
        if local_files_only:
            return original(repository, local_files_only=True, **kwargs)
        raise OSError("no route to host\nsecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", record)
    with pytest.raises(ConfigError, match=r"only partly in the cache.*\(no route to host\)"):
        resolve("org/tiny")
    assert calls == [True, False]


@pytest.mark.parametrize("online", [True, False])
def test_a_model_without_a_tokenizer_in_the_cache_is_fetched_again(
    cache: Path,
    golden: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    online: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    snapshot = fill(cache, golden("llama"), ("config.json", "model.safetensors"))
    original, calls = huggingface_hub.snapshot_download, list[bool]()

    def record(repository: str, *, local_files_only: bool, **kwargs: Any) -> object:
        calls.append(local_files_only)
        if local_files_only:
            return original(repository, local_files_only=True, **kwargs)
        if not online:
            raise OSError("no route to host\nsecond line")
        (snapshot / "tokenizer.json").write_text("{}")
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", record)
    for _ in range(2):
        assert resolve("org/tiny") == snapshot
    assert calls == ([True, False, True] if online else [True, False] * 2)
    assert ("cannot be asked for it (no route to host)" in caplog.text) is not online


def test_a_folder_with_a_configuration_and_a_gguf_file_says_what_to_do(
    tmp_path: Path, golden: Callable[[str], Path]
) -> None:
    shutil.copy(golden("llama") / "config.json", tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=rf"give it as --model {tmp_path}/model.gguf"):
        open_model_source(tmp_path)


def test_a_download_takes_no_pickles_or_duplicates(
    cache: Path, golden: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(
        repository: str,
        *,
        local_files_only: bool,
        allow_patterns: list[str],
        ignore_patterns: list[str],
        **kwargs: object,
    ) -> str:
        if local_files_only:
            raise huggingface_hub.errors.LocalEntryNotFoundError("not cached")
        names = [
            "config.json",
            "model.safetensors",
            "chat_template.jinja",
            "tokenizer.model",
            "pytorch_model.bin",
            "original/consolidated.00.pth",
            "original/params.json",
            "consolidated.safetensors",
            "model.gguf",
        ]
        downloaded = [
            name
            for name in names
            if any(fnmatch(name, pattern) for pattern in allow_patterns)
            and not any(fnmatch(name, pattern) for pattern in ignore_patterns)
        ]
        assert downloaded == names[:4]
        return str(golden("llama"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve("org/tiny") == golden("llama")


def test_one_gguf_file_of_a_repository_can_be_named(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(repository: str, file: str, **kwargs: object) -> str:
        assert (repository, file) == ("org/tiny-GGUF", "sub/tiny.Q8_0.gguf")
        return str(tmp_path / "tiny.gguf")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert resolve("org/tiny-GGUF/sub/tiny.Q8_0.gguf") == tmp_path / "tiny.gguf"


@pytest.mark.parametrize("name", ["./missing", "missing", "a/b/c", "missing.gguf", "", "a b/c"])
def test_what_is_neither_a_path_nor_an_id_is_refused_without_the_hub(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", None)
    with pytest.raises(ConfigError, match="no file or folder"):
        resolve(name)


def test_a_path_below_a_folder_of_this_machine_is_no_id(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="no file or folder 'runs/absent'"):
        resolve("runs/absent")
    with pytest.raises(ConfigError, match="no adapter 'runs/absent'"):
        adapter_path("runs/absent")


def test_an_adapter_of_the_hub_is_used_from_the_cache(
    cache: Path, golden: Callable[[str], Path], tmp_path: Path
) -> None:
    config = AdapterConfig(r=1, lora_alpha=1, target_modules=["q_proj"])
    save_adapter(tmp_path / "a", config, {"model.q_proj": (torch.ones(1, 2), torch.ones(2, 1))})
    snapshot = fill(cache, tmp_path / "a", ("adapter_config.json", "adapter_model.safetensors"))
    assert adapter_path("org/tiny") == snapshot
    assert load_adapter(adapter_path("org/tiny")).pairs.keys() == {"model.q_proj"}
    with pytest.raises(ConfigError, match=r"'org/other' is no path .* is not in the cache"):
        adapter_path("org/other")


def test_a_network_error_is_a_config_error(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def fail(*args: object, **kwargs: object) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("cannot connect")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ConfigError, match="cannot connect"):
        resolve("org/tiny")
