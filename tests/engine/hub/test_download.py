import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from engine.errors import ConfigError
from engine.hub.download import RemoteFiles, cached_snapshot, download
from engine.hub.failures import refusal
from engine.hub.names import HubName, hub_name
from tests.support.hub_stub import COMMIT, HubStub, StubRepository

FILES = {"a.json": b"{}", "b.bin": bytes(5000)}


def everything(remote: RemoteFiles) -> list[str]:
    return remote.names()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("org/name", HubName("org/name")),
        ("org/name@v1.0", HubName("org/name", "v1.0")),
        ("org/name@refs/pr/3", HubName("org/name", "refs/pr/3")),
        ("org/a.b-c_1/x/y.gguf", HubName("org/a.b-c_1", None, "x/y.gguf")),
        ("org/name@v1/x.gguf", HubName("org/name", "v1", "x.gguf")),
        ("name", None),
        ("/org/name", None),
        ("org/name/", None),
        ("org/name/x.bin", None),
        ("org/name@", None),
        ("../org/name", None),
    ],
)
def test_a_name_of_the_hub_is_read(name: str, expected: HubName | None) -> None:
    assert hub_name(name) == expected


def test_the_name_s_own_revision_wins() -> None:
    assert hub_name("org/name@a", "b") == HubName("org/name", "a")
    assert hub_name("org/name", "b") == HubName("org/name", "b")


def test_the_command_fetches_what_is_named() -> None:
    name = HubName("org/name", "v1", "x.gguf", "dataset")
    assert name.command() == "hf download org/name x.gguf --repo-type dataset --revision v1"


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("gated", r"org/x is gated.* Accept them at http://127.0.0.1:\d+/org/x, then run `hf auth"),
        ("missing", "no model 'org/x', or it is private"),
        ("revision", "org/x has no branch, tag or commit 'main'"),
        ("forbidden", r"refuses org/x \(403\): the token"),
        ("expired", r"refuses org/x \(401\): the token"),
        ("broken", r"answered 500 for org/x .* Try again later"),
    ],
)
def test_a_refusal_of_the_hub_is_explained(stub: HubStub, fault: str, message: str) -> None:
    stub.repositories["org/x"] = StubRepository(FILES, fault=fault)
    with pytest.raises(ConfigError, match=message) as caught:
        download(HubName("org/x"), everything)
    assert "\n" not in str(caught.value) and stub.token not in str(caught.value)
    assert cached_snapshot(HubName("org/x")) is None


@pytest.mark.parametrize(
    ("status", "message"),
    [("401 Unauthorized", "HF_TOKEN"), ("403 Forbidden", "HF_TOKEN"), ("503 Busy", "later")],
)
def test_what_the_storage_s_own_client_was_answered_is_no_silence(
    status: str, message: str
) -> None:
    kind = "server" if status.startswith("5") else "client"
    text = f"Network error: Request error: HTTP status {kind} error ({status}), domain: http://x/y"
    explained = refusal(RuntimeError(text), HubName("org/name"), "write")
    assert explained is not None
    assert message in explained
    assert status.split()[0] in explained
    assert refusal(RuntimeError("connection refused"), HubName("org/name"), "write") is None


def test_a_download_that_breaks_off_is_explained_and_goes_on(
    stub: HubStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the client waits between its tries
    stub.repositories["org/x"] = StubRepository(FILES, fault="cut")
    with pytest.raises(ConfigError, match=r"could not be downloaded from .* hf download org/x$"):
        download(HubName("org/x"), everything)
    stub.repositories["org/x"].fault = None
    stub.requests.clear()
    folder = download(HubName("org/x"), everything)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == FILES
    assert stub.downloads() == ["b.bin"]  # what had arrived is not asked for again


def test_nobody_who_answers_is_no_wait(stub: HubStub, monkeypatch: pytest.MonkeyPatch) -> None:
    stub.server_close()
    started = time.monotonic()
    with pytest.raises(ConfigError, match=r"could not be downloaded .* hf download org/x$"):
        download(HubName("org/x"), everything)
    assert time.monotonic() - started < 5


def test_a_server_that_never_answers_is_given_up(
    stub: HubStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.hub.download._TIMEOUT", 0.2)
    stub.silent_for = 1.0
    with pytest.raises(ConfigError, match=r"timed out.*hf download org/x$"):
        download(HubName("org/x"), everything)


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_a_disk_without_room_is_found_before_the_download(
    stub: HubStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub.repositories["org/x"] = StubRepository(FILES)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(10**9, 10**9 - 5001, 5001))
    with pytest.raises(ConfigError, match=r"takes 0\.0 GB, and 0\.0 GB are free .* HF_HOME"):
        download(HubName("org/x"), everything)
    assert stub.downloads() == []
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(10**9, 10**9 - 5002, 5002))
    assert download(HubName("org/x"), everything).name == COMMIT


def test_a_download_says_how_much_it_is(stub: HubStub, caplog: pytest.LogCaptureFixture) -> None:
    stub.repositories["org/x"] = StubRepository({**FILES, "c.bin": bytes(1_500_000)})
    with caplog.at_level(logging.INFO, "engine"):
        download(HubName("org/x"), lambda remote: ["c.bin", "a.json"])
    assert "org/x: 2 files, 1.5 MB to download" in caplog.text


@pytest.mark.parametrize(
    ("variables", "cache"),
    [
        ({"HF_HOME": "{0}/home"}, "home/hub"),
        ({"HF_HUB_CACHE": "{0}/own"}, "own"),
        ({"XDG_CACHE_HOME": "{0}/xdg"}, "xdg/huggingface/hub"),
    ],
)
def test_the_environment_says_where_the_cache_is_and_that_nothing_is_asked(
    tmp_path: Path, golden: Callable[[str], Path], variables: dict[str, str], cache: str
) -> None:
    snapshot = tmp_path / cache / "models--org--tiny" / "snapshots" / COMMIT
    shutil.copytree(golden("llama"), snapshot)
    (snapshot / "tokenizer.json").write_text("{}")
    own = {name: value.format(tmp_path) for name, value in variables.items()}
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "XDG_"))}
    command = (
        "from engine.model_sources.hub import resolve\n"
        f"print(resolve('org/tiny@{COMMIT}'))\nresolve('org/other')"
    )
    done = subprocess.run(
        [sys.executable, "-c", command], env={**environment, **own, "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == str(snapshot)
    assert "HF_HUB_OFFLINE forbids to ask for it" in done.stderr
    assert f"the cache {tmp_path / cache}" in done.stderr
