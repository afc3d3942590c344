"""What is sent to the hub, and what never leaves this machine, before a stand-in of its API."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants

from engine.config.train_config import TrainConfig
from engine.errors import ConfigError
from engine.exporting.publish import publish_folder, without_paths
from engine.hub.upload import Destination
from engine.model_sources.adapter.config import AdapterConfig
from engine.model_sources.adapter.peft import load_adapter, save_adapter
from engine.model_sources.hub import resolve
from engine.model_sources.open import open_model_source
from engine.model_sources.pruning_record import read_pruning, sealed
from engine.verbs.models.export import export_adapter, export_gguf
from engine.verbs.models.merge import merge
from engine.verbs.training.train import train
from tests.support.hub_stub import SIGNATURE, HubStub, StubRepository
from tests.support.small_runs import small_run
from tests.support.tokenizer_folder import write_byte_tokenizer

GOLDEN = Path(__file__).parents[2] / "fixtures" / "golden"


def everything_sent(stub: HubStub) -> bytes:
    return b"\0".join(
        part
        for repository in stub.repositories.values()
        for name, data in repository.files.items()
        for part in (name.encode(), data)
    )


def test_a_trained_adapter_is_sent_and_nothing_else_of_its_run(
    stub: HubStub, tiny_model: Path, write_rows: Callable[..., Path], tmp_path: Path,
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    caplog.set_level(logging.DEBUG, "engine")
    rows = write_rows(9)
    settings = small_run(
        tiny_model, rows, tmp_path / "run", push_to_hub="org/tuned", private=True,
        commit_message="First words",
    )  # fmt: skip
    result = train(settings)
    sent = stub.repositories["org/tuned"]
    assert result.pushed == f"{stub.url}/org/tuned/commit/0123456789abcdef0123456789abcdef01234567"
    assert sent.private and sent.messages == ["First words"]
    local = {path.name for path in (tmp_path / "run" / "adapter").iterdir()}
    assert set(sent.files) == local
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= local
    assert b"base_model" in sent.files["README.md"]
    raw = json.loads(sent.files["adapter_config.json"])
    assert raw["base_model_name_or_path"] == tiny_model.name
    everything = everything_sent(stub)
    for path in (tmp_path, Path.home(), Path.cwd()):
        assert str(path).encode() not in everything
    # The token, and addresses that the storage signed, are in no file, log or line.
    written = [path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()]
    shown = "".join(capsys.readouterr()) + caplog.text
    for secret in (stub.token, SIGNATURE):
        assert secret not in shown
        assert not any(secret.encode() in data for data in (*written, everything))
    # What was sent is what an adapter of the hub is.
    folder = tmp_path / "again"
    folder.mkdir()
    for name, data in sent.files.items():
        (folder / name).write_bytes(data)
    before, after = load_adapter(tmp_path / "run" / "adapter"), load_adapter(folder)
    for module, (a, b, *_) in before.pairs.items():
        assert torch.equal(a, after.pairs[module][0]) and torch.equal(b, after.pairs[module][1])


def model(folder: Path) -> Path:
    shutil.copytree(GOLDEN / "qwen3", folder)
    write_byte_tokenizer(folder, open_model_source(str(folder)).config.vocab_size)
    return folder


def test_gguf_files_are_sent_with_a_page_and_can_be_used_from_there(
    stub: HubStub, tmp_path: Path
) -> None:
    result = export_gguf(
        model=str(model(tmp_path / "model")), output=tmp_path / "out" / "m.gguf", type="q8_0",
        modelfile=True, push_to_hub="org/m-GGUF",
    )  # fmt: skip
    sent = stub.repositories["org/m-GGUF"].files
    assert result.pushed is not None
    assert set(sent) == {"m.gguf", "Modelfile", "README.md"}
    assert sent["m.gguf"] == (tmp_path / "out" / "m.gguf").read_bytes()
    page = sent["README.md"].decode()
    assert "base_model_relation: quantized" in page and 'base_model: "model"' in page
    assert str(tmp_path) not in page
    assert open_model_source("org/m-GGUF/m.gguf").config.model_type == "qwen3"
    # A second type beside it leaves the first where it is.
    export_gguf(
        model=str(tmp_path / "model"), output=tmp_path / "out" / "m2.gguf",
        push_to_hub="org/m-GGUF",
    )  # fmt: skip
    assert set(sent) == {"m.gguf", "m2.gguf", "Modelfile", "README.md"}
    assert sent["README.md"].decode() == page


def adapter(folder: Path, **changes: Any) -> Path:
    config = AdapterConfig(r=2, lora_alpha=2, target_modules=["q_proj"], **changes)
    save_adapter(folder, config, {"model.q_proj": (torch.ones(2, 4), torch.ones(4, 2))})
    return folder


def test_a_portable_adapter_is_sent(stub: HubStub, tmp_path: Path) -> None:
    before = adapter(tmp_path / "a", base_model_name_or_path="Qwen/Qwen3-0.6B")
    result = export_adapter(adapter=before, output=tmp_path / "b", push_to_hub="org/b")
    sent = stub.repositories["org/b"].files
    assert result.pushed and set(sent) == {path.name for path in (tmp_path / "b").iterdir()}
    assert json.loads(sent["adapter_config.json"])["base_model_name_or_path"] == "Qwen/Qwen3-0.6B"


def test_a_model_is_sent_without_what_is_no_part_of_it(stub: HubStub, tmp_path: Path) -> None:
    folder = model(tmp_path / "m")
    pruning = sealed({"mode": "zero", "pruned_heads": {}, "model": str(tmp_path / "base")})
    extra = {
        "summary.json": json.dumps({"parameters": {"data": str(tmp_path)}}),
        "pruning.json": json.dumps(pruning),
        "pipeline.log": "log", "rows.jsonl": "{}", "checkpoint-2/weights.safetensors": "x",
        "optimizer.safetensors": "x", "training_args.bin": "x", ".env": "HF_TOKEN=x",
        "README.md": f"Made from `{tmp_path}/base/model-7b` by {Path.home()}/.venv/bin/engine.",
        "additional_chat_templates/rag.jinja": "{{ 1 }}",
    }  # fmt: skip
    for name, text in extra.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer |= {"name_or_path": str(tmp_path / "base"), "unk_token": "/"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    config = json.loads((folder / "config.json").read_text()) | {"_name_or_path": "../base/tiny"}
    (folder / "config.json").write_text(json.dumps(config))
    publish_folder(Destination("org/m"), folder, "Qwen/Qwen3-0.6B")
    sent = stub.repositories["org/m"].files
    assert set(sent) == {
        "config.json", "generation_config.json", "model.safetensors", "pruning.json", "README.md",
        "tokenizer.json", "tokenizer_config.json", "additional_chat_templates/rag.jinja",
    }  # fmt: skip
    assert str(tmp_path).encode() not in everything_sent(stub)
    assert json.loads(sent["config.json"])["_name_or_path"] == "tiny"
    own = json.loads(sent["tokenizer_config.json"])
    assert own["name_or_path"] == "base" and own["unk_token"] == "/"
    assert sent["README.md"].decode() == "Made from `model-7b` by engine."
    (folder / "pruning.json").write_bytes(sent["pruning.json"])
    record = read_pruning(folder)  # its digest fits what was sent
    assert record is not None and record.record["model"] == "base"


def test_a_merged_model_is_sent_with_its_page_and_no_paths(
    stub: HubStub, tiny_model: Path, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    train(small_run(tiny_model, write_rows(9), tmp_path / "run"), console=False)
    result = merge(
        tiny_model, tmp_path / "run", tmp_path / "merged", push_to_hub="org/merged", private=True
    )
    sent = stub.repositories["org/merged"]
    assert result.pushed and sent.private
    assert {"config.json", "model.safetensors", "README.md", "tokenizer.json"} <= sent.files.keys()
    assert not {"summary.json", "manifest.json"} & sent.files.keys()
    everything = everything_sent(stub)
    for path in (tmp_path, Path.home(), Path.cwd()):
        assert str(path).encode() not in everything
    summary = (tmp_path / "merged" / "summary.json").read_text()
    assert stub.token not in summary and stub.token.encode() not in everything
    assert open_model_source("org/merged").config.hidden_size > 0


def test_what_has_no_path_is_sent_byte_by_byte(stub: HubStub, tmp_path: Path) -> None:
    folder = model(tmp_path / "m")
    publish_folder(Destination("org/m"), folder, None)
    for name, data in stub.repositories["org/m"].files.items():
        if name != "README.md":
            assert data == (folder / name).read_bytes(), name
    assert b"library_name: transformers" in stub.repositories["org/m"].files["README.md"]


def test_older_weights_of_the_repository_are_replaced(stub: HubStub, tmp_path: Path) -> None:
    older = ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "own.txt")
    files = {**dict.fromkeys((*older, "pytorch_model.bin"), b"old"), "README.md": b"mine"}
    stub.repositories["org/m"] = StubRepository(files)
    publish_folder(Destination("org/m"), model(tmp_path / "m"), None)
    sent = stub.repositories["org/m"].files
    assert not {*older[:2], "pytorch_model.bin"} & sent.keys()
    assert sent["README.md"] == b"mine" and sent["own.txt"] == b"old"
    assert resolve("org/m").joinpath("model.safetensors").stat().st_size > 1000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"offline": True}, "HF_HUB_OFFLINE forbids"),
        ({"token": None}, "without a token. Run `hf auth login`"),
        ({"token": "hf_wrong"}, r"refuses org/x \(401\).* may write it"),
        ({"name": "no-name"}, "'no-name' is no name of a repository"),
        ({"name": "org/x@main"}, "'org/x@main' is no name of a repository"),
        ({"public": True, "private": True}, "anybody may read it, and --private was asked for"),
        ({"down": True}, r"Nothing could be sent to org/x: .* could not be reached"),
    ],
)
def test_an_upload_that_cannot_be_is_refused_before_the_work(
    stub: HubStub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any],
    message: str,
) -> None:  # fmt: skip
    if "offline" in changes:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    if "token" in changes:
        monkeypatch.setenv("HF_TOKEN", changes["token"] or "")
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    if "public" in changes:
        stub.repositories["org/x"] = StubRepository()
    if "down" in changes:
        stub.server_close()
    with pytest.raises(ConfigError, match=message) as caught:
        export_adapter(
            adapter=adapter(tmp_path / "a"), output=tmp_path / "b",
            push_to_hub=changes.get("name", "org/x"), private=changes.get("private", False),
        )  # fmt: skip
    assert not (tmp_path / "b").exists() and "\n" not in str(caught.value)
    assert not any(method == "POST" for method, _ in stub.requests)


def test_a_failed_upload_says_where_the_result_stands(stub: HubStub, tmp_path: Path) -> None:
    stub.repositories["org/x"] = StubRepository(fault="broken")
    with pytest.raises(ConfigError, match=rf"answered 500 .* hf upload org/x {tmp_path}/a "):
        publish_folder(Destination("org/x"), adapter(tmp_path / "a"))


def test_the_commit_s_settings_need_a_repository() -> None:
    with pytest.raises(ConfigError, match="name a repository"):
        TrainConfig(model="m", data="d", private=True)
    with pytest.raises(ConfigError, match="a name is expected here"):
        TrainConfig(model="m", data="d", push_to_hub=True)
    assert TrainConfig(model="m", data="d", push_to_hub=False).push_to_hub is None


def test_where_a_result_goes_is_no_part_of_what_is_learnt() -> None:
    plain = TrainConfig(model="m", data="d")
    sent = TrainConfig(model="m", data="d", push_to_hub="a/b", private=True, commit_message="x")
    assert plain.trajectory() == sent.trajectory()


def test_a_text_loses_the_paths_of_this_machine_alone(tmp_path: Path) -> None:
    text = f"see https://host/a/b, /v1/models, {tmp_path}/x/y.json and ({Path.cwd()})"
    plain = f"see https://host/a/b, /v1/models, y.json and ({Path.cwd().name})"
    assert without_paths(text, tmp_path / "m") == plain
