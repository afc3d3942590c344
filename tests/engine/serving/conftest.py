"""Clients of the application, in the same process, around a scripted or a tiny real model."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from engine.config.tasks.serving import ServeSettings
from engine.serving.app import build_app
from engine.serving.guards import AccessRules
from engine.serving.load_service import load_service
from engine.serving.server import SHUTTING_DOWN
from engine.serving.service import Service
from engine.tokenization.tokenizer import Tokenizer
from tests.support.scripted_model import scripted_service

LOCAL = AccessRules(hosts=frozenset({"localhost", "127.0.0.1", "::1"}))


class Api:
    """A client of one service, and what tests ask of it."""

    def __init__(self, service: Service, rules: AccessRules = LOCAL) -> None:
        self.service = service
        self.http = TestClient(build_app(service, rules), base_url="http://localhost:8000")

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        """The answer to a request that succeeds."""
        response = self.http.post(path, json=body)
        assert response.status_code == 200, response.text
        answer = response.json()
        assert isinstance(answer, dict)
        return answer

    def chat(self, text: str = "Hi", **body: Any) -> dict[str, Any]:
        return self.post(
            "/v1/chat/completions", messages=[{"role": "user", "content": text}], **body
        )

    def refused(self, path: str, **body: Any) -> tuple[int, dict[str, Any]]:
        """Status and error of a request that fails."""
        response = self.http.post(path, json=body)
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return response.status_code, error

    def stream(self, path: str, **body: Any) -> list[dict[str, Any]]:
        """The events of a stream, without the last mark, which is checked."""
        response = self.http.post(path, json={**body, "stream": True})
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
        assert lines.pop() == "[DONE]"
        return [json.loads(line) for line in lines]


@pytest.fixture
def scripted(tokenizers_by_family: dict[str, Tokenizer]) -> Iterator[Callable[..., Api]]:
    """``scripted("text", family="qwen3")`` is a client of a model that says the text."""
    made: list[Api] = []

    def make(script: Any, family: str = "qwen3", rules: AccessRules = LOCAL, **options: Any) -> Api:
        service = scripted_service(tokenizers_by_family[family], script, **options)
        made.append(Api(service, rules))
        return made[-1]

    yield make
    for api in made:
        api.http.close()
        generator: Any = api.service.thread._generator
        generator.gate.set()
        api.service.thread.stop(SHUTTING_DOWN)


@pytest.fixture
def tiny_api(tiny_model: Path) -> Iterator[Api]:
    """A client of the tiny real model."""
    service = load_service(ServeSettings(model=str(tiny_model), name="tiny", device="cpu"))
    service.thread.start()
    api = Api(service)
    yield api
    api.http.close()
    service.thread.stop(SHUTTING_DOWN)
