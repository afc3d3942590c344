"""Several adapters on one base are models of their own, in the same passes."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import engine
from engine.config.tasks.serving import ServeSettings
from engine.errors import ConfigError
from engine.serving.load_service import load_service, named_adapters
from engine.serving.server import SHUTTING_DOWN
from tests.engine.serving.conftest import Api
from tests.support.saved_adapter import write_random_adapter


def test_requests_at_once_have_their_own_adapters(tiny_model: Path, tmp_path: Path) -> None:
    adapters = {
        name: write_random_adapter(tmp_path / name, tiny_model, seed)
        for seed, name in enumerate(("one", "two"))
    }
    service = load_service(
        ServeSettings(
            model=str(tiny_model), name="base", device="cpu",
            adapter=(f"one={adapters['one']}", str(adapters["two"])),
        )
    )  # fmt: skip
    service.thread.start()
    api = Api(service)
    assert list(service.models) == ["base", "one", "two"]

    def said(model: str) -> Any:
        answer = api.chat("Hello", model=model, temperature=0, max_tokens=16)
        assert answer["model"] == model
        return answer["choices"][0]["message"]["content"]

    names = ["base", "one", "two"] * 4
    with ThreadPoolExecutor(12) as pool:
        texts = list(pool.map(said, names))
    api.http.close()
    service.thread.stop(SHUTTING_DOWN)
    for name, text in zip(names, texts, strict=True):
        own = engine.generate(tiny_model, "Hello", adapters.get(name), max_new_tokens=16)
        assert text == own.text, name
    assert len(set(texts)) == 3


def test_names_are_those_of_folders_and_runs(tiny_model: Path, tmp_path: Path) -> None:
    in_run = write_random_adapter(tmp_path / "run" / "adapter", tiny_model, 1)
    write_random_adapter(tmp_path / "plain", tiny_model, 1)
    paths = (str(tmp_path / "run"), str(tmp_path / "plain"), f"named={in_run}")
    named = named_adapters(ServeSettings(model="m", adapter=paths))
    assert list(named) == ["run", "plain", "named"]


def test_a_name_that_is_given_twice_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    first = write_random_adapter(tmp_path / "a" / "tuned", tiny_model, 1)
    second = write_random_adapter(tmp_path / "b" / "tuned", tiny_model, 1)
    with pytest.raises(ConfigError, match="Two adapters"):
        load_service(ServeSettings(model=str(tiny_model), adapter=(str(first), str(second))))
    with pytest.raises(ConfigError, match="both named"):
        load_service(ServeSettings(model=str(tiny_model), adapter=(f"model={first}",)))
    with pytest.raises(ConfigError, match="no adapter"):
        load_service(ServeSettings(model=str(tiny_model), adapter=("nowhere/at/all",)))
