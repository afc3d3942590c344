"""Only pages of this machine may ask a page that is served on 127.0.0.1."""

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from engine.errors import ConfigError
from engine.pages.local_access import LocalAccess
from engine.pages.server import listen


def answer(_request: Request) -> PlainTextResponse:
    return PlainTextResponse("the answer")


CLIENT = TestClient(
    Starlette(routes=[Route("/", answer)], middleware=[Middleware(LocalAccess)]),
    base_url="http://127.0.0.1:8765",
)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"host": "localhost:8765"},
        {"host": "LOCALHOST:8765"},
        {"host": "[::1]:8765"},
        {"host": "127.0.0.1"},
        {"origin": "http://127.0.0.1:8765", "sec-fetch-site": "same-origin"},
        {"sec-fetch-site": "none", "sec-fetch-mode": "navigate"},
        {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"},
    ],
)
def test_this_machine_is_answered(headers: dict[str, str]) -> None:
    assert CLIENT.get("/", headers=headers).text == "the answer"


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example"},
        {"host": "evil.example:8765"},
        {"host": "127.0.0.1.evil.example:8765"},
        {"host": "127.0.0.1:8765.evil.example"},
        {"host": "127.0.0.1:8765@evil.example"},
        {"host": "[::1"},
        {"host": ""},
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:9999"},
        {"origin": "https://127.0.0.1:8765"},
        {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"},
        {"sec-fetch-site": "same-site", "sec-fetch-mode": "cors"},
    ],
)
def test_others_are_refused_with_a_reason(headers: dict[str, str]) -> None:
    refused = CLIENT.get("/", headers=headers)
    assert refused.status_code == 403
    assert "the answer" not in refused.text and refused.text.rstrip().endswith(".")
    assert "content-security-policy" in refused.headers


def test_a_taken_port_is_named_and_a_free_one_is_taken() -> None:
    with listen(0) as first:
        port = first.getsockname()[1]
        assert first.getsockname()[0] == "127.0.0.1"
        with pytest.raises(ConfigError, match=f"Port {port} .* --port 0"):
            listen(port)
