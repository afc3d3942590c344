import json
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from engine.errors import CheckpointError, ConfigError
from engine.memory.find_model import find_model
from engine.model_sources.adapter.config import AdapterConfig
from engine.model_sources.adapter.peft import load_adapter, save_adapter
from engine.model_sources.adapter_path import adapter_path
from engine.model_sources.hub import resolve
from engine.model_sources.open import describe_model, open_model_source
from tests.support.hub_stub import COMMIT, HubStub, StubRepository

UNUSED = {
    "pytorch_model.bin": b"pickle",
    "original/consolidated.00.pth": b"pickle",
    "original/params.json": b"{}",
    "onnx/config.json": b"{}",
    "consolidated.safetensors": b"again",
    "model.fp16.safetensors": b"again",
    "model.gguf": b"again",
    "flax_model.msgpack": b"again",
    "modeling_tiny.py": b"code",
    "README.md": b"text",
}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, on a machine where every socket is refused."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    forbid_sockets(monkeypatch)
    (tmp_path / "hub").mkdir()
    return tmp_path / "hub"


def forbid_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def fill(cache: Path, source: Path, names: tuple[str, ...], reference: str = "main") -> Path:
    """Put files of `source` into the cache as the hub does, as links to blobs."""
    repository = cache / "models--org--tiny"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs" / reference).parent.mkdir(parents=True)
    (repository / "refs" / reference).write_text(COMMIT)
    for name in names:
        shutil.copy(source / name, repository / "blobs" / f"blob-{name}")
        (snapshot / name).symlink_to(f"../../blobs/blob-{name}")
    return snapshot


def tiny_files(folder: Path) -> dict[str, bytes]:
    """The files of a repository with a model, a tokenizer, and much that is not needed."""
    names = ("config.json", "generation_config.json", "model.safetensors")
    own = {name: (folder / name).read_bytes() for name in names}
    own |= {"tokenizer.json": b"{}", "chat_template.jinja": b"{{ messages }}"}
    return own | {"additional_chat_templates/rag.jinja": b"{{ 1 }}"} | UNUSED


@pytest.mark.parametrize("client", [True, False])
def test_a_local_path_never_asks_the_hub(
    golden: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, client: bool
) -> None:
    forbid_sockets(monkeypatch)
    if not client:
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
        monkeypatch.setitem(sys.modules, "huggingface_hub.errors", None)
    assert resolve(str(golden("llama"))) == golden("llama")
    assert open_model_source(golden("llama")).config.model_type == "llama"


@pytest.mark.parametrize("offline", [True, False])
def test_a_cached_model_opens_without_a_network(
    cache: Path, golden: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, offline: bool
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    (golden_files := cache.parent / "files").mkdir()
    for name, content in tiny_files(golden("llama")).items():
        if "/" not in name:
            (golden_files / name).write_bytes(content)
    names = ("config.json", "model.safetensors", "tokenizer.json")
    snapshot = fill(cache, golden_files, names)
    assert resolve("org/tiny") == snapshot
    assert open_model_source("org/tiny").tensor("model.norm.weight").shape == (64,)


@pytest.mark.parametrize("reference", ["v1.0", "refs/pr/3"])
def test_a_revision_is_looked_up_in_the_cache(
    cache: Path, golden: Callable[[str], Path], reference: str
) -> None:
    snapshot = fill(cache, golden("llama"), ("config.json", "model.safetensors"), reference)
    for name, revision in (
        (f"org/tiny@{reference}", None), ("org/tiny", reference), (f"org/tiny@{COMMIT}", None)
    ):  # fmt: skip
        assert resolve(name, revision) == snapshot
    with pytest.raises(ConfigError, match=r"hf download org/tiny --revision other$"):
        resolve("org/tiny@other")
    with pytest.raises(ConfigError, match=r"'org/tiny' is no path .* hf download org/tiny$"):
        resolve("org/tiny")


def test_a_model_that_cannot_be_reached_names_the_command(cache: Path) -> None:
    with pytest.raises(ConfigError, match=r"not wholly in the cache") as caught:
        resolve("org/tiny")
    assert str(caught.value).endswith("hf download org/tiny")
    assert "\n" not in str(caught.value)


def test_only_the_needed_files_are_downloaded(stub: HubStub, golden: Callable[[str], Path]) -> None:
    files = tiny_files(golden("llama"))
    stub.repositories["org/tiny"] = StubRepository(files)
    folder = resolve("org/tiny")
    assert sorted(stub.downloads()) == sorted(set(files) - set(UNUSED))
    assert stub.downloads()[-1] == "model.safetensors"  # what is needed to read them comes first
    assert open_model_source(folder).config.model_type == "llama"
    stub.requests.clear()
    assert resolve("org/tiny") == resolve(f"org/tiny@{COMMIT}") == folder
    assert stub.requests == []


def test_shards_are_those_that_the_index_names(
    stub: HubStub, golden: Callable[[str], Path]
) -> None:
    files = tiny_files(golden("llama"))
    weights = files.pop("model.safetensors")
    shards = ["model.safetensors-00001-of-00002.safetensors", "b.safetensors"]
    index = {"weight_map": {"a": shards[0], "b": shards[1], "c": shards[0]}}
    files |= dict.fromkeys(shards, weights) | {"other.safetensors": b"x"}
    files["model.safetensors.index.json"] = json.dumps(index).encode()
    stub.repositories["org/tiny"] = StubRepository(files)
    folder = resolve("org/tiny")
    assert {path.name for path in folder.glob("*.safetensors")} == set(shards)
    del files[shards[0]]
    stub.repositories["org/half"] = StubRepository(files)
    with pytest.raises(ConfigError, match=f"org/half has no file {shards[0]}"):
        resolve("org/half")


def test_a_description_downloads_no_weights(stub: HubStub, golden: Callable[[str], Path]) -> None:
    stub.repositories["org/tiny"] = StubRepository(tiny_files(golden("llama")))
    assert describe_model("org/tiny").config.model_type == "llama"
    assert "model.safetensors" not in stub.downloads()
    stub.requests.clear()
    assert open_model_source("org/tiny").names()
    assert stub.downloads() == ["model.safetensors"]
    stub.repositories["org/plan"] = stub.repositories["org/tiny"]
    stub.requests.clear()
    find_model("org/plan")
    assert stub.downloads() == ["config.json"]


@pytest.mark.parametrize("missing", ["model.safetensors", "config.json"])
def test_half_a_model_in_the_cache_is_completed(
    stub: HubStub, golden: Callable[[str], Path], missing: str
) -> None:
    stub.repositories["org/tiny"] = StubRepository(tiny_files(golden("llama")))
    folder = resolve("org/tiny")
    (folder / missing).resolve().unlink()
    (folder / missing).unlink()
    stub.requests.clear()
    assert resolve("org/tiny") == folder
    assert stub.downloads() == [missing]


@pytest.mark.parametrize("online", [True, False])
def test_a_model_without_a_tokenizer_in_the_cache_asks_for_it(
    stub: HubStub, golden: Callable[[str], Path], online: bool, caplog: pytest.LogCaptureFixture
) -> None:
    files = tiny_files(golden("llama"))
    tokenizer = files.pop("tokenizer.json")
    stub.repositories["org/tiny"] = StubRepository(files)
    folder = resolve("org/tiny")
    stub.repositories["org/tiny"] = StubRepository(
        files | {"tokenizer.json": tokenizer}, fault=None if online else "broken"
    )
    caplog.clear()
    assert resolve("org/tiny") == folder
    assert (folder / "tokenizer.json").exists() is online
    assert ("no tokenizer in the cache: The hub answered 500" in caplog.text) is not online


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (("config.json", "pytorch_model.bin"), r"pickles only \(pytorch_model.bin\)"),
        (("config.json", "README.md"), "neither model.safetensors nor"),
        (("a.Q8_0.gguf", "b.gguf"), r"name one of them, as org/odd/a.Q8_0.gguf\. It has .*b.gguf"),
        (("adapter_config.json", "adapter_model.safetensors"), "is an adapter, not a model"),
        (("README.md",), "holds no config.json; it holds README.md"),
    ],
)
def test_a_repository_that_is_no_model_says_what_it_is(
    stub: HubStub, files: tuple[str, ...], message: str
) -> None:
    stub.repositories["org/odd"] = StubRepository(dict.fromkeys(files, b"{}"))
    with pytest.raises(ConfigError, match=message):
        resolve("org/odd")


def test_gguf_files_of_a_repository_come_with_their_other_parts(stub: HubStub) -> None:
    files = {f"sub/t.Q8_0-0000{n}-of-00002.gguf": b"GGUF" + bytes([n]) for n in (1, 2)}
    stub.repositories["org/t-GGUF"] = StubRepository({**files, "sub/other.gguf": b"GGUF"})
    first = next(iter(files))
    path = resolve(f"org/t-GGUF/{first}")
    assert path.read_bytes() == files[first] and sorted(stub.downloads()) == sorted(files)
    stub.requests.clear()
    assert resolve(f"org/t-GGUF@{COMMIT}/{first}") == path
    assert stub.requests == []
    with pytest.raises(ConfigError, match=r"has no file sub/absent\.gguf; it holds"):
        resolve("org/t-GGUF/sub/absent.gguf")


def test_a_folder_with_a_configuration_and_a_gguf_file_says_what_to_do(
    tmp_path: Path, golden: Callable[[str], Path]
) -> None:
    shutil.copy(golden("llama") / "config.json", tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=rf"give it as --model {tmp_path}/model.gguf"):
        open_model_source(tmp_path)


@pytest.mark.parametrize(
    "name", ["./missing", "missing", "a/b/c", "missing.gguf", "", "a b/c", "a/b@", "a/b@-x"]
)
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


def adapter_files(folder: Path) -> dict[str, bytes]:
    config = AdapterConfig(r=1, lora_alpha=1, target_modules=["q_proj"])
    save_adapter(folder, config, {"model.q_proj": (torch.ones(1, 2), torch.ones(2, 1))})
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_any_path_that_leads_to_an_adapter_means_it(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "first"
    run.mkdir(parents=True)
    files = adapter_files(run / "adapter")
    assert {adapter_path(run), *(adapter_path(run / "adapter" / name) for name in files)} == {
        run / "adapter"
    }
    checkpoint = run / "checkpoint-2"
    checkpoint.mkdir()
    (checkpoint / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match=f"it is a checkpoint. Give --adapter {run}/adapter"):
        adapter_path(checkpoint)
    with pytest.raises(CheckpointError, match=f"but the runs {run} do: name one of them"):
        adapter_path(tmp_path / "runs")
    shutil.rmtree(run / "adapter")
    with pytest.raises(CheckpointError, match=f"To have one, go on .* engine resume {run}"):
        adapter_path(checkpoint)


def test_an_adapter_of_the_hub_is_used_from_the_cache(cache: Path, tmp_path: Path) -> None:
    adapter_files(tmp_path / "a")
    snapshot = fill(cache, tmp_path / "a", ("adapter_config.json", "adapter_model.safetensors"))
    assert adapter_path("org/tiny") == adapter_path(Path(f"org/tiny@{COMMIT}")) == snapshot
    assert load_adapter(adapter_path("org/tiny")).pairs.keys() == {"model.q_proj"}
    with pytest.raises(ConfigError, match=r"'org/other' is no path .* hf download org/other"):
        adapter_path("org/other")


def test_an_adapter_of_the_hub_comes_with_what_is_known_of_its_base(
    stub: HubStub, tmp_path: Path
) -> None:
    files = adapter_files(tmp_path / "a") | {"base.json": b"{}", "optimizer.pt": b"pickle"}
    files["generation_config.json"] = b'{"eos_token_id": [3]}'
    stub.repositories["org/a"] = StubRepository(files)
    folder = adapter_path("org/a")
    assert {path.name for path in folder.iterdir()} == set(files) - {"optimizer.pt", "README.md"}
    stub.requests.clear()
    assert adapter_path("org/a") == folder and stub.requests == []


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (("config.json", "model.safetensors"), "is a model, not an adapter"),
        (("adapter_config.json", "adapter_model.bin"), "as a pickle"),
        (("README.md",), "has no file adapter_config.json"),
    ],
)
def test_a_repository_that_is_no_adapter_says_what_it_is(
    stub: HubStub, files: tuple[str, ...], message: str
) -> None:
    stub.repositories["org/odd"] = StubRepository(dict.fromkeys(files, b"{}"))
    with pytest.raises(ConfigError, match=message):
        adapter_path("org/odd")
