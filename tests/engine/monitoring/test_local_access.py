"""Only pages of this machine may ask a board."""

from pathlib import Path

import pytest
from starlette.testclient import TestClient

from engine.monitoring.app import Board
from engine.monitoring.directories import RunDirectories


@pytest.fixture
def client(tmp_path: Path) -> TestClient:
    board = Board(RunDirectories([tmp_path]), lambda run: 0)
    return TestClient(board.app(), base_url="http://127.0.0.1:8765")


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
def test_this_machine_is_answered(client: TestClient, headers: dict[str, str]) -> None:
    assert client.get("/", headers=headers).status_code == 200
    assert client.get("/api/runs", headers=headers).json()["runs"] == []


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example"},
        {"host": "evil.example:8765"},
        {"host": "127.0.0.1.evil.example:8765"},
        {"host": "[::1"},
        {"host": ""},
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:9999"},
        {"origin": "https://127.0.0.1:8765"},
        {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"},
    ],
)
def test_others_are_refused_with_a_reason(client: TestClient, headers: dict[str, str]) -> None:
    refused = client.get("/api/runs", headers=headers)
    assert refused.status_code in (400, 403)
    assert refused.json()["error"]["message"]
